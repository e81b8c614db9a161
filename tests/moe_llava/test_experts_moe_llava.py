"""The experts' kernels agree, are the ones that were asked for, and no token sees another."""

import copy
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llava_family import (
    MoeLlavaConfig,
    MoeLlavaForCausalLM,
    MoeLlavaPhiConfig,
    MoeLlavaQwen2Config,
    MoeLlavaStableLmConfig,
)
from llava_family.moe_llava.modeling_moe_llava import (
    TEXT_MODELS,
    MoeLlavaExperts,
    MoeLlavaPhiExperts,
    MoeLlavaRouter,
    MoeLlavaSparseMoeBlock,
    balance_loss,
    route_tokens,
)


BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "moe_layer.py"
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
EXPERTS = {"gated": (MoeLlavaExperts, MoeLlavaQwen2Config), "phi": (MoeLlavaPhiExperts, MoeLlavaPhiConfig)}
TEXT_CONFIGS = {"phi": MoeLlavaPhiConfig, "stablelm": MoeLlavaStableLmConfig, "qwen2": MoeLlavaQwen2Config}


def random_experts(kind, num_experts, hidden_size, intermediate_size, num_experts_per_tok=2, dtype=torch.float32):
    experts_class, config_class = EXPERTS[kind]
    config = config_class(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
    )
    experts = experts_class(config)
    for parameter in experts.parameters():
        # Outputs of order 1, whatever the sizes
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim == 3 else 1.0)
    return experts.to(dtype)


def random_tokens(num_tokens, num_experts, hidden_size, num_experts_per_tok, routing, dtype=torch.float32):
    logits = torch.randn(num_tokens, num_experts)
    if routing == "one expert":
        logits[:, torch.randint(num_experts, ())] += 100
    elif routing == "empty experts":
        # Only the first and the last are ever chosen.
        logits[:, 1:-1] -= 100
    index, weights = route_tokens(logits, num_experts_per_tok)
    return torch.randn(num_tokens, hidden_size).to(dtype), index, weights.to(dtype)


def run(experts, implementation, *inputs):
    experts.config._experts_implementation = implementation
    return experts(*inputs)


