"""Experts made of LoRA adapters that PEFT wrote."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from llava_family.mole import mole_from_lora_adapters
from llava_family.mole.layer import MoleTunerRouter

from .tiny import model_of, text_model, tiny_batch


MLP = ["gate_proj", "up_proj", "down_proj"]
IDS = tiny_batch()["input_ids"]


def logits(model):
    """In float64, where the order of sums does not show."""
    with torch.no_grad():
        return model.double()(input_ids=IDS).logits


def save_lora(folder, seed=0, model=None, **kwargs):
    """An adapter that adds values of order 1."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": MLP, **kwargs})
    lora = get_peft_model(text_model() if model is None else model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    lora.save_pretrained(folder)
    return folder


@pytest.fixture
def adapters(tmp_path):
    """Of different scales, and one that leaves `gate_proj` alone."""
    return [
        save_lora(tmp_path / "first", seed=1),
        save_lora(tmp_path / "second", seed=2, lora_alpha=3),
        save_lora(tmp_path / "third", seed=3, target_modules=["up_proj", "down_proj"]),
    ]


def choose_expert(model, expert):
    for module in model.modules():
        if isinstance(module, MoleTunerRouter):
            module["default"].weight.data.zero_()
            module["default"].bias.data.fill_(0.0)[expert] = 1e4


@pytest.mark.parametrize(("routing", "scale_by_gate"), [("top1", False), ("top1", True), ("dense", False)])
def test_a_router_that_chooses_one_expert_gives_its_adapter(adapters, routing, scale_by_gate):
    model = mole_from_lora_adapters(text_model(), adapters, routing=routing, scale_by_gate=scale_by_gate).eval()
    config = model.peft_config["default"]
    assert (config.num_experts, config.r, config.lora_alpha, config.routing) == (3, 4, 8, routing)
    for expert, folder in enumerate(adapters):
        choose_expert(model, expert)
        expected = logits(PeftModel.from_pretrained(text_model(), folder).eval())
        assert (expected - logits(text_model())).abs().mean() > 0.1
        torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)


def test_the_scale_may_be_given(adapters):
    model = mole_from_lora_adapters(text_model(), adapters, lora_alpha=1, lora_dropout=0.1).eval()
    choose_expert(model, 1)
    expected = logits(PeftModel.from_pretrained(text_model(), adapters[1]).eval())
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    assert model.peft_config["default"].lora_dropout == 0.1
    assert all("mole_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_phi_and_vision_language_models(tmp_path):
    for name, targets in (("phi", ["fc1", "fc2"]), ("llava_uhd", r".*language_model.*(up|down)_proj")):
        folder = save_lora(tmp_path / name, model=model_of(name), target_modules=targets)
        model = mole_from_lora_adapters(model_of(name), [folder, folder]).eval()
        expected = logits(PeftModel.from_pretrained(model_of(name), folder).eval())
        torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)


def test_the_attention_has_one_adapter(tmp_path):
    targets = [*MLP, "q_proj", "o_proj"]
    folders = [save_lora(tmp_path / str(seed), seed, target_modules=targets, lora_alpha=seed) for seed in (1, 2)]
    with pytest.raises(ValueError, match=r"attention.*k?[qo]_proj.*attention='first'"):
        mole_from_lora_adapters(text_model(), folders)
    first = mole_from_lora_adapters(text_model(), folders, attention="first", lora_alpha=5).eval()
    choose_expert(first, 0)
    expected = logits(PeftModel.from_pretrained(text_model(), folders[0]).eval())
    torch.testing.assert_close(logits(first), expected, rtol=1e-6, atol=1e-6)
    assert first.peft_config["default"].attention_target_modules == ["o_proj", "q_proj"]

    dropped = mole_from_lora_adapters(text_model(), folders, attention="drop").eval()
    choose_expert(dropped, 1)
    alone = save_lora(tmp_path / "alone", 2, lora_alpha=2)
    tensors = load_file(folders[1] / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".mlp." in k}, alone / "adapter_model.safetensors")
    expected = logits(PeftModel.from_pretrained(text_model(), alone).eval())
    torch.testing.assert_close(logits(dropped), expected, rtol=1e-6, atol=1e-6)
    assert not any("self_attn" in name for name in dropped.state_dict() if "mole_" in name)


