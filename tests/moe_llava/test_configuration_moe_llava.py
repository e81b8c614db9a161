"""Configurations: layers with experts, validation, and the translation of the original's `config.json`."""

import json

import pytest
import torch
from transformers import PhiConfig, Qwen2Config

from llava_family import MoeLlavaConfig, MoeLlavaForCausalLM, MoeLlavaPhiConfig
from llava_family.moe_llava.configuration_moe_llava import translate_original_config

from .conftest import FIXTURES, Variant, load


ORIGINAL = FIXTURES / "stablelm_clip336" / "original_checkpoint"


def translate(moe=(), **changes):
    config = json.loads((ORIGINAL / "config.json").read_text())
    return translate_original_config({**config, **changes, "moe": {**config["moe"], **dict(moe)}}, str(ORIGINAL))


@pytest.mark.parametrize(
    ("placement", "layers"),
    [
        ("sparse", [0, 2, 4]),
        ("dense", [0, 1, 2, 3, 4]),
        ("first_half", [0, 1]),
        ("second_half", [2, 3, 4]),
        ([3, 1], [1, 3]),
        ([], []),
    ],
)
def test_placement_of_experts(placement, layers):
    assert MoeLlavaPhiConfig(num_hidden_layers=5, moe_layers=placement).moe_layers == layers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moe_layers": "interval"}, r"one of \['sparse', .*'interval'"),
        ({"moe_layers": [0, 5]}, r"layers of 0\.\.4, each once, but is \[0, 5\]"),
        ({"moe_layers": [1, 1]}, "each once"),
        ({"num_experts_per_tok": 3}, "1 or 2, as in the original"),
        ({"num_experts_per_tok": 2, "num_experts": 1}, r"at most `num_experts` \(1\)"),
        ({"capacity_factor": 0}, "`capacity_factor` must be positive"),
        ({"eval_capacity_factor": -1.5}, "`eval_capacity_factor` must be positive, .*-1.5"),
    ],
)
def test_bad_settings_name_themselves(settings, message):
    with pytest.raises(Exception, match=message) as error:
        MoeLlavaPhiConfig(num_hidden_layers=5, **settings)
    assert isinstance(error.value, ValueError) or isinstance(error.value.__cause__, ValueError)


def test_routing_of_the_original_is_translated():
    text_config = translate({"top_k_experts": 1, "use_residual": True, "router_aux_loss_coef": 0.5})["text_config"]
    assert (text_config["num_experts_per_tok"], text_config["use_residual"]) == (1, True)
    assert text_config["router_aux_loss_coef"] == 0.5
    # Drop-free and deterministic, whatever the release says.
    assert "capacity_factor" not in text_config and "second_expert_policy" not in text_config
    del text_config["use_residual"]
    assert not MoeLlavaConfig(text_config=text_config).text_config.use_residual


@pytest.mark.parametrize(
    ("moe", "changes", "message"),
    [
        ({"num_experts": [4, 8]}, {}, r"as many experts, but .*\[4, 8\]"),
        ({}, {"mm_vision_select_feature": "cls"}, r"one of \['patch', 'cls_patch'\], but is 'cls'"),
        ({}, {"model_type": "llava"}, "of type 'llava'"),
    ],
)
def test_originals_that_are_refused(moe, changes, message):
    with pytest.raises(ValueError, match=message):
        translate(moe, **changes)


def test_flag_of_tied_embeddings_may_be_the_text_models():
    text_config = {"model_type": "moe_llava_qwen2_text", "tie_word_embeddings": True}
    assert MoeLlavaConfig(text_config=text_config).tie_word_embeddings
    assert not MoeLlavaConfig(text_config={"model_type": "moe_llava_qwen2_text"}).tie_word_embeddings


def test_backbone_s_own_fields_are_those_of_the_in_tree_class():
    for sparse, dense in (("moe_llava_phi_text", PhiConfig()), ("moe_llava_qwen2_text", Qwen2Config())):
        text_config = MoeLlavaConfig(text_config={"model_type": sparse}).text_config
        for name in ("hidden_size", "vocab_size", "num_hidden_layers", "rope_parameters", "hidden_act"):
            assert getattr(text_config, name) == getattr(dense, name)


@pytest.mark.parametrize("includes_padding", [False, True])
def test_balance_loss_of_a_padded_batch(includes_padding):
    variant = Variant("stablelm_clip336")
    model: MoeLlavaForCausalLM = load(variant.original).eval()
    model.config.text_config.aux_loss_includes_padding = includes_padding
    ids = torch.arange(5, 29)[None]
    padded = torch.nn.functional.pad(ids, (8, 0), value=3)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (8, 0))
    with torch.no_grad():
        alone = model(input_ids=ids, output_router_logits=True).aux_loss
        in_batch = model(input_ids=padded, attention_mask=mask, output_router_logits=True).aux_loss
    assert torch.allclose(in_batch, alone, atol=1e-5) is not includes_padding
