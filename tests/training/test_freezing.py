"""What each stage trains, against what the originals' code gave gradients to."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from llava_family import LlavaMoleForCausalLM, LlavaUhdForConditionalGeneration, MoeLlavaForCausalLM
from llava_family.training import (
    freeze_for_finetuning,
    freeze_for_moe_tuning,
    freeze_for_mole_tuning,
    freeze_for_pretraining,
)

from .tiny import FIXTURES, tiny_model


UHD = FIXTURES / "llava_uhd"
MOE = FIXTURES / "moe_llava"
VARIANTS = ("phi_clip336", "stablelm_clip336", "qwen_clip336", "stablelm_siglip384")


def metadata(folder: Path):
    return json.loads((folder / "expected.json").read_text())


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture(scope="module")
def uhd():
    return LlavaUhdForConditionalGeneration.from_pretrained(
        UHD / "original_checkpoint", mm_vision_tower=UHD / "clip_vision_tower"
    )


def test_llava_uhd_finetunes_all_but_the_tower(uhd):
    """As many tensors as the original, where q, k and v of the resampler are one each."""
    names = freeze_for_finetuning(uhd)
    assert set(names) == trained(uhd)
    assert metadata(UHD)["not_trainable_in_finetune"] == "model.vision_tower.* and model.mm_projector.pos_embed"
    others = {name for name, _ in uhd.named_parameters()} - set(names)
    assert others and all(name.startswith("model.vision_tower.") for name in others)
    assert "model.resampler.pos_embed" in dict(uhd.named_buffers())
    merged = {re.sub(r"attention\.[qkv]_proj", "attention.in_proj", name) for name in names}
    assert len(merged) == metadata(UHD)["num_trainable_tensors_in_finetune"]


def test_llava_uhd_pretrains_the_resampler(uhd):
    names = freeze_for_pretraining(uhd)
    assert set(names) == trained(uhd) == {name for name, _ in uhd.named_parameters() if ".resampler." in name}
    gradients = metadata(UHD)["cases"]["train_plain"]["grad_norms"]
    merged = {re.sub(r"attention\.[qkv]_proj", "attention.in_proj", name) for name in names}
    assert len(merged) == len([name for name in gradients if ".mm_projector." in name])


def original_names(name):
    """Of a parameter of MoE-LLaVA, with all numbers as N, as the goldens list them."""
    name = name.replace("model.multi_modal_projector.linear_1.", "model.mm_projector.image_spatial_proj.N.")
    name = name.replace("model.multi_modal_projector.linear_2.", "model.mm_projector.image_spatial_proj.N.")
    name = re.sub(r"model\.language_model\.layers\.\d+\.", "model.layers.N.", name)
    name = name.replace(".mlp.gate.weight", ".mlp.deepspeed_moe.gate.wg.weight")
    return [
        re.sub(r"\.mlp\.experts\.", ".mlp.deepspeed_moe.experts.deepspeed_experts.N.", one) for one in unpacked(name)
    ]


def unpacked(name):
    if name.endswith("experts.gate_up_proj"):
        return [name.replace("gate_up_proj", f"{part}_proj.weight") for part in ("gate", "up")]
    match = re.search(r"experts\.(up|down)_proj(_bias)?$", name)
    if match is None:
        return [name]
    return [f"{name[: match.start()]}experts.{match[1]}_proj.{'bias' if match[2] else 'weight'}"]


# How the backbones call what ours calls gate, up and down
QWEN = {"gate_proj": "w2", "up_proj": "w1", "down_proj": "c_proj"}
PHI = {"up_proj": "fc1", "down_proj": "fc2"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_moe_llava_stages(variant):
    model = MoeLlavaForCausalLM.from_pretrained(MOE / variant / "original_checkpoint")
    names = freeze_for_moe_tuning(model)
    assert set(names) == trained(model)
    backbone = {"qwen_clip336": QWEN, "phi_clip336": PHI}.get(variant, {})
    actual = set()
    for name in itertools.chain.from_iterable(map(original_names, names)):
        for ours, theirs in backbone.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        if variant == "qwen_clip336":
            name = name.replace("model.layers.", "transformer.h.").replace("model.mm_", "transformer.mm_")
        actual.add(name)
    assert actual == set(metadata(MOE / variant)["trainable_parameters_stage3"])

    names = freeze_for_pretraining(model)
    assert (
        set(names)
        == trained(model)
        == {f"model.multi_modal_projector.linear_{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")}
    )
    others = {name for name, _ in model.named_parameters()} - set(freeze_for_finetuning(model))
    assert others and all(name.startswith("model.vision_tower.") for name in others)


def test_llava_mole_stages():
    """All that the original's code trains: adapters, experts, routers, projector, start and end."""
    model = tiny_model("llava_mole")
    names = freeze_for_mole_tuning(model)
    assert set(names) == trained(model)
    kinds = {re.sub(r"\.\d+\.", ".N.", name.removeprefix("model.").removeprefix("language_model.")) for name in names}
    expected = {f"layers.N.self_attn.{x}_proj.mole_experts.weight_{side}" for x in "qkvo" for side in "AB"}
    expected |= {f"layers.N.mlp.{x}_proj.mole_experts.weight_{side}" for x in ("gate", "up", "down") for side in "AB"}
    expected |= {f"layers.N.mlp.mole_router.{kind}" for kind in ("weight", "bias")}
    between = {f"multi_modal_projector.linear_{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")}
    between |= {"image_boundaries.start", "image_boundaries.end"}
    assert kinds == expected | between
    # The goldens' list, where every expert is a tensor of its own
    keys = metadata(FIXTURES / "llava_mole")["facts"]["trainable_keys"]
    originals = {re.sub(r"\.\d+\.", ".N.", key) for key in keys}
    attention = {f"layers.N.self_attn.{x}_proj.lora_{side}.default.weight" for x in "qkvo" for side in "AB"}
    experts = {f"layers.N.mlp.moe_{x}.N.lora_{side}" for x in ("gate", "up", "down") for side in "AB"}
    routers = {f"layers.N.mlp.router.{kind}" for kind in ("weight", "bias")}
    adaptor = {"in_adaptor.visual_start_token", "in_adaptor.visual_end_token"}
    adaptor |= {f"in_adaptor.projector.N.{kind}" for kind in ("weight", "bias")}
    prefix = "llm_model.base_model.model.model."
    assert originals - {key for key in originals if key.startswith("vit.")} == adaptor | {
        prefix + key for key in attention | experts | routers
    }
    assert {name.removeprefix("model.") for name in freeze_for_pretraining(model)} == between


@pytest.mark.parametrize("freeze", [freeze_for_pretraining, freeze_for_moe_tuning, freeze_for_mole_tuning])
def test_models_without_such_parts_are_refused(freeze):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="A Sequential has nothing that this stage trains"):
        freeze(model)
    assert model[0].weight.requires_grad


def test_frozen_again_for_the_next_stage():
    model = tiny_model("llava_mole")
    assert isinstance(model, LlavaMoleForCausalLM)
    freeze_for_pretraining(model)
    assert freeze_for_mole_tuning(model) == [name for name, value in model.named_parameters() if value.requires_grad]
