"""Sizes of the releases' text models, counted on the meta device and by a closed form.

Counted is what is in a text model and its head: embeddings and `lm_head` both, at the configuration's vocabulary size,
norms and routers too; no vision tower, no projector. Of the experts' parameters, `num_experts_per_tok / num_experts`
are activated. The paper's table 1 says 2.0 / 2.2 / 3.6 B activated and 2.9 / 3.1 / 5.3 B in all.
"""

import pytest
import torch
from torch import nn

from llava_family import MoeLlavaPhiConfig, MoeLlavaQwen2Config, MoeLlavaStableLmConfig
from llava_family.moe_llava.modeling_moe_llava import MoeLlavaExperts, MoeLlavaPhiExperts, build_text_model


RELEASES = {
    "stablelm": MoeLlavaStableLmConfig(
        vocab_size=100352,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        use_qkv_bias=True,
    ),
    "qwen": MoeLlavaQwen2Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
    ),
    "phi": MoeLlavaPhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
}
# Activated and total; in billions 2.06 of 2.89, 2.24 of 3.05, 3.62 of 5.30
EXPECTED = {
    "stablelm": (2_059_849_728, 2_890_321_920),
    "qwen": (2_242_725_888, 3_054_323_712),
    "phi": (3_618_862_080, 5_296_993_280),
}


def closed_form(name):
    """Activated and total parameters, of the release's dimensions only."""
    config = RELEASES[name]
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    sparse = layers // 2  # every second layer
    if name == "phi":
        # One norm with a bias per layer; all four projections of attention have biases.
        attention, norms, network = 4 * hidden * hidden + 4 * hidden, 2 * hidden, 2 * hidden * inner + inner + hidden
    else:
        # Two norms, StableLM's with biases; biases of query, key and value.
        norms = {"stablelm": 4, "qwen": 2}[name] * hidden
        attention, network = 4 * hidden * hidden + 3 * hidden, 3 * hidden * inner
    final_norm = hidden if name == "qwen" else 2 * hidden
    shared = 2 * config.vocab_size * hidden + final_norm + layers * (attention + norms) + (layers - sparse) * network
    routers = sparse * 4 * hidden
    return shared + routers + sparse * 2 * network, shared + routers + sparse * 4 * network


def count(config):
    with torch.device("meta"):
        model = build_text_model(config)
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    total = sum(parameter.numel() for module in (model, head) for parameter in module.parameters())
    experts = sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, (MoeLlavaExperts, MoeLlavaPhiExperts))
        for parameter in module.parameters()
    )
    return total - experts * (config.num_experts - config.num_experts_per_tok) // config.num_experts, total


@pytest.mark.parametrize("name", RELEASES)
def test_parameters_of_releases(name):
    assert count(RELEASES[name]) == closed_form(name) == EXPECTED[name]
