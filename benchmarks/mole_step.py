"""Times a training step of one feed-forward network: plain LoRA of PEFT, MoLE, and MoLE by a loop over its experts.

    python benchmarks/mole_step.py [--rounds 20] [--threads 2] [--quick] [--json]

A step is forward, backward to the network's input, and AdamW on the adapters, in float32. All networks have the same
frozen weights, and a mixture and its loop the same experts. They run in turns in one process; a ratio is the median
of the ratios within each round. Exits with 1 where a claim fails.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import torch
from peft import LoraConfig, get_peft_model
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from llava_family import LlavaMoleTextConfig, MoleMLP
from llava_family.llava_mole.layers_llava_mole import MoleExperts, balance_loss


FULL_SIZE = {"hidden_size": 2048, "intermediate_size": 5632}
QUICK_SIZE = {"hidden_size": 64, "intermediate_size": 128}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
NUM_TOKENS, RANK, ALPHA = 1024, 32, 64
NUM_EXPERTS = (2, 3, 4, 8)
PLAIN = "LoRA of PEFT"


@dataclass(frozen=True)
class Claim:
    """`numerator` takes at most `limit` times as long as `denominator`, or at least as `at_least` says.

    Without a limit the ratio is shown, and nothing is claimed.
    """

    numerator: str
    denominator: str
    limit: float | None = None
    at_least: bool = False

    def holds(self, ratio: float) -> bool:
        return self.limit is None or (ratio >= self.limit if self.at_least else ratio <= self.limit)

    def __str__(self) -> str:
        return "" if self.limit is None else f"{'>=' if self.at_least else '<='} {self.limit}"


def ours(num_experts: int, routing: str = "top1") -> str:
    return f"MoLE {routing}, {num_experts} experts"


def loop(num_experts: int, kind: str) -> str:
    return f"{kind} loop, {num_experts} experts"


CLAIMS = (
    *(Claim(ours(count), PLAIN, 1.05 if count <= 4 else 1.12) for count in NUM_EXPERTS),
    *(Claim(loop(count, "whole"), ours(count), None if count == 2 else 1.1, at_least=True) for count in NUM_EXPERTS),
    *(Claim(loop(count, "top1"), ours(count)) for count in NUM_EXPERTS),
    *(Claim(loop(count, "dense"), ours(count, "dense")) for count in NUM_EXPERTS),
)


class LoopOverExperts(nn.Module):
    """Experts one after the other, in three ways.

    `"whole"` is the definition, for any routing: every expert computes all tokens, and its output is weighted and
    added. The others are the released code's, written anew. `"top1"`: an expert's tokens are looked up, gathered,
    multiplied twice, scaled and assigned to their places. `"dense"`: outputs are stacked, weighted and summed.
    """

    def __init__(self, experts: MoleExperts, kind: str):
        super().__init__()
        self.scaling, self.kind = experts.scaling, kind
        self.weights_A = nn.ParameterList(weight.detach().clone() for weight in experts.weight_A)
        # As LoRA has it: (out_features, r)
        self.weights_B = nn.ParameterList(weight.detach().T.contiguous() for weight in experts.weight_B)

    def can_group(self, hidden_states: torch.Tensor) -> bool:
        return False

    def expert(self, index: int, tokens: torch.Tensor) -> torch.Tensor:
        return tokens @ self.weights_A[index].T @ self.weights_B[index].T * self.scaling

    def forward(self, hidden_states: torch.Tensor, weights: torch.Tensor, groups: None = None) -> torch.Tensor:
        experts = range(len(self.weights_A))
        if self.kind == "dense":
            outputs = torch.stack([self.expert(index, hidden_states) for index in experts], dim=2)
            return (outputs * weights[..., None]).sum(dim=2)
        output = hidden_states.new_zeros(*hidden_states.shape[:-1], self.weights_B[0].shape[0])
        for index in experts:
            if self.kind == "whole":
                output = output + weights[..., index, None] * self.expert(index, hidden_states)
            else:
                own = torch.where(weights[..., index] > 0)
                output[own] = self.expert(index, hidden_states[own])
        return output


class Step(nn.Module):
    """A network with its optimizer and its loss."""

    def __init__(self, network: nn.Module, hidden_size: int):
        super().__init__()
        self.network = network
        self.hidden_states = torch.randn(
            1, NUM_TOKENS, hidden_size, generator=torch.Generator().manual_seed(1), requires_grad=True
        )
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        # So small a rate that all steps do the same work
        self.optimizer = torch.optim.AdamW(trained, lr=1e-8)
        self.router_logits: torch.Tensor | None = None
        router = getattr(network, "mole_router", None)
        if router is not None:
            router.register_forward_hook(self._keep_logits)

    def _keep_logits(self, router: nn.Module, args: tuple, logits: torch.Tensor) -> None:
        self.router_logits = logits

    def forward(self) -> torch.Tensor:
        """The output of the network, behind whose step this returns."""
        self.hidden_states.grad = None
        output = self.network(self.hidden_states)
        loss = output.square().mean()
        if self.router_logits is not None:
            loss = loss + 0.01 * balance_loss((self.router_logits,))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return output.detach()


def build_steps(hidden_size: int, intermediate_size: int) -> dict[str, Step]:
    """The compared steps."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    dense = LlamaMLP(LlamaConfig(**sizes))
    dense.requires_grad_(False)
    frozen = dict(dense.state_dict())
    plain = LlamaMLP(LlamaConfig(**sizes))
    plain.load_state_dict(frozen, assign=True)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(PROJECTIONS))
    networks: dict[str, nn.Module] = {PLAIN: get_peft_model(plain, config).base_model.model}
    for count in NUM_EXPERTS:
        for routing, kinds in (("top1", ("whole", "top1")), ("dense", ("dense",))):
            mixture = _mixture(count, routing, sizes, frozen, dense.act_fn)
            networks[ours(count, routing)] = mixture
            for kind in kinds:
                by_loop = _mixture(count, routing, sizes, frozen, dense.act_fn)
                by_loop.load_state_dict(mixture.state_dict())
                for name in PROJECTIONS:
                    layer = getattr(by_loop, name)
                    layer.mole_experts = LoopOverExperts(layer.mole_experts, kind)
                networks[loop(count, kind)] = by_loop
    return {name: Step(network, hidden_size) for name, network in networks.items()}


