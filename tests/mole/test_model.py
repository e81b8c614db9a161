"""What the tuner puts into models: its places and names, its values against known ones, and its removal."""

import copy
import io
import threading

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import inject_adapter_in_model
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_family import LlavaMoleTextConfig, LlavaMoleTextModel
from llava_family.llava_mole import layers_llava_mole
from llava_family.mole import MoleConfig, get_mole_model
from llava_family.mole.layer import MoleTunerLinear, MoleTunerMLP

from .tiny import (
    BACKBONES,
    TEXT,
    VLMS,
    adapted,
    adapter_parameters,
    give_adapters_weight,
    model_of,
    mole_config,
    text_model,
    tiny_batch,
)


IDS = tiny_batch()["input_ids"]
MODES = [("top1", False), ("top1", True), ("dense", False)]


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits


@pytest.mark.parametrize("name", [*BACKBONES, *VLMS])
def test_a_new_adapter_adds_nothing_and_is_all_that_is_trained(name):
    base = model_of(name)
    expected = logits(base)
    model = get_mole_model(base, mole_config())
    assert torch.equal(logits(model.eval()), expected)
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(adapter_parameters(model)) != set()
    give_adapters_weight(model)
    assert (logits(model) - expected).abs().mean() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", VLMS)
def test_only_the_text_model_is_adapted_and_its_sparse_layers_keep_their_experts(name):
    model = adapted(model_of(name))
    places = [key for key, module in model.named_modules() if isinstance(module, (MoleTunerLinear, MoleTunerMLP))]
    assert places
    assert all(".language_model.layers." in key for key in places)
    mlps = [key.partition("layers.")[2] for key in places if key.endswith(".mlp")]
    assert mlps == (["0.mlp"] if name.startswith("moe_llava") else ["0.mlp", "1.mlp"])
    # attention is the same in sparse layers
    assert sum(".layers.1.self_attn." in key for key in places) == 4


@pytest.mark.parametrize(("routing", "scale_by_gate"), MODES)
def test_the_tuner_computes_what_the_model_of_the_family_does(routing, scale_by_gate):
    """The names are the same but for PEFT's prefix."""
    model = adapted(routing=routing, scale_by_gate=scale_by_gate)
    config = LlavaMoleTextConfig(
        **TEXT, r=4, lora_alpha=8, lora_dropout=0.0, routing=routing, scale_by_gate=scale_by_gate
    )
    native = LlavaMoleTextModel(config).eval()
    state = {
        name.removeprefix("base_model.model.model."): value for name, value in get_peft_model_state_dict(model).items()
    }
    assert set(state) == {name for name in native.state_dict() if "mole_" in name}
    state |= text_model().model.state_dict()
    native.load_state_dict(state, strict=True)
    expected = native(input_ids=IDS).last_hidden_state
    hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backbone", ["llama", "phi", "qwen2"])
def test_one_expert_is_lora(backbone):
    model = adapted(text_model(backbone), num_experts=1)
    names = {name.rpartition(".mole_experts")[0] for name in adapter_parameters(model)}
    assert not any("router" in name for name in adapter_parameters(model))
    base = text_model(backbone)
    targets = sorted({name.rpartition(".")[2] for name in names})
    lora = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets)).eval()
    for name, module in model.named_modules():
        if isinstance(module, MoleTunerLinear):
            twin = lora.get_submodule(name)
            twin.lora_A["default"].weight.data.copy_(module.mole_experts["default"].weight_A[0])
            twin.lora_B["default"].weight.data.copy_(module.mole_experts["default"].weight_B[0].T)
    batch = tiny_batch()
    ours, theirs = model(**batch), lora(**batch)
    assert "balance_loss" not in ours
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-6)
    ours.loss.backward()
    theirs.loss.backward()
    for name in names:
        experts, twin = model.get_submodule(name).mole_experts["default"], lora.get_submodule(name)
        torch.testing.assert_close(experts.weight_A.grad[0], twin.lora_A["default"].weight.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            experts.weight_B.grad[0].T, twin.lora_B["default"].weight.grad, rtol=1e-5, atol=1e-6
        )


def test_subsets_can_be_named():
    model = adapted(target_modules=["down_proj"], attention_target_modules=["v_proj"])
    places = {name.split(".mole_experts")[0].split(".layers.")[1] for name in adapter_parameters(model)}
    assert {place for place in places if "router" not in place} == {
        f"{layer}.{name}" for layer in (0, 1) for name in ("mlp.down_proj", "self_attn.v_proj")
    }
    without = adapted(attention_target_modules=[])
    assert not any("self_attn" in name for name in adapter_parameters(without))


