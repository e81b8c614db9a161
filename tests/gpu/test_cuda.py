"""What a GPU is needed for: flash attention equals sdpa, packed views stacked ones, compiled decoding eager.

python -m pytest tests/gpu
"""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX

from llava_family import (
    LlavaMoleConfig,
    LlavaMoleForCausalLM,
    LlavaMoleTextConfig,
    LlavaUhdConfig,
    LlavaUhdForConditionalGeneration,
    LlavaUhdVisionConfig,
    MoeLlavaConfig,
    MoeLlavaForCausalLM,
    MoeLlavaQwen2Config,
)


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Heads of 64, as CLIP-L's and StableLM's
SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 512, "num_key_value_heads": 4, "pad_token_id": 0, "eos_token_id": 511}
IMAGE = 512
DEVICE = "cuda"
GRIDS = [[(2, 1), (16, 16), (12, 20)], [(0, 0), (0, 0), (24, 24)], [(1, 2), (12, 20), (16, 16)]]
VERSIONS = [
    pytest.param(
        f"flash_attention_{version}",
        marks=pytest.mark.skipif(
            not needs["general_availability_check"](), reason=f"flash attention {version} is not installed"
        ),
    )
    for version, needs in FLASH_ATTENTION_COMPATIBILITY_MATRIX.items()
]


def uhd_config(queries=36):
    return LlavaUhdConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=LlavaUhdVisionConfig(**SIZES, image_size=336, patch_size=14),
        num_queries=queries,
        resampler_num_attention_heads=4,
        image_token_id=IMAGE,
    )


def moe_config():
    vision = CLIPVisionConfig(**SIZES, image_size=56, patch_size=14)
    return MoeLlavaConfig(text_config=MoeLlavaQwen2Config(**TEXT), vision_config=vision, image_token_id=IMAGE)


def mole_config():
    vision = CLIPVisionConfig(**SIZES, image_size=56, patch_size=14)
    text = LlavaMoleTextConfig(**TEXT, num_experts=3, r=8, lora_alpha=16, lora_dropout=0.0)
    return LlavaMoleConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)


def make(family, attention, dtype=torch.bfloat16):
    torch.manual_seed(0)
    classes = {
        "llava_uhd": (LlavaUhdForConditionalGeneration, uhd_config),
        "moe_llava": (MoeLlavaForCausalLM, moe_config),
        "llava_mole": (LlavaMoleForCausalLM, mole_config),
    }
    model_class, config = classes[family]
    return model_class._from_config(config(), dtype=dtype, attn_implementation=attention).to(DEVICE).eval()


def num_patches(grids):
    return sum(rows * columns * h * w + a * b for (rows, columns), (h, w), (a, b) in grids)


def inputs_of(family, batch=2):
    """Prompts with one image each, the first one padded on the left."""
    generator = torch.Generator().manual_seed(1)
    if family == "llava_uhd":
        grids = GRIDS[:1] * batch
        patches = sum(rows * columns * h * w for (rows, columns), (h, w), _ in grids) + sum(
            a * b for *_, (a, b) in grids
        )
        images = {
            "pixel_values": torch.randn(patches, 588, generator=generator),
            "image_grids": torch.tensor(grids),
        }
        count = 36 * 3
    else:
        images = {"pixel_values": torch.randn(batch, 3, 56, 56, generator=generator)}
        count = 16 + 2 * (family == "llava_mole")
    text = torch.randint(1, 500, (batch, 24), generator=generator)
    ids = torch.cat([text[:, :8], torch.full((batch, count), IMAGE), text[:, 8:]], dim=1)
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    return {name: tensor.to(DEVICE) for name, tensor in {"input_ids": ids, "attention_mask": mask, **images}.items()}


@pytest.mark.parametrize("attention", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llava_uhd", "moe_llava", "llava_mole"])
@torch.no_grad()
def test_flash_attention_equals_sdpa(family, dtype, attention):
    model, other = make(family, "sdpa", dtype), make(family, attention, dtype)
    other.load_state_dict(model.state_dict())
    inputs = inputs_of(family)
    real = inputs["attention_mask"].bool()
    expected, found = (each(**inputs).logits[real].float() for each in (model, other))
    exact = make(family, "sdpa", torch.float32)
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    truth = exact(**inputs).logits[real]
    # No farther from float32 than sdpa in the same dtype, but for rounding
    assert (found - truth).abs().mean() <= 1.5 * (expected - truth).abs().mean()


@pytest.mark.parametrize("attention", VERSIONS)
@torch.no_grad()
def test_packed_views_equal_stacked_views(attention):
    model, packed = make("llava_uhd", "sdpa"), make("llava_uhd", attention)
    packed.load_state_dict(model.state_dict())
    pixels = torch.randn(num_patches(GRIDS), 588, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    expected, found = (each.get_image_features(pixels, torch.tensor(GRIDS).to(DEVICE)) for each in (model, packed))
    for one, other in zip(expected.pooler_output, found.pooler_output, strict=True):
        assert one.shape == other.shape
        assert (one - other).float().norm() <= 0.02 * one.float().norm()


@pytest.mark.parametrize("family", ["llava_uhd", "moe_llava", "llava_mole"])
@torch.no_grad()
def test_compiled_decoding_equals_eager(family):
    model, inputs = make(family, "sdpa", torch.float32), inputs_of(family)
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    found = model.generate(**inputs, max_new_tokens=12, do_sample=False, cache_implementation="static")
    torch.testing.assert_close(found, expected)