class TestRefusals:
    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"use_rslora": True}, "use_rslora"),
            ({"use_dora": True}, "use_dora"),
            ({"rank_pattern": {"up_proj": 2}}, "rank_pattern"),
            ({"alpha_pattern": {"up_proj": 2}}, "alpha_pattern"),
            ({"lora_bias": True}, "lora_bias"),
            ({"bias": "lora_only"}, "`bias` is 'lora_only'"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights"),
            ({"target_modules": ["q_proj"]}, "must adapt feed-forward networks"),
            ({"target_modules": ["up_proj", "embed_tokens"]}, "has the tensor.*embed_tokens"),
            ({"r": 2}, "one rank"),
        ],
    )
    def test_what_an_expert_cannot_be(self, tmp_path, kwargs, match):
        folders = [save_lora(tmp_path / "plain"), save_lora(tmp_path / "other", **kwargs)]
        model = text_model()
        with pytest.raises(ValueError, match=match):
            mole_from_lora_adapters(model, folders, attention="drop")
        assert not hasattr(model, "peft_config")

    def test_adapters_of_the_vision_tower(self, tmp_path):
        folder = save_lora(
            tmp_path / "adapter", model=model_of("llava_uhd"), target_modules=["up_proj", "v_proj", "fc1"]
        )
        with pytest.raises(ValueError, match=r"adapts model.resampler.*and 2 more.*no linear layer of the text model"):
            mole_from_lora_adapters(model_of("llava_uhd"), [folder], attention="drop")

    def test_files_that_are_not_there(self, tmp_path):
        folder = save_lora(tmp_path / "adapter")
        weights = load_file(folder / "adapter_model.safetensors")
        (folder / "adapter_model.safetensors").unlink()
        torch.save(weights, folder / "adapter_model.bin")
        with pytest.raises(FileNotFoundError, match=r"no adapter_model.safetensors. Pickled weights are not read"):
            mole_from_lora_adapters(text_model(), [folder])
        with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
            mole_from_lora_adapters(text_model(), [tmp_path / "missing"])
        with pytest.raises(ValueError, match="is empty"):
            mole_from_lora_adapters(text_model(), [])

    def test_files_that_are_damaged(self, tmp_path):
        folder = save_lora(tmp_path / "adapter")
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
        save_file({k: v for k, v in tensors.items() if k != name}, path)
        with pytest.raises(ValueError, match=r"is damaged: model.layers.0.mlp.up_proj"):
            mole_from_lora_adapters(text_model(), [folder])
        save_file(tensors | {name: torch.zeros(4, 31)}, path)
        with pytest.raises(ValueError, match=r"up_proj needs adapters of the shapes"):
            mole_from_lora_adapters(text_model(), [folder])
        save_file(tensors | {name.replace("lora_A", "lora_magnitude_vector"): torch.zeros(4)}, path)
        with pytest.raises(ValueError, match="no ordinary LoRA: it has the tensor.*magnitude"):
            mole_from_lora_adapters(text_model(), [folder])
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOHA"}))
        with pytest.raises(ValueError, match="must be of the type LORA, but is of 'LOHA'"):
            mole_from_lora_adapters(text_model(), [folder])

    def test_arguments(self, adapters):
        with pytest.raises(TypeError, match=r"\['r', 'num_experts'\] follow from the adapters"):
            mole_from_lora_adapters(text_model(), adapters, r=4, num_experts=3)
        with pytest.raises(ValueError, match="`attention` must be"):
            mole_from_lora_adapters(text_model(), adapters, attention="mean")
