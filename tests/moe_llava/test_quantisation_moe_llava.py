"""torchao's int8 weights, packed experts included: what docs/quantisation.md says of size, kernels and drift."""

from pathlib import Path

import pytest
import torch

from llava_family import MoeLlavaForCausalLM

from .test_experts_moe_llava import TEXT_CONFIGS, tiny_batch, tiny_model


pytest.importorskip("torchao")

from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from transformers import TorchAoConfig


DOCUMENT = Path(__file__).parents[2] / "docs" / "quantisation.md"
PACKED_EXPERTS = r"re:.*\.experts\.(gate_up_proj|up_proj|down_proj)"
LINEAR_LAYERS = r"re:.*(_proj|dense|fc1|fc2|linear_1|linear_2|lm_head)\.weight"


def int8_config():
    rules = {PACKED_EXPERTS: Int8WeightOnlyConfig(), LINEAR_LAYERS: Int8WeightOnlyConfig()}
    # Transformers would leave `lm_head` out.
    return TorchAoConfig(FqnToConfig(rules), modules_to_not_convert=[])


def stored_bytes(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load(folder, **kwargs):
    return MoeLlavaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kwargs).eval()


def logits_of(model):
    batch = tiny_batch(model)
    with torch.no_grad():
        return model(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()}).logits.float()


@pytest.fixture(params=TEXT_CONFIGS)
def folder(request, tmp_path):
    """A model in bfloat16 whose experts are, as in the releases, most of it."""
    model = tiny_model(request.param, hidden_size=128, intermediate_size=512, initializer_range=0.05)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    return tmp_path / "bfloat16"


@pytest.mark.slow
def test_int8_weights_with_packed_experts(folder, record_property):
    original = load(folder)
    model = load(folder, quantization_config=int8_config(), experts_implementation="eager")

    quantised = {name for name, parameter in model.named_parameters() if hasattr(parameter, "qdata")}
    matrices = {name for name, parameter in original.named_parameters() if parameter.ndim > 1}
    kept = {
        name.partition("language_model.")[2] or name.partition("vision_tower.")[2] for name in matrices - quantised
    }
    biases = {name for name in kept if name.endswith("_proj_bias")}
    assert quantised < matrices
    assert kept - biases == {
        "embed_tokens.weight",
        "layers.0.mlp.gate.weight",
        "layers.2.mlp.gate.weight",
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
    }
    experts = model.model.language_model.layers[0].mlp.experts
    assert experts.down_proj.qdata.dtype == torch.int8
    assert experts.down_proj.scale.shape == (4, 128, 1)  # one for each output of each expert

    expected, actual = logits_of(original), logits_of(model)
    drift = ((actual - expected).norm() / expected.norm()).item()
    record_property("relative logit drift", drift)
    print(f"logit drift of int8: {drift:.2%} of the logits' norm, {(actual - expected).abs().max():.4f} at most")
    assert 0 < drift < 0.1

    model.save_pretrained(folder.parent / "int8")
    ratio = stored_bytes(folder.parent / "int8") / stored_bytes(folder)
    print(f"size of int8: {ratio:.1%} of bfloat16")
    assert ratio < 0.6
    again = load(folder.parent / "int8", experts_implementation="eager")
    torch.testing.assert_close(logits_of(again), actual, atol=0, rtol=0)


def test_plain_config_skips_packed_experts(folder):
    model = load(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    experts = model.model.language_model.layers[0].mlp.experts
    assert type(experts.down_proj.data) is torch.Tensor and experts.down_proj.dtype == torch.bfloat16
    model.save_pretrained(folder.parent / "plain")
    assert stored_bytes(folder.parent / "plain") > 0.75 * stored_bytes(folder)
    # So every implementation works.
    assert model.config._experts_implementation == "grouped_mm"
    assert logits_of(model).isfinite().all()


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_int8_experts_need_the_eager_implementation(folder, implementation):
    """If this no longer raises, docs/quantisation.md can be simpler."""
    model = load(folder, quantization_config=int8_config(), experts_implementation=implementation)
    with pytest.raises(NotImplementedError, match="Int8Tensor"):
        logits_of(model)
    model.set_experts_implementation("eager")
    assert logits_of(model).isfinite().all()


def test_document_has_the_same_rules():
    text = DOCUMENT.read_text("utf-8")
    assert PACKED_EXPERTS in text and LINEAR_LAYERS in text