def test_phi_is_adapted_under_its_own_names():
    names = {
        name.split(".mole_experts")[0].rpartition(".")[2] for name in adapter_parameters(adapted(text_model("phi")))
    }
    assert {name for name in names if name not in ("weight", "bias")} == {
        "q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"
    }  # fmt: skip


def test_grouped_products_compute_the_same(monkeypatch):
    model = adapted(r=8)
    expected = logits(model)
    monkeypatch.setattr(layers_llava_mole, "GROUPED_EXTRA_RANKS", 0)
    monkeypatch.setattr(layers_llava_mole, "GROUPED_TOKENS", 1)
    calls = []
    group_tokens = layers_llava_mole.group_tokens
    monkeypatch.setattr("llava_family.mole.layer.group_tokens", lambda w: calls.append(1) or group_tokens(w))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert len(calls) == 2
    # dense routing has no groups
    calls.clear()
    logits(adapted(r=8, routing="dense"))
    assert not calls


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "match"),
        [
            ({"target_modules": ["fc1"]}, r"`target_modules` names \['fc1'\].*gate_proj"),
            ({"target_modules": ["q_proj"]}, r"`target_modules` names \['q_proj'\]"),
            ({"attention_target_modules": ["dense"]}, r"`attention_target_modules` names \['dense'\].*o_proj"),
        ],
    )
    def test_names_that_the_model_lacks(self, config, match):
        model = text_model()
        with pytest.raises(ValueError, match=match):
            get_mole_model(model, mole_config(**config))
        assert not any(isinstance(module, MoleTunerMLP) for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_models_without_a_text_model(self):
        vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        with pytest.raises(ValueError, match="must have a text model"):
            get_mole_model(CLIPVisionModel(CLIPVisionConfig(**vision, image_size=28, patch_size=14)), mole_config())
        with pytest.raises(TypeError, match="must be a transformers model, but is a Linear"):
            get_mole_model(torch.nn.Linear(2, 2), mole_config())
        with pytest.raises(TypeError, match="PeftModelForCausalLM.*add_adapter"):
            get_mole_model(adapted(), mole_config())
        with pytest.raises(TypeError, match="must be a MoleConfig, but is a LoraConfig"):
            get_mole_model(text_model(), LoraConfig())

    def test_models_without_a_known_feed_forward_network(self):
        model = text_model()
        for layer in model.model.layers:
            layer.mlp = torch.nn.Sequential(layer.mlp)
        with pytest.raises(ValueError, match="no feed-forward network to adapt.*found Sequential"):
            get_mole_model(model, mole_config())

    def test_networks_that_compute_something_else(self):
        model = text_model()
        mlp = type(model.model.layers[0].mlp)

        class Scaled(mlp):
            def forward(self, hidden_states):
                return super().forward(hidden_states) * 0.5

        for layer in model.model.layers:
            layer.mlp.__class__ = Scaled
        with pytest.raises(ValueError, match="Scaled, computes something else"):
            get_mole_model(model, mole_config())

    def test_models_that_have_experts_or_adapters(self):
        config = LlavaMoleTextConfig(**TEXT, r=4)
        with pytest.raises(ValueError, match="LoRA experts of its own"):
            get_mole_model(LlavaMoleTextModel(config), mole_config())
        lora = get_peft_model(text_model(), LoraConfig(target_modules=["q_proj"])).base_model.model
        with pytest.raises(ValueError, match="adapter of another method"):
            get_mole_model(lora, mole_config())

    def test_two_active_adapters(self):
        model = adapted()
        model.add_adapter("other", mole_config())
        with pytest.raises(ValueError, match="One adapter can be active"):
            model.base_model.set_adapter(["default", "other"])


def test_two_adapters_of_different_kinds_take_turns():
    model = adapted()
    first = logits(model)
    model.add_adapter("other", mole_config(num_experts=2, routing="dense", target_modules=["up_proj"], r=2))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name in adapter_parameters(model) if ".other." in name} != set()
    assert torch.equal(logits(model), logits(text_model()))
    give_adapters_weight(model, seed=1)
    alone = text_model()
    alone = get_mole_model(alone, model.peft_config["other"], adapter_name="other").eval()
    alone.load_state_dict(
        {name: value for name, value in model.state_dict().items() if ".default." not in name}, strict=False
    )
    assert torch.equal(logits(model), logits(alone))
    give_adapters_weight(model)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert not any(".other." in name for name in model.state_dict())
    assert model(**tiny_batch()).balance_loss is not None