def _mixture(
    num_experts: int, routing: str, sizes: dict[str, int], frozen: dict[str, torch.Tensor], act_fn: nn.Module
) -> MoleMLP:
    config = LlavaMoleTextConfig(
        **sizes, num_experts=num_experts, r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, routing=routing
    )
    with torch.device("meta"):
        mixture = MoleMLP(config, act_fn)
    adapters = {name: torch.empty(tensor.shape) for name, tensor in mixture.state_dict().items() if "mole_" in name}
    for tensor in adapters.values():
        nn.init.normal_(tensor, std=tensor.shape[-1] ** -0.5)
    mixture.load_state_dict({**frozen, **adapters}, assign=True)
    for name, parameter in mixture.named_parameters():
        parameter.requires_grad_("mole_" in name)
    return mixture


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round; each round takes all of them once, in a random order."""
    order, shuffler = list(steps), random.Random(0)
    for step in steps.values():
        for _ in range(2):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def to_records(seconds: dict[str, list[float]]) -> list[dict]:
    records = []
    for claim in CLAIMS:
        numerators, denominators = seconds[claim.numerator], seconds[claim.denominator]
        ratios = [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        times = {"seconds": statistics.median(numerators), "reference_seconds": statistics.median(denominators)}
        spread = {"ratio": ratio, "ratio_quartiles": [low, high]}
        records.append({**asdict(claim), **times, **spread, "holds": claim.holds(ratio)})
    return records


def to_table(records: list[dict], title: str, quick: bool) -> Table:
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("step", "ms", "compared with", "ms", "ratio", "quartiles", "claim", ""):
        table.add_column(heading, justify="left" if heading in ("step", "compared with") else "right", no_wrap=True)
    for record, claim in zip(records, CLAIMS, strict=True):
        low, high = record["ratio_quartiles"]
        table.add_row(
            claim.numerator,
            f"{record['seconds'] * 1e3:.1f}",
            claim.denominator,
            f"{record['reference_seconds'] * 1e3:.1f}",
            f"{record['ratio']:.3f}",
            f"{low:.3f}..{high:.3f}",
            str(claim),
            "" if quick or claim.limit is None else "pass" if record["holds"] else "FAIL",
        )
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="how often everything is timed, at least 2")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--quick", action="store_true", help="tiny networks, to see that it runs: no claim is checked")
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
    records = to_records(measure(build_steps(**size), arguments.rounds))
    if arguments.json:
        print(json.dumps(records, indent=2))
    else:
        # A pipe has no width to fit the table into.
        console = Console(width=None if sys.stdout.isatty() else 119, highlight=False)
        title = (
            f"Training step, hidden {size['hidden_size']}, inner {size['intermediate_size']}, rank {RANK}, "
            f"{NUM_TOKENS} tokens, float32"
        )
        console.print(to_table(records, title, arguments.quick))
        console.print(
            f"{arguments.rounds} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"{platform.machine()}" + (". The networks are too small to check claims." if arguments.quick else "")
        )
    return int(not arguments.quick and not all(record["holds"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
