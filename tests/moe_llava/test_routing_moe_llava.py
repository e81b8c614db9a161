"""Routing alone, against DeepSpeed's gating and against what the paper says."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llava_family import MoeLlavaPhiConfig
from llava_family.moe_llava import modeling_moe_llava
from llava_family.moe_llava.modeling_moe_llava import (
    MoeLlavaPhiExperts,
    MoeLlavaSparseMoeBlock,
    balance_loss,
    expert_capacity,
    gumbel_noise,
    route_tokens,
)

from .conftest import FIXTURES


CASES = json.loads((FIXTURES / "gating" / "expected.json").read_text())
TENSORS = load_file(FIXTURES / "gating" / "expected.safetensors")


def dense(index, weights, num_experts):
    return torch.zeros(len(index), num_experts).scatter_add(1, index, weights)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("k2")])
def test_top_2_gating(monkeypatch, name):
    case = CASES[name]
    logits, noise = (TENSORS[f"{name}.{key}"] for key in ("logits", "noise"))
    monkeypatch.setattr(modeling_moe_llava, "gumbel_noise", lambda logits: noise)
    logits.requires_grad_(True)
    policy = "sampling" if name.endswith("gumbel") else "top"
    index, weights = route_tokens(logits, 2, policy, case["capacity_factor"], case["min_capacity"])
    combined = dense(index, weights, case["E"])
    torch.testing.assert_close(combined, TENSORS[f"{name}.combine_se"], atol=1e-6, rtol=0)
    assert expert_capacity(logits.shape, 2, case["capacity_factor"], case["min_capacity"]) == case["capacity"]
    assert ((combined == 0).all(1)).sum() == case["fully_dropped"]
    loss = balance_loss((logits,))
    torch.testing.assert_close(loss, TENSORS[f"{name}.l_aux"], atol=1e-6, rtol=0)
    (loss + (combined * TENSORS[f"{name}.v"]).sum()).backward()
    torch.testing.assert_close(logits.grad, TENSORS[f"{name}.dlogits"], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("k1")])
def test_top_1_gating(name):
    case, logits = CASES[name], TENSORS[f"{name}.logits"]
    index, weights = route_tokens(logits, 1, "top", case["capacity_factor"], case["min_capacity"])
    torch.testing.assert_close(dense(index, weights, case["E"]), TENSORS[f"{name}.combine_se"], atol=1e-6, rtol=0)
    torch.testing.assert_close(balance_loss((logits,)), TENSORS[f"{name}.l_aux"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["layer", "layer_drop", "layer_residual"])
def test_whole_layer(name):
    case = CASES[name]
    config = MoeLlavaPhiConfig(
        hidden_size=case["hidden"],
        intermediate_size=case["inter"],
        hidden_act=case["act"],
        num_attention_heads=2,
        eval_capacity_factor=case["eval_capacity_factor"],
        use_residual=case["use_residual"],
    )
    mlp = modeling_moe_llava.PhiModel(config).layers[0].mlp if case["use_residual"] else None
    block = MoeLlavaSparseMoeBlock(config, MoeLlavaPhiExperts, mlp).eval()
    experts = "deepspeed_moe.experts.deepspeed_experts"

    def parameter(key):
        return TENSORS[f"{name}.param.{key}"]

    state = {"gate.weight": parameter("deepspeed_moe.gate.wg.weight")}
    for ours, theirs in (("up_proj", "fc1"), ("down_proj", "fc2")):
        state[f"experts.{ours}"] = torch.stack([parameter(f"{experts}.{i}.{theirs}.weight") for i in range(4)])
        state[f"experts.{ours}_bias"] = torch.stack([parameter(f"{experts}.{i}.{theirs}.bias") for i in range(4)])
    if case["use_residual"]:
        for kind in ("weight", "bias"):
            state[f"coefficient.{kind}"] = parameter(f"coefficient.{kind}")
            for layer in ("fc1", "fc2"):
                state[f"residual_mlp.{layer}.{kind}"] = parameter(f"mlp.{layer}.{kind}")
    block.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(block(TENSORS[f"{name}.x"]), TENSORS[f"{name}.y"], atol=1e-5, rtol=0)


def test_top_policy_is_the_two_most_probable():
    logits = torch.randn(1000, 5)
    index, weights = route_tokens(logits, 2)
    probabilities, expected = logits.softmax(-1).topk(2)
    assert torch.equal(index, expected)
    torch.testing.assert_close(weights, probabilities / probabilities.sum(-1, keepdim=True))


def test_sampling_follows_the_routers_probabilities():
    torch.manual_seed(0)
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0]]).expand(200_000, -1)
    index, _ = route_tokens(logits, 2, "sampling")
    assert (index[:, 0] == 0).all()
    shares = torch.bincount(index[:, 1], minlength=4) / len(index)
    torch.testing.assert_close(shares[1:], logits[0, 1:].softmax(-1), atol=5e-3, rtol=0)
    assert gumbel_noise(torch.zeros(4, 3)).shape == (4, 3)


def test_capacity_prefers_first_choices_then_earlier_tokens():
    logits = torch.tensor([[1.0, 2.0], [2.0, 1.0], [2.0, 1.0]])  # two tokens prefer expert 0, one prefers expert 1
    index, weights = route_tokens(logits, 2, capacity_factor=2 / 3)  # two places per expert
    assert index.tolist() == [[1, 0], [0, 1], [0, 1]]
    # Expert 0 is full with first choices; expert 1 has one place left, for the earlier token.
    assert (weights > 0).tolist() == [[True, False], [True, True], [True, False]]
    assert weights[0].tolist() == [1.0, 0.0]


def test_balance_loss_of_perfect_balance_is_one_per_layer():
    logits = torch.eye(4).repeat(100, 1) * 1e-3
    torch.testing.assert_close(balance_loss((logits, logits)), torch.tensor(2.0), atol=1e-3, rtol=0)


def test_balance_loss_leaves_padding_out():
    logits, mask = torch.randn(2 * 7, 4), torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 0]])
    torch.testing.assert_close(balance_loss((logits,), mask), balance_loss((logits[mask.flatten().bool()],)))
    assert not torch.allclose(balance_loss((logits,), mask), balance_loss((logits,)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_balance_loss_is_finite_in_half_precision_at_64k_tokens(dtype):
    logits = (torch.randn(65536, 4) * 50).to(dtype).requires_grad_(True)
    loss = balance_loss((logits,), torch.ones(1, 65536))
    loss.backward()
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    assert logits.grad.isfinite().all()
