"""Text models of 2 layers and vision-language models around one, whose adapters add values of order 1."""

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    StableLmConfig,
)

from llava_family import (
    LlavaMoleConfig,
    LlavaMoleForCausalLM,
    LlavaUhdConfig,
    LlavaUhdForConditionalGeneration,
    MoeLlavaConfig,
    MoeLlavaForCausalLM,
    MoeLlavaLlamaConfig,
    MoeLlavaPhiConfig,
)
from llava_family.llava_mole.layers_llava_mole import MoleExperts, MoleRouter
from llava_family.mole import MoleConfig, get_mole_model


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
BACKBONES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "phi": PhiConfig,
    "qwen2": Qwen2Config,
    "stablelm": StableLmConfig,
}
VLMS = ("llava_uhd", "moe_llava", "moe_llava_phi", "llava_mole")


def text_model(backbone="llama", **kwargs):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(BACKBONES[backbone](**{**TEXT, **kwargs})).eval()


def vision_language_model(name):
    """The MoE-LLaVA ones are sparse in their second layer."""
    torch.manual_seed(0)
    dense = {"model_type": "llama", **TEXT}
    if name == "llava_uhd":
        vision = {key: value for key, value in CLIP.items() if key != "model_type"}
        config = LlavaUhdConfig(
            text_config=dense, vision_config=vision, num_queries=4, resampler_num_attention_heads=2
        )
        return LlavaUhdForConditionalGeneration(config).eval()
    if name == "llava_mole":
        return LlavaMoleForCausalLM(LlavaMoleConfig(text_config=dense, vision_config=CLIP)).eval()
    text_class = MoeLlavaPhiConfig if name == "moe_llava_phi" else MoeLlavaLlamaConfig
    text_config = text_class(**TEXT, moe_layers=[1], num_experts=2, num_experts_per_tok=1)
    return MoeLlavaForCausalLM(MoeLlavaConfig(text_config=text_config, vision_config=CLIP)).eval()


def model_of(name):
    return text_model(name) if name in BACKBONES else vision_language_model(name)


def give_adapters_weight(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, MoleExperts):
            nn.init.normal_(module.weight_B, std=module.r**-0.5 / 2, generator=generator)
        elif isinstance(module, MoleRouter):
            nn.init.normal_(module.weight, generator=generator)
    return model


def mole_config(**kwargs):
    return MoleConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **kwargs})


def adapted(model=None, **kwargs):
    model = text_model() if model is None else model
    return give_adapters_weight(get_mole_model(model, mole_config(**kwargs))).eval()


def tiny_batch(num_rows=2, length=12, padding="right", seed=0):
    """Rows of text, of which the last one has four tokens of padding."""
    input_ids = torch.randint(3, 90, (num_rows, length), generator=torch.Generator().manual_seed(seed))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[-1, slice(-4, None) if padding == "right" else slice(4)] = 0
    input_ids = input_ids * attention_mask
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill(attention_mask == 0, -100),
    }


def adapter_parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if "mole_" in name}
