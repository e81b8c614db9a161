"""A LLaVA-UHD model whose views are 4x4 patches, for tests that run thousands of images."""

import torch

from llava_family import LlavaUhdConfig, LlavaUhdForConditionalGeneration, LlavaUhdImageProcessorPil, LlavaUhdProcessor


def tiny_config(**kwargs):
    return LlavaUhdConfig(
        **{
            "text_config": {
                "model_type": "llama",
                "vocab_size": 384,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "initializer_range": 0.2,
                "max_position_embeddings": 4096,
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 56,
                "initializer_range": 0.2,
            },
            "num_queries": 4,
            "resampler_num_attention_heads": 2,
            "initializer_range": 0.2,
            **kwargs,
        }
    )


def tiny_model(seed=0, **kwargs):
    torch.manual_seed(seed)
    return LlavaUhdForConditionalGeneration(tiny_config(**kwargs)).eval()


def tiny_processor(processor, num_queries=4):
    return LlavaUhdProcessor(LlavaUhdImageProcessorPil(base_size=56), processor.tokenizer, num_queries=num_queries)
