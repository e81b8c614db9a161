"""Statements of docs/fidelity.md that no other test shows."""

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from llava_family import LlavaUhdConfig, LlavaUhdForConditionalGeneration, LlavaUhdProcessor
from llava_family.llava_uhd.modeling_llava_uhd import sincos_positions


FIXTURES = Path(__file__).parents[1] / "fixtures" / "llava_uhd"
RELEASE, CLIP = FIXTURES / "original_checkpoint", FIXTURES / "clip_vision_tower"
GRID = (19, 29)


@pytest.fixture(scope="module")
def model():
    return LlavaUhdForConditionalGeneration.from_pretrained(RELEASE, mm_vision_tower=CLIP).eval()


@pytest.fixture(scope="module")
def processor():
    return LlavaUhdProcessor.from_pretrained(RELEASE)


def resized(table):
    """A `(side**2, width)` table, resized bicubically in its own dtype to `GRID`."""
    side = round(len(table) ** 0.5)
    square = table.T.reshape(1, -1, side, side)
    return nn.functional.interpolate(square, size=GRID, mode="bicubic", align_corners=False)[0].flatten(1).T


def test_vision_positions_are_resized_in_the_dtype_of_the_parameters(model):
    embeddings = model.model.vision_tower.embeddings
    table = embeddings.position_embedding.weight[1:]
    assert table.dtype == torch.bfloat16
    # Black patches of a convolution without a bias leave the positions.
    with torch.no_grad():
        actual = embeddings(torch.zeros(GRID[0] * GRID[1], 588), [GRID])[1:]
    assert torch.equal(actual, resized(table))
    assert not torch.equal(actual, resized(table.float()).bfloat16())


def test_resampler_positions_are_resized_in_float32(model):
    resampler = copy.deepcopy(model.model.resampler).to(torch.bfloat16)
    actual = resampler.interpolate_positions(GRID)
    assert torch.equal(actual, resized(resampler.pos_embed.float()).bfloat16())
    assert not torch.equal(actual, resized(resampler.pos_embed))


def test_position_table_is_loaded_and_not_trained(model):
    shards = {}
    for file in RELEASE.glob("model-*.safetensors"):
        shards |= load_file(file)
    table = model.model.resampler.pos_embed
    assert torch.equal(table.float(), shards["model.mm_projector.pos_embed"].float())
    assert not torch.equal(table.float(), sincos_positions(*table.shape))
    assert "pos_embed" in dict(model.model.resampler.named_buffers())
    assert not any("pos_embed" in name for name, _ in model.named_parameters())


@pytest.mark.slow
def test_nothing_is_cut_at_2048_positions(model, processor):
    assert processor.tokenizer.model_max_length == 2048
    images = [Image.new("RGB", (672, 1008))] * 3
    inputs = processor(images=images, text="<image>" * 3 + "\nWhat?", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    assert length > 3 * 1014
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == length


def test_literal_unknown_tokens_are_kept(processor):
    inputs = processor(text="a <unk> b")
    assert processor.tokenizer.unk_token_id == 0
    assert 0 in inputs["input_ids"][0]
    assert set(inputs["attention_mask"][0]) == {1}


@pytest.mark.parametrize(("hidden_size", "heads"), [(5120, 40), (128, 1), (64, 1)])
def test_default_heads_of_the_resampler(hidden_size, heads):
    text_config = {"model_type": "llama", "hidden_size": hidden_size, "num_attention_heads": 2}
    assert LlavaUhdConfig(text_config=text_config).resampler_num_attention_heads == heads
