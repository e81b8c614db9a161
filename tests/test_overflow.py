"""Half precision with activations 64 times as large: nothing overflows, and what routes and balances is float32.

Activations are scaled by weights, in two ways:

- `"stream"`: embeddings and whatever adds to the hidden states are 64 times as large, and so are the hidden states,
  between the layers of text model and vision tower. Norms see squares of them.
- `"normalised"`: norms are, and so is all that linear layers, attention, experts and routers take in. Attention's
  scores and the products of gated networks are 4096 times as large.

The second one leaves out `eager` attention of some text models in float16, in which transformers' own overflows:
`test_eager_attention_of_transformers_overflows`.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from llava_family import MoeLlavaConfig, MoeLlavaForCausalLM
from llava_family.llava_mole.layers_llava_mole import MoleExperts, MoleRouter
from llava_family.llava_mole.layers_llava_mole import balance_loss as mole_balance_loss
from llava_family.llava_uhd.modeling_llava_uhd import (
    LlavaUhdResampler,
    eager_attention_forward,
    region_sampling_weights,
    sample_regions,
)
from llava_family.moe_llava.modeling_moe_llava import MoeLlavaRouter
from llava_family.moe_llava.modeling_moe_llava import balance_loss as moe_balance_loss

from .families import steady_model
from .training.tiny import TEXT, VISION, VOCABULARY, picture, tiny_processor


SCALE = 64
HALF = (torch.float16, torch.bfloat16)
BACKBONES = ("phi", "stablelm", "qwen2", "llama", "mistral")
EXPERTS = ("eager", "batched_mm", "grouped_mm")
MODELS = ("llava_uhd", "llava_mole", "llava_mole dense", *(f"moe_llava {backbone}" for backbone in BACKBONES))
# In transformers' eager attention, not in its default, "sdpa"
OVERFLOW_EAGERLY = ("llava_mole", "llava_mole dense", "moe_llava phi", "moe_llava stablelm")
# Layers that add to hidden states, and those that start them
WRITERS = ("out_proj", "fc2", "o_proj", "down_proj", "dense", "pre_layrnorm", "embed_tokens", "output_proj")


def build(name):
    """A model, and whether it routes."""
    family, _, kind = name.partition(" ")
    if family == "moe_llava":
        torch.manual_seed(0)
        text = {"model_type": f"moe_llava_{kind}_text", **TEXT, "moe_layers": [0, 1], "use_residual": kind == "llama"}
        vision = {"model_type": "clip_vision_model", **VISION}
        config = MoeLlavaConfig(text_config=text, vision_config=vision, image_token_id=VOCABULARY)
        return MoeLlavaForCausalLM(config).eval()
    model = steady_model(family)
    if kind == "dense":
        for layer in model.model.language_model.layers:
            layer.mlp.routing = "dense"
    return model.requires_grad_(True)


@torch.no_grad()
def scale(model, what):
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        *_, module, kind = [part for part in name.split(".") if part != "mole_experts"]
        if what == "normalised":
            scaled = "norm" in module or module.startswith("ln_")
        else:
            scaled = kind != "weight_A" and (module in WRITERS or kind.startswith("down_proj"))
        if scaled:
            parameter *= SCALE
    return model


def inputs_of(name):
    processor = tiny_processor(name.split()[0])
    text = ["<image>\nwhat is this", "<image> the red"]
    inputs = processor(images=[picture(1), picture(2)], text=text, padding=True, return_tensors="pt")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == VOCABULARY, -100)
    return inputs


def run(model, name):
    routes = {} if name == "llava_uhd" else {"output_router_logits": True}
    return model(**inputs_of(name), output_hidden_states=True, **routes)


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return build(name)


@pytest.fixture(scope="module")
def scaled(model):
    return {what: scale(model, what) for what in ("stream", "normalised")}


@torch.no_grad()
def test_activations_are_scaled(name, model, scaled):
    plain, stream, normalised = (run(each, name).hidden_states for each in (model, *scaled.values()))
    text = inputs_of(name)["input_ids"] != VOCABULARY
    torch.testing.assert_close(stream[0][text], SCALE * plain[0][text])
    assert stream[1].norm() > 0.7 * SCALE * plain[1].norm()  # the square tower's features pass a projector's GELU
    assert normalised[-1].norm() > 0.9 * SCALE * plain[-1].norm()  # what the last norm gives


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("what", "attention"), [("stream", "sdpa"), ("stream", "eager"), ("normalised", "sdpa"), ("normalised", "eager")]
)
def test_nothing_overflows(name, scaled, what, attention, dtype):
    if (what, attention, dtype) == ("normalised", "eager", torch.float16) and name in OVERFLOW_EAGERLY:
        pytest.skip("transformers' eager attention overflows, as another test proves")
    with torch.no_grad():
        exact = run(scaled[what], name)
    half = copy.deepcopy(scaled[what]).to(dtype)
    half.set_attn_implementation(attention)
    for implementation in EXPERTS if name.startswith("moe_llava") else EXPERTS[:1]:
        if name.startswith("moe_llava"):
            half.set_experts_implementation(implementation)
        half.zero_grad()
        outputs = run(half, name)
        outputs.loss.backward()
        for tensor in (outputs.logits, outputs.loss, outputs.image_hidden_states, *outputs.hidden_states):
            assert tensor.isfinite().all()
        for parameter_name, parameter in half.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), parameter_name
        assert outputs.loss.dtype == torch.float32
        assert outputs.loss.item() == pytest.approx(exact.loss.item(), rel=0.1)


class Softmaxes(TorchDispatchMode):
    """Records the dtypes of inputs and outputs of every softmax."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._softmax.default:
            self.dtypes.append((args[0].dtype, output.dtype))
        return output


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("how", ["weights", "autocast"])
@torch.no_grad()
def test_routers_and_balance_losses_are_float32(name, scaled, how, dtype):
    if name == "llava_uhd":
        pytest.skip("has no router")
    half, seen = copy.deepcopy(scaled["normalised"]), []
    half.set_attn_implementation("sdpa")  # whose softmax is within its kernel
    if how == "weights":
        half.to(dtype)
    for module in half.modules():
        if isinstance(module, (MoeLlavaRouter, MoleRouter)):
            module.register_forward_hook(lambda router, args, logits: seen.append((router, args[0], logits)))
    with Softmaxes() as softmaxes, torch.autocast("cpu", dtype, enabled=how == "autocast"):
        outputs = run(half, name)

    for router, hidden_states, logits in seen:
        bias = getattr(router, "bias", None)
        exact = functional.linear(hidden_states.float(), router.weight.float(), None if bias is None else bias.float())
        assert logits.dtype == torch.float32 and torch.equal(logits, exact)
    num_routers = len(seen)
    assert num_routers == 2
    # Of every router, and of the balance loss: of each layer or of all at once
    num_of_loss = num_routers if name.startswith("moe_llava") else 1
    num_of_residual = num_routers * (name == "moe_llava llama")
    assert len(softmaxes.dtypes) == num_routers + num_of_loss + num_of_residual
    assert {output for _, output in softmaxes.dtypes} == {torch.float32}
    if not num_of_residual:
        assert {inputs for inputs, _ in softmaxes.dtypes} == {torch.float32}

    balance_loss = moe_balance_loss if name.startswith("moe_llava") else mole_balance_loss
    assert outputs.aux_loss.dtype == outputs.loss.dtype == torch.float32
    assert torch.equal(outputs.aux_loss, balance_loss(outputs.router_logits, inputs_of(name)["attention_mask"]))


