"""A LLaVA-MoLE model of 2 layers, 16 image patches and no training, whose experts add values of order 1."""

import torch
from torch import nn

from llava_family import LlavaMoleConfig, LlavaMoleForCausalLM
from llava_family.llava_mole.layers_llava_mole import MoleExperts, MoleRouter


TEXT_CONFIG = {
    "model_type": "llava_mole_text",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
}
SQUARE = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
SLICES = {**SQUARE, "model_type": "llava_uhd_vision", "vision_feature_layer": -1, "initializer_range": 0.2}
NUM_IMAGE_TOKENS = 16 + 2


def tiny_config(vision_encoding="square", **text_config):
    return LlavaMoleConfig(
        text_config={**TEXT_CONFIG, **text_config},
        vision_config=SLICES if vision_encoding == "slices" else SQUARE,
        vision_encoding=vision_encoding,
        num_queries=4,
        resampler_num_attention_heads=2,
        initializer_range=0.2,
    )


def give_experts_weight(model, seed=0):
    """Gives experts, which begin by adding nothing, and routers, weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, MoleExperts):
            nn.init.normal_(module.weight_B, std=module.r**-0.5 / 2, generator=generator)
        elif isinstance(module, MoleRouter):
            nn.init.normal_(module.weight, generator=generator)
    return model


def tiny_model(vision_encoding="square", seed=0, **text_config):
    torch.manual_seed(seed)
    return give_experts_weight(LlavaMoleForCausalLM(tiny_config(vision_encoding, **text_config))).eval()


def tiny_batch(model, num_rows=2, length=30, seed=0):
    """Rows of an image and some text."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 99, (num_rows, length), generator=generator)
    input_ids[:, 2 : 2 + NUM_IMAGE_TOKENS] = model.config.image_token_id
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(num_rows, 3, 56, 56, generator=generator),
    }


def labels_of(batch, model):
    ids = batch["input_ids"]
    ignored = (ids == model.config.image_token_id) | (batch["attention_mask"] == 0)
    return ids.masked_fill(ignored, -100)
