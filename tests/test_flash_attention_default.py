"""With CUDA, half precision and a flash attention at hand, and nothing asked for, all three families take it."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedModel
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
from transformers.utils import logging

from llava_family import (
    LlavaMoleConfig,
    LlavaMoleForCausalLM,
    LlavaUhdConfig,
    LlavaUhdForConditionalGeneration,
    LlavaUhdVisionConfig,
    MoeLlavaConfig,
    MoeLlavaForCausalLM,
    MoeLlavaQwen2Config,
)
from llava_family.llava_uhd import modeling_llava_uhd


SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 64, "num_key_value_heads": 2, "pad_token_id": 0}
VISION = {**SIZES, "image_size": 28, "patch_size": 14}


def make_config(family):
    if family == "llava_uhd":
        parts = {"text_config": LlamaConfig(**TEXT), "vision_config": LlavaUhdVisionConfig(**VISION)}
        return LlavaUhdConfig(**parts, num_queries=4, resampler_num_attention_heads=2, image_token_id=64)
    if family == "moe_llava":
        parts = {"text_config": MoeLlavaQwen2Config(**TEXT), "vision_config": CLIPVisionConfig(**VISION)}
        return MoeLlavaConfig(**parts, image_token_id=64)
    parts = {"text_config": LlamaConfig(**TEXT), "vision_config": CLIPVisionConfig(**VISION)}
    return LlavaMoleConfig(**parts, image_token_id=64)


FAMILIES = {
    "llava_uhd": LlavaUhdForConditionalGeneration,
    "moe_llava": MoeLlavaForCausalLM,
    "llava_mole": LlavaMoleForCausalLM,
}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU and installed versions of flash attention, as far as the choice sees them."""

    def pretend(versions=(2,), major=9):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
        for version, needs in FLASH_ATTENTION_COMPATIBILITY_MATRIX.items():
            monkeypatch.setitem(needs, "general_availability_check", lambda found=version in versions: found)
        # What follows the choice wants the kernels themselves.
        monkeypatch.setattr(
            PreTrainedModel,
            "_check_and_adjust_attn_implementation",
            lambda self, asked, is_init_check=False, allow_all_kernels=False: asked or "sdpa",
        )

    return pretend


def implementations(model):
    config = model.config
    parts = (config, config.text_config, config.vision_config)
    found = {part._attn_implementation for part in parts}
    modules = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    assert modules == found
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("versions", "major", "dtype", "asked", "expected"),
    [
        ((2,), 9, torch.bfloat16, None, "flash_attention_2"),
        ((2, 4), 9, torch.float16, None, "flash_attention_2"),
        ((4,), 9, torch.bfloat16, None, "flash_attention_4"),
        ((4,), 8, torch.bfloat16, None, "sdpa"),
        ((2,), 7, torch.float16, None, "sdpa"),
        ((2,), 9, torch.float32, None, "sdpa"),
        ((), 9, torch.bfloat16, None, "sdpa"),
        ((2,), 9, torch.bfloat16, "sdpa", "sdpa"),
        ((2,), 9, torch.bfloat16, "eager", "eager"),
    ],
)
def test_choice(gpu, family, versions, major, dtype, asked, expected):
    gpu(versions, major)
    model = FAMILIES[family]._from_config(make_config(family), dtype=dtype, attn_implementation=asked)
    assert implementations(model) == {expected}


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_models_choose_too(gpu, family, tmp_path):
    FAMILIES[family](make_config(family)).to(torch.bfloat16).save_pretrained(tmp_path)
    gpu()
    assert implementations(FAMILIES[family].from_pretrained(tmp_path)) == {"flash_attention_2"}
    assert implementations(FAMILIES[family].from_pretrained(tmp_path, dtype=torch.float32)) == {"sdpa"}
    assert implementations(FAMILIES[family].from_pretrained(tmp_path, attn_implementation="sdpa")) == {"sdpa"}


def test_without_a_gpu_nothing_is_said(capsys):
    model = LlavaUhdForConditionalGeneration._from_config(make_config("llava_uhd"), dtype=torch.bfloat16)
    assert implementations(model) == {"sdpa"} and "flash" not in capsys.readouterr().err


def test_the_choice_is_said_once(gpu, monkeypatch):
    said = []
    logger = modeling_llava_uhd.logger
    monkeypatch.setattr(type(logger), "_log", lambda self, level, message, args, **kwargs: said.append(message))
    for method in (logging.warning_once, logging.info_once):
        method.cache_clear()
    before = logger.level
    logger.setLevel("INFO")
    try:
        for versions in ((2,), ()):
            gpu(versions)
            for _ in range(2):
                LlavaUhdForConditionalGeneration._from_config(make_config("llava_uhd"), dtype=torch.bfloat16)
    finally:
        logger.setLevel(before)
    chosen, missing = (message for message in said if "Attention runs by" in message)
    assert "`flash_attention_2`" in chosen and 'attn_implementation="sdpa"' in chosen
    assert "`sdpa`" in missing and "pip install flash-attn" in missing