@pytest.mark.parametrize("dtype", HALF)
def test_regions_are_sampled_in_float32(dtype):
    maps = SCALE * torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    expected = sample_regions(maps, (4, 4), 2)
    with torch.autocast("cpu", dtype):
        assert torch.equal(sample_regions(maps, (4, 4), 2), expected)
    half = maps.to(dtype)
    torch.testing.assert_close(sample_regions(half, (4, 4), 2), sample_regions(half.float(), (4, 4), 2).to(dtype))


def test_eager_attention_of_views_scales_before_it_multiplies():
    query = torch.full((1, 1, 3, 64), 40.0, dtype=torch.float16)  # scores of 102400, or 12800 once they are scaled
    output, weights = eager_attention_forward(nn.Module(), query, query, query, None, scaling=1 / 8)
    assert torch.equal(output, query.transpose(1, 2)) and torch.allclose(weights, torch.full_like(weights, 1 / 3))


@pytest.mark.parametrize("routing", ["top1", "gate"])
def test_an_expert_that_was_not_chosen_may_overflow(routing):
    experts = MoleExperts(8, 8, num_experts=2, r=4, lora_alpha=8)
    with torch.no_grad():
        nn.init.ones_(experts.weight_B)
        nn.init.ones_(experts.weight_A[0])
        nn.init.constant_(experts.weight_A[1], 100.0)
    experts = experts.half()
    hidden_states = torch.full((1, 8), 100.0, dtype=torch.float16)  # ranks of 800, and of 80000
    weights = torch.tensor([[1.0, 0.0]], requires_grad=routing == "gate")
    output = experts(hidden_states, weights)
    assert torch.equal(output, torch.full_like(output, 4 * 800 * 2))
    output.float().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in experts.parameters())
    assert weights.grad is None or weights.grad.isfinite().all()


