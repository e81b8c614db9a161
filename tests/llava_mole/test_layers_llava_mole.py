"""The mixture of LoRA experts by itself: every way to compute it equals the definition, one expert after the other."""

import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from llava_family.llava_mole import layers_llava_mole
from llava_family.llava_mole.layers_llava_mole import (
    MoleExperts,
    MoleLinear,
    MoleRouter,
    balance_loss,
    check_routers_learn,
    group_tokens,
    route_tokens,
)


def random_experts(generator, num_experts, r, in_features, out_features, dtype=torch.float64):
    """Experts that add values of order 1 to the output of a linear layer."""
    experts = MoleExperts(in_features, out_features, num_experts, r, lora_alpha=2 * r).to(dtype)
    nn.init.normal_(experts.weight_A, std=in_features**-0.5, generator=generator)
    nn.init.normal_(experts.weight_B, std=r**-0.5 / 2, generator=generator)
    return experts


def loop_over_experts(experts, hidden_states, weights):
    """The definition: the sum of every expert's output, weighted."""
    total = 0
    for expert in range(experts.num_experts):
        ranks = functional.linear(hidden_states, experts.weight_A[expert])
        output = experts.scaling * functional.linear(ranks, experts.weight_B[expert].T)
        total = total + weights[..., expert, None].to(output.dtype) * output
    return total


def random_case(seed):
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    # Sizes of whole 16 bytes, which grouped products need, and others
    step = draw.choice((1, 4))
    num_experts, r = draw.randint(1, 8), step * draw.randint(1, 8)
    in_features, out_features = step * draw.randint(1, 24), step * draw.randint(1, 24)
    shape = (*draw.choice(((), (draw.randint(1, 3),))), draw.randint(1, 40))
    experts = random_experts(generator, num_experts, r, in_features, out_features, torch.float32)
    hidden_states = torch.randn(*shape, in_features, generator=generator)
    router_logits = torch.randn(*shape, num_experts, generator=generator)
    return experts, hidden_states, router_logits


@pytest.mark.parametrize("routing", ["top1", "dense"])
@pytest.mark.parametrize("scale_by_gate", [False, True])
def test_two_products_equal_a_loop_over_experts(routing, scale_by_gate):
    for seed in range(100):
        experts, hidden_states, router_logits = random_case(seed)
        weights = route_tokens(router_logits, routing, scale_by_gate)
        expected = loop_over_experts(experts, hidden_states, weights)
        torch.testing.assert_close(experts(hidden_states, weights), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scale_by_gate", [False, True])
def test_grouped_products_equal_a_loop_over_experts(scale_by_gate, monkeypatch):
    monkeypatch.setattr(layers_llava_mole, "GROUPED_EXTRA_RANKS", 1)
    monkeypatch.setattr(layers_llava_mole, "GROUPED_TOKENS", 1)
    num_grouped = 0
    for seed in range(200):
        experts, hidden_states, router_logits = random_case(seed)
        if not experts.can_group(hidden_states):
            continue
        num_grouped += 1
        results = []
        for run in ("loop", "grouped"):
            logits, inputs = router_logits.clone().requires_grad_(), hidden_states.clone().requires_grad_()
            weights = route_tokens(logits, "top1", scale_by_gate)
            if run == "loop":
                output = loop_over_experts(experts, inputs, weights)
            else:
                output = experts(inputs, weights, group_tokens(weights))
            tensors = [inputs, *experts.parameters()] + [logits] * scale_by_gate
            results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-6 * max(1.0, expected.abs().max().item()), rtol=1e-6)
    assert num_grouped >= 60


def test_grouped_products_are_chosen_where_they_pay():
    many, few = torch.zeros(256, 64), torch.zeros(255, 64)
    assert MoleExperts(64, 128, 4, 32, 32).can_group(many)
    assert not MoleExperts(64, 128, 4, 32, 32).can_group(few)
    assert not MoleExperts(64, 128, 2, 16, 32).can_group(many)  # two products of 32 ranks cost little
    assert not MoleExperts(64, 128, 1, 512, 32).can_group(many)
    assert not MoleExperts(64, 127, 4, 32, 32).can_group(many)  # rows of no whole 16 bytes


def test_routing():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    probabilities = logits.softmax(dim=-1)
    assert torch.equal(route_tokens(logits, "top1"), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    assert torch.equal(route_tokens(logits, "dense"), probabilities)
    scaled = route_tokens(logits, "top1", scale_by_gate=True)
    assert torch.equal(scaled, torch.tensor([[probabilities[0, 0], 0, 0], [0, 0, probabilities[1, 2]]]))


def test_the_first_of_equal_experts_is_chosen():
    tied = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0]])
    assert route_tokens(tied, "top1").argmax(dim=-1).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("routing", "scale_by_gate", "learns"), [("top1", False, False), ("top1", True, True), ("dense", False, True)]
)
def test_what_the_router_learns_from_the_task(routing, scale_by_gate, learns):
    generator = torch.Generator().manual_seed(0)
    experts = random_experts(generator, 3, 2, 8, 8)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    output = experts(
        torch.randn(5, 8, generator=generator, dtype=torch.float64), route_tokens(logits, routing, scale_by_gate)
    )
    if not learns:
        (gradient,) = torch.autograd.grad(output.sum(), [logits], allow_unused=True)
        assert gradient is None
    else:
        assert torch.autograd.grad(output.sum(), [logits])[0].abs().min() > 0