def test_what_is_active_after_a_deletion_is_so_everywhere():
    model = adapted()
    model.add_adapter("first", mole_config(num_experts=1))
    model.add_adapter("second", mole_config(num_experts=2))
    give_adapters_weight(model)
    model.set_adapter("first")
    expected = logits(model)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Setting active adapter to first"):
        model.delete_adapter("default")
    assert model.active_adapters == ["first"]
    assert torch.equal(logits(model), expected)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name in adapter_parameters(model) if ".first." in name} != set()


class TestUnloading:
    @pytest.mark.parametrize("name", ["llama", "phi", "moe_llava"])
    def test_unloading_restores_the_model(self, name):
        base = model_of(name)
        classes = [type(module) for module in base.modules()]
        state = copy.deepcopy(base.state_dict())
        mlp = base.get_decoder().layers[0].mlp
        unloaded = adapted(base).unload()
        assert unloaded is base
        assert [type(module) for module in base.modules()] == classes
        assert base.get_decoder().layers[0].mlp is mlp
        assert list(base.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in base.state_dict().items())
        assert not base._forward_hooks and not base._forward_pre_hooks
        assert not hasattr(base, "peft_config")

    def test_layers_that_were_changed_meanwhile_stay_changed(self):
        model = adapted()
        other = torch.nn.Linear(32, 48, bias=False)
        model.base_model.model.model.layers[0].mlp.up_proj.base_layer = other
        model.double().train()
        base = model.unload()
        assert base.model.layers[0].mlp.up_proj is other
        assert base.model.layers[0].mlp.gate_proj.weight.dtype == torch.float64
        assert all(module.training for module in base.modules())

    def test_a_model_that_does_not_train_still_does_not(self):
        base = get_mole_model(text_model(), mole_config()).unload()
        assert not any(module.training for module in base.modules())

    def test_several_experts_do_not_merge(self):
        model = adapted()
        before = copy.deepcopy(model.state_dict())
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(ValueError, match="cannot be merged: which of its 3 experts"):
                merge()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        with pytest.raises(ValueError, match="3 experts"):
            model.base_model.model.model.layers[0].mlp.up_proj.merge()
        with pytest.raises(ValueError, match="3 experts"):
            model.base_model.model.model.layers[0].mlp.mole_router.merge()

    def test_one_expert_merges(self):
        model = adapted(num_experts=1)
        expected = logits(model)
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
        assert not torch.equal(
            model.base_model.model.model.layers[0].mlp.up_proj.weight, text_model().model.layers[0].mlp.up_proj.weight
        )
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
        merged = model.merge_and_unload()
        assert type(merged.model.layers[0].mlp).__name__ == "LlamaMLP"
        torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)

    def test_a_broken_adapter_is_not_merged_safely(self):
        model = adapted(num_experts=1)
        next(iter(adapter_parameters(model).values())).data.fill_(float("nan"))
        with pytest.raises(ValueError, match="would not be finite"):
            model.merge_adapter(safe_merge=True)

    def test_a_merged_adapter_is_disabled_too(self):
        model = adapted(num_experts=1)
        model.merge_adapter()
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), logits(text_model()), rtol=0, atol=1e-5)