@pytest.mark.parametrize("name", OVERFLOW_EAGERLY, scope="function")
@torch.no_grad()
def test_eager_attention_of_transformers_overflows(name):
    """It multiplies queries by keys and then scales: https://github.com/huggingface/transformers/pull/33317, closed.

    `sdpa`, the default, does not.
    """
    model = scale(build(name), "normalised")
    states, outputs = [], {}
    for attention in ("sdpa", "eager"):
        half = copy.deepcopy(model).half()
        half.set_attn_implementation(attention)
        outputs[attention] = run(half, name).logits.isfinite().all().item()
    assert outputs == {"sdpa": True, "eager": False}

    attentions = [layer.self_attn for layer in model.model.language_model.layers]
    for attention in attentions:
        for projection in (attention.q_proj, attention.k_proj):
            projection.register_forward_hook(lambda module, args, output: states.append(output))
    run(model, name)
    products = []
    for attention, query, key in zip(attentions, states[::2], states[1::2], strict=True):
        query, key = (each.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for each in (query, key))
        products.append(query @ key.repeat_interleave(attention.num_key_value_groups, dim=1).transpose(2, 3))
    product = torch.stack(products).abs().max()
    assert product > torch.finfo(torch.float16).max > product * attention.scaling


@pytest.mark.parametrize("dtype", HALF)
@torch.no_grad()
def test_grey_levels_are_normalised_in_float32(name, model, dtype):
    half, inputs, seen = copy.deepcopy(model).to(dtype), inputs_of(name), []
    half.config.image_std = [deviation / SCALE for deviation in half.config.image_std]
    rows, *shape = inputs["pixel_values"].shape
    # All rows are equal, as views are reordered.
    levels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stats = (half.config.image_mean, half.config.image_std)
    mean, deviation = (torch.tensor(stat).double()[:, None] for stat in stats)
    exact = ((levels.view(3, -1) / 255.0 - mean) / deviation).view(shape)
    half.model.vision_tower.register_forward_pre_hook(lambda tower, args: seen.append(args[0]))
    inputs["pixel_values"] = levels.expand(rows, *shape)
    outputs = half(**inputs)
    (normalised,) = seen
    assert normalised.dtype == torch.float32 and exact.abs().max() > SCALE
    torch.testing.assert_close(normalised.double(), exact.expand_as(normalised), atol=1e-4, rtol=1e-5)
    assert outputs.logits.isfinite().all() and outputs.image_hidden_states.isfinite().all()


def test_cached_sampling_weights_are_of_no_mode():
    """What is made under inference mode cannot be trained with, and what is made on another device cannot be read."""
    region_sampling_weights.cache_clear()
    resampler = steady_model("llava_uhd").model.resampler.requires_grad_(True)
    assert isinstance(resampler, LlavaUhdResampler)
    features = torch.randn(16 + 20, 16)
    with torch.inference_mode():
        resampler(features[:16], [(4, 4)])
    with torch.device("meta"):
        region_sampling_weights((5, 4), 2, torch.float32)
    assert region_sampling_weights.cache_info().currsize == 2
    resampler(features, [(4, 4), (5, 4)]).sum().backward()
    assert resampler.kv_proj.weight.grad.isfinite().all()