def random_shape(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    num_tokens = 1 if seed % 5 == 0 else draw(2, 70)
    routing = ("random", "one expert", "empty experts")[seed % 3]
    num_experts = draw(2, 8)
    # A multiple of four: grouped_mm wants rows of 16 bytes, as any real model has them.
    return num_tokens, num_experts, 4 * draw(1, 32), 4 * draw(1, 48), draw(1, 2), routing


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("seed", range(100))
def test_implementations_agree(kind, seed):
    num_tokens, num_experts, hidden_size, intermediate_size, num_experts_per_tok, routing = random_shape(seed)
    torch.manual_seed(seed)
    experts = random_experts(kind, num_experts, hidden_size, intermediate_size, num_experts_per_tok)
    hidden_states, index, weights = random_tokens(num_tokens, num_experts, hidden_size, num_experts_per_tok, routing)
    if routing == "one expert":
        assert len(index[:, 0].unique()) == 1
    elif routing == "empty experts":
        assert set(index.unique().tolist()) <= {0, num_experts - 1}
    upstream = torch.randn_like(hidden_states)
    results = {}
    for implementation in IMPLEMENTATIONS:
        leaves = [hidden_states.clone().requires_grad_(), weights.clone().requires_grad_()]
        experts.zero_grad()
        output = run(experts, implementation, leaves[0], index, leaves[1])
        output.backward(upstream)
        gradients = [leaf.grad for leaf in leaves] + [parameter.grad.clone() for parameter in experts.parameters()]
        results[implementation] = [output.detach(), *gradients]
    for implementation in IMPLEMENTATIONS[1:]:
        for actual, expected in zip(results[implementation], results["eager"], strict=True):
            # Gradients of weights are sums over all tokens: those are 1e-5 of their size.
            torch.testing.assert_close(actual, expected, atol=1e-5 * max(1, expected.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", EXPERTS)
def test_eager_is_the_formula(kind):
    torch.manual_seed(0)
    experts = random_experts(kind, 4, 12, 20)
    hidden_states, index, weights = random_tokens(9, 4, 12, 2, "random")
    expected = torch.zeros_like(hidden_states)
    for token in range(9):
        for choice in range(2):
            expert = index[token, choice]
            if kind == "phi":
                inner = experts.act_fn(experts.up_proj[expert] @ hidden_states[token] + experts.up_proj_bias[expert])
                output = experts.down_proj[expert] @ inner + experts.down_proj_bias[expert]
            else:
                gate, up = (experts.gate_up_proj[expert] @ hidden_states[token]).split(20)
                output = experts.down_proj[expert] @ (experts.act_fn(gate) * up)
            expected[token] += weights[token, choice] * output
    torch.testing.assert_close(run(experts, "eager", hidden_states, index, weights), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", EXPERTS)
def test_large_activations_in_half_precision(kind, implementation, dtype):
    """A block with its router, on activations 64 times as large as usual: finite, and as in float32."""
    torch.manual_seed(0)
    experts_class, config_class = EXPERTS[kind]
    config = config_class(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1)
    block = MoeLlavaSparseMoeBlock(config, experts_class, None)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    block = block.to(dtype).eval()
    hidden_states = 64 * torch.randn(2, 33, 64).to(dtype)
    config._experts_implementation = implementation
    with torch.no_grad():
        output = block(hidden_states)
        config._experts_implementation = "eager"
        expected = copy.deepcopy(block).float()(hidden_states.float())
    assert output.dtype == dtype and output.isfinite().all()
    # The router is in float32 in both, so the experts chosen are the same.
    torch.testing.assert_close(output.float(), expected, atol=0.02 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_router_is_in_float32(dtype):
    torch.manual_seed(0)
    router = MoeLlavaRouter(MoeLlavaPhiConfig(hidden_size=256, num_hidden_layers=2, num_attention_heads=1))
    torch.nn.init.normal_(router.weight)
    hidden_states = torch.randn(50, 256).to(dtype)
    logits = router.to(dtype)(hidden_states)
    assert logits.dtype == torch.float32
    expected = hidden_states.double() @ router.weight.double().T
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_balance_loss_of_many_tokens_in_half_precision(dtype):
    """A sum over 64k tokens is more than float16 holds (65504); all tokens on one expert is the largest loss."""
    num_tokens = 65536 + 1
    even = torch.zeros(num_tokens - 1, 4).to(dtype)
    even[torch.arange(num_tokens - 1), torch.arange(num_tokens - 1) % 4] = 20
    assert balance_loss((even, even)).item() == pytest.approx(2.0, abs=1e-4)
    uneven = (torch.randn(num_tokens, 4) + torch.arange(4)).to(dtype)
    probabilities = uneven.double().softmax(dim=-1)
    share = torch.nn.functional.one_hot(probabilities.argmax(dim=-1), 4).double().mean(dim=0)
    expected = 4 * (share * probabilities.mean(dim=0)).sum().item()
    assert balance_loss((uneven,)).item() == pytest.approx(expected, abs=1e-5)
    one = torch.tensor([60.0, 0, 0, 0]).to(dtype).expand(num_tokens, 4)
    mask = torch.ones(1, num_tokens, dtype=torch.int64)
    for loss in (balance_loss((one,)), balance_loss((one,), mask), balance_loss((one,), mask.to(dtype))):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(4.0, abs=1e-3)


def tiny_model(backbone="phi", seed=0, **text_options):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "initializer_range": 0.2,
    }
    text_config = TEXT_CONFIGS[backbone](**{**sizes, **text_options})
    vision_config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = MoeLlavaConfig(text_config=text_config, vision_config=vision_config)
    return MoeLlavaForCausalLM(config).eval()


def tiny_batch(model, rows=3):
    """Every row has an image (four features) and as many words, so there is no padding."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(99, (rows, 7), generator=generator)
    image = torch.full((rows, 4), model.config.image_token_id)
    pixel_values = torch.randn(rows, 3, 28, 28, generator=generator)
    return {"input_ids": torch.cat([words[:, :2], image, words[:, 2:]], dim=1), "pixel_values": pixel_values}


@pytest.fixture
def calls(monkeypatch):
    """How often each of transformers' implementations was called."""
    counts = dict.fromkeys(IMPLEMENTATIONS[1:], 0)
    for name in counts:

        def counted(*args, _name=name, _function=ALL_EXPERTS_FUNCTIONS[name], **kwargs):
            counts[_name] += 1
            return _function(*args, **kwargs)

        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, name, counted)
    return counts


@pytest.mark.parametrize("backbone", TEXT_CONFIGS)
def test_default_implementation_is_grouped_mm(calls, backbone):
    model = tiny_model(backbone)
    assert model.config._experts_implementation == "grouped_mm"
    assert model.config.text_config._experts_implementation == "grouped_mm"
    model(**tiny_batch(model))
    assert calls == {"batched_mm": 0, "grouped_mm": len(model.config.text_config.moe_layers)}


@pytest.mark.parametrize("backbone", TEXT_CONFIGS)
def test_set_experts_implementation(calls, backbone):
    model = tiny_model(backbone)
    batch, logits = tiny_batch(model), {}
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        before = dict(calls)
        with torch.no_grad():
            logits[implementation] = model(**batch).logits
        used = {name for name in calls if calls[name] > before[name]}
        assert used == {implementation} - {"eager"}
        torch.testing.assert_close(logits[implementation], logits["eager"], atol=1e-5, rtol=0)
    assert logits["eager"].std() > 0.1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_from_pretrained_takes_an_implementation(calls, tmp_path, implementation):
    tiny_model().save_pretrained(tmp_path)
    model = MoeLlavaForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
    model(**tiny_batch(model))
    assert {name for name, count in calls.items() if count} == {implementation} - {"eager"}


@pytest.mark.parametrize("model_type", TEXT_MODELS)
def test_dense_models_do_not_answer_for_sparse_ones(model_type):
    for dense in TEXT_MODELS[model_type].__mro__[1:]:
        if dense.__module__.startswith("transformers.models."):
            dense._can_set_experts_implementation()
    assert TEXT_MODELS[model_type]._can_set_experts_implementation()


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="nonsense"):
        tiny_model().set_experts_implementation("nonsense")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("backbone", TEXT_CONFIGS)
def test_batch_is_its_rows(backbone, implementation):
    """A batch of three equals its rows alone, and permuting it permutes the outputs."""
    model = tiny_model(backbone)
    model.set_experts_implementation(implementation)
    batch = tiny_batch(model)
    with torch.no_grad():
        outputs = model(**batch, output_router_logits=True)
        chosen = torch.cat([logits.topk(2).indices.flatten() for logits in outputs.router_logits])
        assert len(chosen.unique()) == 4
        for row in range(3):
            alone = model(**{name: value[row : row + 1] for name, value in batch.items()}).logits[0]
            torch.testing.assert_close(outputs.logits[row], alone, atol=1e-5, rtol=0)
            assert not torch.allclose(alone, outputs.logits[row - 1], atol=1e-3)
        order = torch.tensor([2, 0, 1])
        permuted = model(**{name: value[order] for name, value in batch.items()}).logits
    torch.testing.assert_close(permuted, outputs.logits[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_changes_nothing(implementation):
    model = tiny_model("stablelm")
    model.set_experts_implementation(implementation)
    input_ids = torch.randint(99, (1, 9), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), input_ids], dim=1)
    mask = (torch.arange(14) >= 5).long()[None]
    with torch.no_grad():
        expected = model(input_ids=input_ids).logits
        actual = model(input_ids=padded, attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def benchmark():
    return runpy.run_path(str(BENCHMARK))


@pytest.mark.parametrize("num_tokens", [1, 2, 64])
def test_benchmark_compares_equal_modules(benchmark, num_tokens):
    """Not how fast they are, but that in-tree Mixtral's block and DeepSpeed's dispatch compute what ours does."""
    modules = benchmark["build_modules"](**benchmark["QUICK_SIZE"])
    hidden_states = benchmark["random_tokens"](num_tokens, benchmark["QUICK_SIZE"]["hidden_size"])
    with torch.no_grad():
        outputs = {name: module(hidden_states) for name, module in modules.items()}
    assert set(outputs) == {"ours", "Mixtral", "dense", "one-hot dispatch"}
    for name in ("Mixtral", "one-hot dispatch"):
        torch.testing.assert_close(outputs[name], outputs["ours"], atol=1e-5, rtol=0)
    # The dense network is the first expert.
    experts = modules["ours"].experts
    index = torch.zeros(num_tokens, 1, dtype=torch.long)
    first = experts(hidden_states[0], index, torch.ones(num_tokens, 1))
    torch.testing.assert_close(outputs["dense"][0], first, atol=1e-5, rtol=0)


def test_benchmark_measures_grouped_mm_in_both(benchmark, calls):
    modules = benchmark["build_modules"](**benchmark["QUICK_SIZE"])
    for name in ("ours", "Mixtral"):
        calls["grouped_mm"] = 0
        modules[name](benchmark["random_tokens"](3, benchmark["QUICK_SIZE"]["hidden_size"]))
        assert calls == {"batched_mm": 0, "grouped_mm": 1}


@pytest.mark.slow
def test_benchmark_runs():
    command = [sys.executable, str(BENCHMARK), "--quick", "--rounds", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "one-hot dispatch" in result.stdout and "too small to check claims" in result.stdout
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True, timeout=120)
    records = json.loads(result.stdout)
    assert len(records) == 6
    assert all(record["ratio"] > 0 and record["seconds"] > 0 for record in records)
