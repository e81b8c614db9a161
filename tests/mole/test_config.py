"""The configuration, and what PEFT knows of it."""

import json

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from llava_family.mole import MoleConfig, register_with_peft
from llava_family.mole.config import MolePeftType


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", 2.5),
        ("num_experts", 0),
        ("num_experts", True),
        ("lora_alpha", 0),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("balance_loss_coef", -0.01),
        ("routing", "top2"),
        ("balance_loss", "mean"),
        ("target_modules", []),
        ("target_modules", "up_proj"),
        ("target_modules", ["layers.0.mlp.up_proj"]),
        ("attention_target_modules", "q_proj"),
    ],
)
def test_values_outside_of_what_is_described_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        MoleConfig(**{field: value})


def test_a_saved_configuration_comes_back_through_peft(tmp_path):
    config = MoleConfig(r=4, routing="dense", attention_target_modules=[], modules_to_save=["lm_head"])
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MOLE"
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is MoleConfig
    assert loaded == config
    # of transformers, as of PEFT's enumeration
    assert loaded.peft_type == "MOLE" and loaded.peft_type.value == "MOLE"


def test_registering_again_changes_nothing():
    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    register_with_peft()
    assert before == PEFT_TYPE_TO_CONFIG_MAPPING
    assert "MOLE" in PEFT_TYPE_TO_CONFIG_MAPPING


def test_a_method_of_the_same_name_is_not_replaced(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, MolePeftType.MOLE, peft.LoraConfig)
    with pytest.raises(RuntimeError, match="MOLE already"):
        register_with_peft()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["MOLE"] is peft.LoraConfig
