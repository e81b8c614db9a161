"""Times one sparse layer: this package's, in-tree Mixtral's, a dense network, and DeepSpeed's one-hot dispatch.

    python benchmarks/moe_layer.py [--rounds 30] [--threads 1] [--quick] [--json]

All share the same weights, which are random, and run in turns in one process. A ratio is the median of the ratios
within each round, so that what slows the machine down for a while slows both. Exits with 1 where a claim fails.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from llava_family import MoeLlavaQwen2Config
from llava_family.moe_llava.modeling_moe_llava import MoeLlavaExperts, MoeLlavaSparseMoeBlock, route_tokens


FULL_SIZE = {"hidden_size": 2048, "intermediate_size": 5632}
QUICK_SIZE = {"hidden_size": 64, "intermediate_size": 128}
NUM_EXPERTS, NUM_EXPERTS_PER_TOK = 4, 2
# One token is a step of decoding; 640 are an image of 576 with a prompt.
NUM_TOKENS = (1, 640)
OURS, MIXTRAL, DENSE, ONE_HOT = "ours", "Mixtral", "dense", "one-hot dispatch"


@dataclass(frozen=True)
class Claim:
    """`numerator` takes at most `limit` times as long as `denominator`, or at least as `at_least` says."""

    num_tokens: int
    numerator: str
    denominator: str
    limit: float
    at_least: bool = False

    def holds(self, ratio: float) -> bool:
        return ratio >= self.limit if self.at_least else ratio <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit}"


CLAIMS = (
    Claim(1, OURS, MIXTRAL, 1.05),
    Claim(1, OURS, DENSE, 2.2),
    Claim(1, ONE_HOT, OURS, 1.5, at_least=True),
    Claim(640, OURS, MIXTRAL, 1.05),
    Claim(640, OURS, DENSE, 2.6),
    Claim(640, ONE_HOT, OURS, 1.5, at_least=True),
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


def seconds_of(function: Callable, argument: torch.Tensor) -> float:
    start = time.perf_counter()
    function(argument)
    return time.perf_counter() - start


@torch.no_grad()
def measure(modules: dict[str, nn.Module], hidden_states: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of every module in every round; each round runs all of them once, in a random order."""
    order = list(modules)
    shuffler = random.Random(0)
    for module in modules.values():
        for _ in range(3):
            module(hidden_states)
    seconds = {name: [] for name in modules}
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            seconds[name].append(seconds_of(modules[name], hidden_states))
    return seconds


def median_and_quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def to_records(seconds: dict[int, dict[str, list[float]]], claims: tuple[Claim, ...]) -> list[dict]:
    records = []
    for claim in claims:
        numerators, denominators = (seconds[claim.num_tokens][name] for name in (claim.numerator, claim.denominator))
        ratios = [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]
        ratio, low, high = median_and_quartiles(ratios)
        times = {"seconds": statistics.median(numerators), "reference_seconds": statistics.median(denominators)}
        spread = {"ratio": ratio, "ratio_quartiles": [low, high]}
        records.append({**asdict(claim), **times, **spread, "holds": claim.holds(ratio)})
    return records


def to_table(records: list[dict], claims: tuple[Claim, ...], title: str, quick: bool) -> Table:
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("tokens", "module", "ms", "compared with", "ms", "ratio", "quartiles", "claim", ""):
        table.add_column(heading, justify="left" if heading in ("module", "compared with") else "right", no_wrap=True)
    for record, claim in zip(records, claims, strict=True):
        low, high = record["ratio_quartiles"]
        table.add_row(
            str(claim.num_tokens),
            claim.numerator,
            f"{record['seconds'] * 1e3:.2f}",
            claim.denominator,
            f"{record['reference_seconds'] * 1e3:.2f}",
            f"{record['ratio']:.2f}",
            f"{low:.2f}..{high:.2f}",
            str(claim),
            "" if quick else "pass" if record["holds"] else "FAIL",
        )
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="how often everything is timed, at least 2")
    # On a shared machine every parallel region waits for the core that others use.
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--quick", action="store_true", help="a tiny layer, to see that it runs: no claim is checked")
    parser.add_argument("--json", action="store_true", help="print records, in seconds, instead of a table")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2")
    if arguments.threads < 1:
        parser.error("--threads must be positive")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    size = QUICK_SIZE if arguments.quick else FULL_SIZE
    modules = build_modules(**size)
    seconds = {
        num_tokens: measure(modules, random_tokens(num_tokens, size["hidden_size"]), arguments.rounds)
        for num_tokens in NUM_TOKENS
    }
    records = to_records(seconds, CLAIMS)
    if arguments.json:
        print(json.dumps(records, indent=2))
    else:
        # A pipe has no width to fit the table into.
        console = Console(width=None if sys.stdout.isatty() else 119, highlight=False)
        title = (
            f"Sparse layer, hidden {size['hidden_size']}, inner {size['intermediate_size']}, 4 experts, top 2, float32"
        )
        console.print(to_table(records, CLAIMS, title, arguments.quick))
        console.print(
            f"{arguments.rounds} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"{platform.machine()}" + (". The layer is too small to check claims." if arguments.quick else "")
        )
    return int(not arguments.quick and not all(record["holds"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
