"""Times one sparse layer: this package's, in-tree Mixtral's, a dense network, and DeepSpeed's one-hot dispatch.

    python benchmarks/moe_layer.py [--rounds 30] [--threads 1] [--quick] [--json]

All share the same weights, which are random, and take turns in one process. Exits with 1 where a claim fails.
"""

import sys
from functools import partial

import torch
from timing import Claim, measure, parse_arguments, report
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from llava_family import MoeLlavaQwen2Config
from llava_family.moe_llava.modeling_moe_llava import MoeLlavaExperts, MoeLlavaSparseMoeBlock, route_tokens


FULL_SIZE = {"hidden_size": 2048, "intermediate_size": 5632}
QUICK_SIZE = {"hidden_size": 64, "intermediate_size": 128}
NUM_EXPERTS, NUM_EXPERTS_PER_TOK = 4, 2
OURS, MIXTRAL, DENSE, ONE_HOT = "ours", "Mixtral", "dense", "one-hot dispatch"


def at(name: str, num_tokens: int) -> str:
    return f"{name}, {num_tokens} {'token' if num_tokens == 1 else 'tokens'}"


# One token is a step of decoding; 640 are an image of 576 with a prompt.
# What is timed, what it is compared with, the limit, and whether that is the least; by the number of tokens
LIMITS = {
    1: ((OURS, MIXTRAL, 1.05), (OURS, DENSE, 2.2), (ONE_HOT, OURS, 1.5, True)),
    640: ((OURS, MIXTRAL, 1.05), (OURS, DENSE, 2.6), (ONE_HOT, OURS, 1.5, True)),
}
CLAIMS = tuple(
    Claim(at(numerator, count), at(denominator, count), *limit)
    for count, limits in LIMITS.items()
    for numerator, denominator, *limit in limits
)


class DenseNetwork(nn.Module):
    """The feed-forward network that became the first expert, as in-tree Llama writes it."""

    def __init__(self, experts: MoeLlavaExperts):
        super().__init__()
        self.act_fn = experts.act_fn
        gate, up = experts.gate_up_proj[0].chunk(2)
        self.gate_proj, self.up_proj = nn.Parameter(gate), nn.Parameter(up)
        self.down_proj = nn.Parameter(experts.down_proj[0])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = nn.functional.linear(hidden_states, self.gate_proj)
        up = nn.functional.linear(hidden_states, self.up_proj)
        return nn.functional.linear(self.act_fn(gate) * up, self.down_proj)


class OneHotDispatch(nn.Module):
    """Dispatch and combination as GShard (arXiv 2006.16668, algorithm 1) and DeepSpeed do them, by dense einsums.

    Written from the formula. `capacity_factor` 2 is the one that the releases are evaluated with: of four experts each
    has a place for every token, so that nothing is dropped and the output is the others'.
    """

    def __init__(self, block: MoeLlavaSparseMoeBlock, capacity_factor: float = 2.0):
        super().__init__()
        self.gate, self.experts, self.capacity_factor = block.gate, block.experts, capacity_factor

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        experts = self.experts
        index, weights = route_tokens(self.gate(tokens), NUM_EXPERTS_PER_TOK)
        capacity = int(len(tokens) / experts.num_experts * NUM_EXPERTS_PER_TOK * self.capacity_factor)
        chosen = nn.functional.one_hot(index.T, experts.num_experts)  # (choices, tokens, experts)
        position = chosen.flatten(0, 1).cumsum(0).view_as(chosen) - 1  # first choices before second ones
        places = nn.functional.one_hot((position * chosen).sum(-1), capacity)  # (choices, tokens, capacity)
        combine = torch.einsum("kt,kte,ktc->tec", weights.T, chosen.to(weights), places.to(weights))
        dispatched = torch.einsum("tec,th->ech", (combine != 0).to(tokens), tokens)
        outputs = []
        for expert in range(experts.num_experts):
            gate, up = nn.functional.linear(dispatched[expert], experts.gate_up_proj[expert]).chunk(2, dim=-1)
            outputs.append(nn.functional.linear(experts.act_fn(gate) * up, experts.down_proj[expert]))
        output = torch.einsum("tec,ech->th", combine.to(tokens), torch.stack(outputs))
        return output.view_as(hidden_states)


def build_modules(hidden_size: int, intermediate_size: int) -> dict[str, nn.Module]:
    """The compared modules, which share one set of weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_attention_heads": 8}
    config = MoeLlavaQwen2Config(num_experts=NUM_EXPERTS, num_experts_per_tok=NUM_EXPERTS_PER_TOK, **sizes)
    config._experts_implementation = "grouped_mm"
    ours = MoeLlavaSparseMoeBlock(config, MoeLlavaExperts, nn.Identity())
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    mixtral_config = MixtralConfig(
        num_local_experts=NUM_EXPERTS, num_experts_per_tok=NUM_EXPERTS_PER_TOK, num_key_value_heads=8, **sizes
    )
    mixtral_config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        mixtral = MixtralSparseMoeBlock(mixtral_config)
    mixtral.gate.weight = ours.gate.weight
    mixtral.experts.gate_up_proj, mixtral.experts.down_proj = ours.experts.gate_up_proj, ours.experts.down_proj
    modules = {OURS: ours, MIXTRAL: mixtral, DENSE: DenseNetwork(ours.experts), ONE_HOT: OneHotDispatch(ours)}
    return {name: module.eval() for name, module in modules.items()}


def random_tokens(num_tokens: int, hidden_size: int) -> torch.Tensor:
    return torch.randn(1, num_tokens, hidden_size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def main() -> int:
    arguments = parse_arguments(__doc__.splitlines()[0], rounds=30, threads=1)
    size = QUICK_SIZE if arguments.quick else FULL_SIZE
    modules, seconds = build_modules(**size), {}
    for count in LIMITS:
        hidden_states = random_tokens(count, size["hidden_size"])
        layers = {at(name, count): partial(module, hidden_states) for name, module in modules.items()}
        seconds |= measure(layers, arguments.rounds)
    title = f"Sparse layer, hidden {size['hidden_size']}, inner {size['intermediate_size']}, 4 experts, top 2, float32"
    return report(seconds, CLAIMS, title, arguments)


if __name__ == "__main__":
    sys.exit(main())