def test_experts_that_were_not_chosen_have_no_gradient():
    experts = random_experts(torch.Generator().manual_seed(0), 3, 2, 8, 8)
    weights = torch.tensor([[0.0, 1.0, 0.0]]).expand(4, 3)
    experts(torch.randn(4, 8, dtype=torch.float64), weights).sum().backward()
    for parameter in experts.parameters():
        assert (parameter.grad[[0, 2]] == 0).all() and parameter.grad[1].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_b_leaves_the_output_bit_equal(dtype):
    torch.manual_seed(0)
    layer = MoleLinear(32, 48, num_experts=3, r=4, lora_alpha=8).to(dtype)
    nn.init.normal_(layer.mole_experts.weight_A)
    hidden_states = torch.randn(2, 7, 32).to(dtype)
    weights = route_tokens(torch.randn(2, 7, 3), "dense")
    expected = functional.linear(hidden_states, layer.weight, layer.bias)
    assert torch.equal(layer(hidden_states, weights), expected)


@pytest.mark.parametrize("routed", [False, True])
def test_one_expert_equals_peft_lora(routed):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 48))
    layer = MoleLinear(32, 48, num_experts=1, r=4, lora_alpha=6)
    layer.weight.data, layer.bias.data = base[0].weight.data.clone(), base[0].bias.data.clone()
    peft = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["0"]))
    lora = peft.base_model.model[0]
    nn.init.normal_(lora.lora_B["default"].weight)
    layer.mole_experts.weight_A.data = lora.lora_A["default"].weight.data[None].clone()
    layer.mole_experts.weight_B.data = lora.lora_B["default"].weight.data.T[None].clone()
    hidden_states = torch.randn(3, 5, 32)
    weights = route_tokens(torch.randn(3, 5, 1), "top1") if routed else None
    expected, actual = peft(hidden_states), layer(hidden_states, weights)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for ours, theirs in (("weight_A", lora.lora_A), ("weight_B", lora.lora_B)):
        gradient = getattr(layer.mole_experts, ours).grad[0]
        theirs = theirs["default"].weight.grad
        theirs = theirs.T if ours == "weight_B" else theirs
        torch.testing.assert_close(gradient, theirs, atol=1e-6 * theirs.abs().max().item(), rtol=1e-6)


@pytest.mark.slow
def test_dropout_is_of_the_input_and_of_training_alone():
    torch.manual_seed(0)
    experts = MoleExperts(64, 8, 2, 4, 4, lora_dropout=0.5)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    hidden_states, weights = torch.randn(512, 64), torch.tensor([[0.0, 1.0]]).expand(512, 2)
    expected = loop_over_experts(experts, hidden_states, weights)
    assert not torch.allclose(experts(hidden_states, weights), expected, atol=1.0)
    repeated = torch.stack([experts(hidden_states, weights) for _ in range(2000)]).mean(dim=0)
    assert (repeated - expected).norm() < 0.1 * expected.norm()
    torch.testing.assert_close(experts.eval()(hidden_states, weights), expected, atol=1e-4, rtol=1e-4)


def test_router_scores_in_float32():
    torch.manual_seed(0)
    router = MoleRouter(32, 3).bfloat16()
    hidden_states = torch.randn(4, 32).bfloat16()
    logits = router(hidden_states)
    assert logits.dtype == torch.float32
    expected = functional.linear(hidden_states.double(), router.weight.double(), router.bias.double()).float()
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router.float()(hidden_states.float()), logits)


def by_hand(logits, mask, kind):
    """Both balance losses, token by token."""
    probabilities, layers = [layer.double().softmax(-1) for layer in logits], range(len(logits))
    batch, length, num_experts = logits[0].shape
    counted = [(b, s) for b in range(batch) for s in range(length) if mask[b, s]]

    def product(rows):
        mean = sum(rows) / len(rows)
        shares = torch.bincount(torch.stack([row.argmax() for row in rows]), minlength=num_experts) / len(rows)
        return (mean * shares).sum()

    if kind == "pooled":
        samples = [
            [probabilities[layer][b, s] for layer in layers for i, s in counted if i == b] for b in range(batch)
        ]
        return sum(map(product, samples)) / batch
    return sum(num_experts * product([probabilities[layer][b, s] for b, s in counted]) for layer in layers) / len(
        logits
    )