class TestFiles:
    @pytest.mark.parametrize("name", ["llama", "phi", "llava_uhd"])
    def test_an_adapter_is_saved_alone_and_loaded_equal(self, name, tmp_path):
        model = adapted(model_of(name))
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert len(saved) == len(adapter_parameters(model)) and all("mole_" in key for key in saved)
        for trainable in (False, True):
            loaded = PeftModel.from_pretrained(model_of(name), tmp_path, is_trainable=trainable).eval()
            assert torch.equal(logits(loaded), logits(model))
            assert {p.requires_grad for p in adapter_parameters(loaded).values()} == {trainable}
        loaded.load_adapter(tmp_path, "second")
        loaded.set_adapter("second")
        assert torch.equal(logits(loaded), logits(model))

    def test_modules_to_save_are_saved(self, tmp_path):
        model = adapted(model_of("llava_uhd"), modules_to_save=["resampler"])
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        resampler = {name for name in trainable if "mole_" not in name}
        assert resampler and all(".resampler.modules_to_save.default." in name for name in resampler)
        for name in resampler:
            torch.nn.init.normal_(model.get_parameter(name))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(model_of("llava_uhd"), tmp_path)
        assert all(torch.equal(loaded.get_parameter(name), model.get_parameter(name)) for name in trainable)

    def test_auto_class_finds_the_base_model(self, tmp_path):
        text_model().save_pretrained(tmp_path / "base")
        base = type(text_model()).from_pretrained(tmp_path / "base")
        model = adapted(base)
        model.save_pretrained(tmp_path / "adapter")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert torch.equal(logits(loaded), logits(model))

    def test_loading_without_memory_for_a_second_copy(self, tmp_path):
        model = adapted()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(text_model(), tmp_path, low_cpu_mem_usage=True).eval()
        assert not any(parameter.is_meta for parameter in loaded.parameters())
        assert torch.equal(logits(loaded), logits(model))

    @pytest.mark.slow
    def test_transformers_own_adapters(self, tmp_path):
        model = adapted()
        model.save_pretrained(tmp_path)
        base = text_model()
        base.load_adapter(str(tmp_path), adapter_name="loaded")
        assert torch.equal(logits(base), logits(model))
        base.add_adapter(mole_config(num_experts=2), adapter_name="added")
        assert len(base._forward_hooks) == 1
        assert torch.equal(logits(base), logits(text_model()))
        outputs = base.train()(**tiny_batch())
        assert outputs.balance_loss is not None
        torch.testing.assert_close(outputs.loss, text_model()(**tiny_batch()).loss + 0.01 * outputs.balance_loss)
        base.eval().disable_adapters()
        assert torch.equal(logits(base), logits(text_model()))
        base.enable_adapters()
        base.set_adapter("loaded")
        assert torch.equal(logits(base), logits(model))
        base.delete_adapter("added")
        assert not any(".added." in name for name in base.get_adapter_state_dict("loaded"))
        base.delete_adapter("loaded")
        assert torch.equal(logits(base), logits(text_model()))
        assert getattr(base.train()(**tiny_batch()), "balance_loss", None) is None

    def test_injection_by_names_of_a_file(self, tmp_path):
        model = adapted(target_modules=["up_proj"], attention_target_modules=["q_proj"])
        state = {
            name.removeprefix("base_model.model."): value for name, value in get_peft_model_state_dict(model).items()
        }
        base = inject_adapter_in_model(
            mole_config(target_modules=["up_proj"], attention_target_modules=["q_proj"]),
            text_model(),
            state_dict=state,
        )
        assert set(get_peft_model_state_dict(base)) == set(state)


def test_half_precision_adapters_are_float32_unless_told_otherwise():
    for autocast, expected in ((True, torch.float32), (False, torch.bfloat16)):
        base = text_model().to(torch.bfloat16)
        reference = logits(base)
        model = get_mole_model(base, mole_config(), autocast_adapter_dtype=autocast).eval()
        assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {expected}
        assert torch.equal(logits(model), reference)
        assert logits(give_adapters_weight(model)).dtype == torch.bfloat16
        assert (logits(model).float() - logits(adapted()).float()).abs().mean() < 0.15


def test_copies_are_independent():
    model = adapted()
    expected = logits(model)
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    for parameter in adapter_parameters(model).values():
        parameter.data.zero_()
    for other in (copied, pickled):
        assert torch.equal(logits(other), expected)
        assert other(**tiny_batch()).balance_loss is not None
        base = other.unload()
        assert torch.equal(logits(base), logits(text_model()))
        assert not base._forward_hooks
    assert isinstance(model.base_model.model.model.layers[0].mlp, MoleTunerMLP)


def test_threads_do_not_see_each_others_tokens():
    model = adapted().train()
    ours, theirs = tiny_batch(), tiny_batch(num_rows=3, length=8, seed=1)
    expected = [model(**batch).balance_loss.item() for batch in (ours, theirs)]
    found = []

    def work():
        found.append(model(**theirs).balance_loss.item())

    def run_another_forward(module, args, output):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

    # in the midst of ours, after the first layer has recorded
    model.base_model.model.model.layers[0].register_forward_hook(run_another_forward)
    outputs = model(**ours)
    assert outputs.balance_loss.item() == pytest.approx(expected[0], abs=1e-6)
    assert found == pytest.approx([expected[1]], abs=1e-6)


def test_generation_continues_with_a_cache():
    model = adapted(routing="dense")
    prompt = IDS[:1, :5]
    cached = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
    plain = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain) and cached.shape[1] > 5


def test_the_configuration_is_not_changed_by_a_model():
    config = mole_config()
    get_mole_model(text_model("llama"), config)
    assert config.target_modules is None
    assert any("fc1" in name for name in adapter_parameters(get_mole_model(text_model("phi"), config)))


def test_defaults_are_the_papers():
    config = MoleConfig()
    assert (config.r, config.lora_alpha, config.num_experts, config.routing) == (16, 32, 3, "top1")
    assert (config.lora_dropout, config.balance_loss_coef, config.balance_loss) == (0.05, 0.01, "pooled")
