"""What the benchmarks of speed share: functions that take turns, ratios with their spread, and claims about them.

Every round runs all functions once, in a random order. A ratio is the median of the ratios within each round, so that
what slows the machine down for a while slows both; the quartiles are its spread.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table


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
        return "" if self.limit is None else f"{'>=' if self.at_least else '<='} {self.limit:g}"


def measure(functions: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of every function in every round."""
    order, shuffler = list(functions), random.Random(0)
    for function in functions.values():
        for _ in range(warm_up):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def to_records(seconds: Mapping[str, list[float]], claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """One record for every claim, times in seconds."""
    records = []
    for claim in claims:
        numerators, denominators = seconds[claim.numerator], seconds[claim.denominator]
        ratios = [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        times = {"seconds": statistics.median(numerators), "reference_seconds": statistics.median(denominators)}
        spread = {"ratio": ratio, "ratio_quartiles": [low, high]}
        records.append({**asdict(claim), **times, **spread, "holds": claim.holds(ratio)})
    return records


def to_table(records: Sequence[dict[str, Any]], claims: Sequence[Claim], title: str, quick: bool) -> Table:
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("what", "ms", "compared with", "ms", "ratio", "quartiles", "claim", ""):
        table.add_column(heading, justify="left" if heading in ("what", "compared with") else "right", no_wrap=True)
    for record, claim in zip(records, claims, strict=True):
        low, high = record["ratio_quartiles"]
        table.add_row(
            claim.numerator,
            f"{record['seconds'] * 1e3:.2f}",
            claim.denominator,
            f"{record['reference_seconds'] * 1e3:.2f}",
            f"{record['ratio']:.3f}",
            f"{low:.3f}..{high:.3f}",
            str(claim),
            "" if quick or claim.limit is None else "pass" if record["holds"] else "FAIL",
        )
    return table


def parse_arguments(description: str, rounds: int, threads: int) -> argparse.Namespace:
    """The options of every benchmark; sets torch's number of threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"how often everything is timed, at least 2 (default: {rounds})"
    )
    # On a shared machine every parallel region waits for the core that others use.
    parser.add_argument("--threads", type=int, default=threads, help=f"threads of torch (default: {threads})")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs: no claim is checked")
    parser.add_argument("--json", action="store_true", help="print records, in seconds, instead of a table")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2")
    if arguments.threads < 1:
        parser.error("--threads must be positive")
    torch.set_num_threads(arguments.threads)
    return arguments


def report(
    seconds: Mapping[str, list[float]], claims: Sequence[Claim], title: str, arguments: argparse.Namespace
) -> int:
    """Prints records or a table, and returns the exit status: 1 where a claim fails."""
    records = to_records(seconds, claims)
    if arguments.json:
        print(json.dumps(records, indent=2))
    else:
        # A pipe has no width to fit the table into.
        console = Console(width=None if sys.stdout.isatty() else 119, highlight=False)
        console.print(to_table(records, claims, title, arguments.quick))
        console.print(
            f"{arguments.rounds} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"{platform.machine()}" + (". Sizes are too small to check claims." if arguments.quick else "")
        )
    return int(not arguments.quick and not all(record["holds"] for record in records))