@pytest.mark.parametrize("kind", ["pooled", "per_layer"])
def test_balance_loss(kind):
    torch.manual_seed(0)
    logits = tuple(torch.randn(3, 6, 4) for _ in range(2))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 0]])
    expected = by_hand(logits, mask, kind).float()
    torch.testing.assert_close(balance_loss(logits, mask, kind), expected, atol=1e-6, rtol=0)
    whole = by_hand(logits, torch.ones_like(mask), kind).float()
    torch.testing.assert_close(balance_loss(logits, None, kind), whole, atol=1e-6, rtol=0)
    assert abs(whole - expected) > 1e-3


def test_balance_loss_of_balance_and_of_collapse():
    balanced = tuple(20 * torch.eye(4)[None] for _ in range(2))  # every token has another expert
    collapsed = tuple(20 * torch.eye(4)[:1].expand(1, 4, 4) for _ in range(2))
    assert abs(balance_loss(balanced, kind="pooled") - 1 / 4) < 1e-6
    assert abs(balance_loss(collapsed, kind="pooled") - 1) < 1e-6
    assert abs(balance_loss(balanced, kind="per_layer") - 1) < 1e-6
    assert abs(balance_loss(collapsed, kind="per_layer") - 4) < 1e-6
    # Each layer collapsed, but to another expert: pooling takes that for balance.
    made_up_for = tuple(20 * torch.eye(4)[None, None, layer].expand(1, 4, 4) for layer in range(4))
    assert abs(balance_loss(made_up_for, kind="pooled") - 1 / 4) < 1e-6
    assert abs(balance_loss(made_up_for, kind="per_layer") - 4) < 1e-6


def test_balance_loss_of_a_row_of_padding_alone():
    logits = (torch.randn(2, 3, 4, requires_grad=True),)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    loss = balance_loss(logits, mask)
    loss.backward()
    assert loss.isfinite() and logits[0].grad.isfinite().all() and (logits[0].grad[1] == 0).all()


@pytest.mark.parametrize("num_experts", [1, 2, 4, 8])
@pytest.mark.parametrize("grouped", [False, True])
def test_flops_beyond_plain_lora_have_a_closed_form(num_experts, grouped):
    """The router, and the ranks of the other experts unless tokens are grouped."""
    tokens, hidden, intermediate, r = 64, 48, 80, 8

    def grouped_flops(rows_shape, experts_shape, *args, **kwargs):
        return 2 * rows_shape[0] * experts_shape[1] * experts_shape[2]

    def count(run):
        # Which torch does not count by itself
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops}) as counter:
            run()
        return counter.get_total_flops()

    def mixture(experts):
        shapes = [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
        layers = [MoleLinear(*shape, bias=False, num_experts=experts, r=r, lora_alpha=r) for shape in shapes]
        router = MoleRouter(hidden, experts)
        inputs, inner = torch.randn(tokens, hidden), torch.randn(tokens, intermediate)

        def run():
            weights = route_tokens(router(inputs), "top1") if experts > 1 else None
            groups = group_tokens(weights) if grouped and experts > 1 else None
            for layer in layers:
                layer(inner if layer.in_features == intermediate else inputs, weights, groups)

        return run

    beyond = count(mixture(num_experts)) - count(mixture(1))
    router = 2 * tokens * hidden * num_experts * (num_experts > 1)
    extra_ranks = 3 * 2 * tokens * (hidden + intermediate) * (num_experts - 1) * r * (not grouped)
    assert beyond == router + extra_ranks


BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "mole_step.py"


@pytest.mark.slow
def test_benchmark_compares_equal_steps():
    benchmark = runpy.run_path(str(BENCHMARK))
    steps = benchmark["build_steps"](**benchmark["QUICK_SIZE"])
    assert len(steps) == 1 + 5 * len(benchmark["NUM_EXPERTS"])
    for count in benchmark["NUM_EXPERTS"]:
        for routing, kind in (("top1", "whole"), ("top1", "top1"), ("dense", "dense")):
            mixture, by_loop = steps[benchmark["ours"](count, routing)], steps[benchmark["loop"](count, kind)]
            torch.testing.assert_close(mixture(), by_loop(), atol=1e-5, rtol=1e-5)
            gradient = by_loop.hidden_states.grad
            atol = 1e-5 * gradient.abs().max().item()
            torch.testing.assert_close(mixture.hidden_states.grad, gradient, atol=atol, rtol=1e-4)


@pytest.mark.slow
def test_benchmark_runs():
    command = [sys.executable, str(BENCHMARK), "--quick", "--rounds", "2", "--threads", "1", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.count('"ratio"') == 16, result.stderr


def test_routers_that_would_not_learn():
    with_graph, without = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3)
    check_routers_learn([with_graph, without], [True, False])
    check_routers_learn([with_graph, with_graph], [False, True])
    with pytest.raises(ValueError, match='"use_reentrant": False'):
        check_routers_learn([with_graph, without], [True, True])
    with torch.no_grad():
        check_routers_learn([without], [True])
