"""Upcycled models against their dense sources, which they must equal until they are trained."""

import copy

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    SiglipVisionConfig,
    StableLmConfig,
)

from llava_family.llava_uhd.configuration_llava_uhd import LlavaUhdConfig
from llava_family.llava_uhd.modeling_llava_uhd import LlavaUhdForConditionalGeneration
from llava_family.moe_llava.configuration_moe_llava import MoeLlavaConfig, MoeLlavaPhiConfig, MoeLlavaQwen2Config
from llava_family.moe_llava.modeling_moe_llava import MoeLlavaForCausalLM
from llava_family.training import freeze_for_moe_tuning, upcycle


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
BACKBONES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "phi": PhiConfig,
    "stablelm": StableLmConfig,
}
TOWERS = {"clip": (CLIPVisionConfig, 16), "siglip": (SiglipVisionConfig, 15)}


def randomize(model):
    """Weights large enough that a wrong feed-forward network shows in the logits."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim > 1 else 1)
    return model.eval()


def make_llava(backbone="llama", tower="clip", **kwargs):
    vision_class, _ = TOWERS[tower]
    # the placeholder is an entry of the vocabulary, as in LLaVA-1.5
    kwargs = {"image_token_index": 90, "text_config": BACKBONES[backbone](**TEXT), **kwargs}
    return randomize(LlavaForConditionalGeneration(LlavaConfig(vision_config=vision_class(**VISION), **kwargs)))


def make_dense_stage_2(text_class=MoeLlavaPhiConfig, **kwargs):
    text_config = text_class(**{**TEXT, "moe_layers": [], **kwargs})
    return randomize(
        MoeLlavaForCausalLM(MoeLlavaConfig(text_config=text_config, vision_config=CLIPVisionConfig(**VISION)))
    )


def make_llava_uhd(**kwargs):
    config = LlavaUhdConfig(text_config={"model_type": "llama", **TEXT}, vision_config=VISION, num_queries=4, **kwargs)
    return randomize(LlavaUhdForConditionalGeneration(config))


def square_inputs(model, num_features=16):
    image = [model.config.image_token_id] * num_features
    return {
        "input_ids": torch.tensor([[1, *image, 5, 6, 7]]),
        "pixel_values": torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1)),
    }


def sliced_inputs(model):
    view = [model.config.image_token_id] * 4
    return {
        "input_ids": torch.tensor([[1, *view, 3, *view, 4, *view, 5, 6]]),
        "pixel_values": torch.randn(3 * 16, 3 * 14 * 14, generator=torch.Generator().manual_seed(1)),
        "image_grids": torch.tensor([[[1, 2], [4, 4], [4, 4]]]),
    }


def assert_equal_to_dense(dense, inputs, **kwargs):
    with torch.no_grad():
        expected = dense(**inputs).logits
        sparse = upcycle(dense, **kwargs)
        outputs = sparse(**inputs, output_router_logits=True)
        experts = {
            layer: sparse.model.language_model.layers[layer].mlp for layer in sparse.config.text_config.moe_layers
        }
    torch.testing.assert_close(outputs.logits, expected, rtol=0, atol=1e-5)
    assert len(outputs.router_logits) == len(experts) > 0
    for layer, block in experts.items():
        for parameter in block.experts.parameters():
            assert torch.equal(parameter, parameter[:1].expand_as(parameter)), layer
        bound = 32**-0.5
        assert 0.5 * bound < block.gate.weight.abs().max() <= bound  # the original's nn.Linear
    return sparse


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_in_tree_llava(backbone, tower):
    dense = make_llava(backbone, tower)
    sparse = assert_equal_to_dense(dense, square_inputs(dense, TOWERS[tower][1]))
    assert type(sparse.config.text_config).__name__.lower() == f"moellava{backbone}config"
    assert sparse.config.text_config.moe_layers == [0, 2]
    assert (sparse.config.image_token_id, sparse.config.vision_encoding) == (90, "square")
    assert not sparse.training


@pytest.mark.parametrize("text_class", [MoeLlavaPhiConfig, MoeLlavaQwen2Config])
def test_dense_second_stage(text_class):
    dense = make_dense_stage_2(text_class)
    sparse = assert_equal_to_dense(dense, square_inputs(dense), num_experts=3, moe_layers="dense")
    assert sparse.config.text_config.moe_layers == [0, 1, 2, 3]
    assert sparse.config.image_token_id == 99  # outside of the vocabulary, as in the source


@pytest.mark.parametrize("resampler_type", ["spatial", "perceiver"])
def test_llava_uhd(resampler_type):
    dense = make_llava_uhd(resampler_type=resampler_type)
    sparse = assert_equal_to_dense(dense, sliced_inputs(dense))
    assert (sparse.config.vision_encoding, sparse.config.resampler_type) == ("slices", resampler_type)
    assert sparse.config.num_queries == 4


@pytest.mark.parametrize(
    ("config", "num_features"),
    [
        ({"multimodal_projector_bias": False}, 16),
        ({"vision_feature_select_strategy": "full"}, 17),
        ({"vision_feature_layer": 1}, 16),
        ({"projector_hidden_act": "relu"}, 16),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_llava_options(config, num_features):
    dense = make_llava(**config)
    sparse = assert_equal_to_dense(dense, square_inputs(dense, num_features))
    assert sparse.model.multi_modal_projector.linear_1.bias is not None


@pytest.mark.parametrize("make", [make_llava, make_dense_stage_2])
def test_residual_experts_begin_as_the_dense_model_too(make):
    dense = make("phi") if make is make_llava else make()
    sparse = assert_equal_to_dense(dense, square_inputs(dense), use_residual=True, capacity_factor=1.5)
    assert sparse.config.text_config.capacity_factor == 1.5
    mlp = sparse.model.language_model.layers[2].mlp
    assert torch.equal(mlp.residual_mlp.fc1.weight, mlp.experts.up_proj[3])


def test_one_expert_per_token_is_weighted_and_changes_the_outputs():
    dense = make_llava()
    inputs = square_inputs(dense)
    with torch.no_grad():
        assert not torch.allclose(upcycle(dense, top_k=1)(**inputs).logits, dense(**inputs).logits, atol=1e-2)


def test_nothing_but_experts_takes_memory():
    dense = make_llava("qwen2", text_config=Qwen2Config(**TEXT, tie_word_embeddings=True))
    own = {parameter.data_ptr(): name for name, parameter in dense.named_parameters()}
    sparse = upcycle(dense)
    new = [name for name, parameter in sparse.named_parameters() if parameter.data_ptr() not in own]
    assert new == [
        f"model.language_model.layers.{layer}.mlp.{name}"
        for layer in (0, 2)
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    ]
    assert sparse.lm_head.weight is sparse.model.language_model.embed_tokens.weight
    assert sparse.config.tie_word_embeddings
    assert all(parameter.requires_grad for parameter in sparse.parameters())


def test_saves_generates_and_trains(tmp_path):
    dense = make_llava().to(torch.bfloat16)
    dense.generation_config.max_new_tokens = 3
    sparse = upcycle(dense)
    assert {parameter.dtype for parameter in sparse.parameters()} == {torch.bfloat16} == {sparse.config.dtype}
    inputs = square_inputs(sparse)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    assert sparse.generate(**inputs, do_sample=False).shape == (1, 23)
    sparse(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert sparse.model.language_model.layers[0].mlp.gate.weight.grad.abs().max() > 0

    sparse.save_pretrained(tmp_path, save_original_format=False)
    again = MoeLlavaForCausalLM.from_pretrained(tmp_path)
    expected = sparse.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_attention_implementation_is_kept():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=90
    )
    dense = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
    sparse = upcycle(dense)
    assert sparse.config.text_config._attn_implementation == "eager"
    assert sparse.config.vision_config._attn_implementation == "eager"
    sparse.set_attn_implementation("sdpa")
    assert sparse.model.language_model.layers[0].self_attn.config._attn_implementation == "sdpa"


def test_source_is_left_unchanged():
    dense = make_dense_stage_2()
    config, weights = copy.deepcopy(dense.config.to_dict()), copy.deepcopy(dense.state_dict())
    upcycle(dense)
    assert dense.config.to_dict() == config
    assert all(torch.equal(value, weights[name]) for name, value in dense.state_dict().items())


def test_refuses_what_has_no_sparse_counterpart():
    with pytest.raises(ValueError, match="'gemma'"):
        upcycle(make_llava(text_config=GemmaConfig(**TEXT)))
    with pytest.raises(ValueError, match="layers \\[0, 2\\]"):
        upcycle(upcycle(make_dense_stage_2()))
    with pytest.raises(ValueError, match="mlp_bias"):
        upcycle(make_llava(text_config=LlamaConfig(**TEXT, mlp_bias=True)))
    with pytest.raises(ValueError, match="vision_feature_layer"):
        upcycle(make_llava(vision_feature_layer=[1, 2]))
    with pytest.raises(TypeError, match="Linear"):
        upcycle(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="capacity"):
        upcycle(make_llava(), capacity=2)
    with pytest.raises(ValueError, match="0..3"):
        upcycle(make_llava(), moe_layers=[4])
    with pytest.raises(ValueError, match="must be in memory"):
        upcycle(make_llava().to("meta"))


DENSE_FFN = {"phi": ("fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight")}
GATED_FFN = ("down_proj.weight", "gate_proj.weight", "up_proj.weight")
EXPERTS = {"phi": ("down_proj", "down_proj_bias", "up_proj", "up_proj_bias")}
GATED_EXPERTS = ("down_proj", "gate_up_proj")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_third_stage_trains_networks_routers_and_projector(backbone):
    model = upcycle(make_llava(backbone))
    expected = {
        f"model.multi_modal_projector.linear_{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")
    }
    for layer in range(4):
        prefix = f"model.language_model.layers.{layer}.mlp."
        if layer % 2:
            expected |= {prefix + name for name in DENSE_FFN.get(backbone, GATED_FFN)}
        else:
            expected |= {f"{prefix}experts.{name}" for name in EXPERTS.get(backbone, GATED_EXPERTS)}
            expected.add(f"{prefix}gate.weight")
    assert set(freeze_for_moe_tuning(model)) == expected
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected


def test_third_stage_trains_the_resampler_and_residual_networks():
    names = freeze_for_moe_tuning(upcycle(make_llava_uhd(), use_residual=True, moe_layers=[1]))
    assert "model.resampler.query" in names and "model.language_model.layers.1.mlp.coefficient.bias" in names
    assert {name.split(".")[1] for name in names} == {"resampler", "language_model"}
    assert all(".mlp." in name for name in names if "language_model" in name)
