"""Tables of the experiments' results, which `cards.py` writes into the READMEs.

A text shows one between `<!-- results: NAME -->` and `<!-- end -->`, where NAME is one of `TABLES`.
"""

import json
import re
import statistics
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import moe_skills
import mole_domains
import uhd_reading
from demo_pictures import PICTURES
from experiment import RESULTS


MARKED = re.compile(r"(<!-- results: (\w+) -->).*?(<!-- end -->)", re.DOTALL)

Results = dict[str, dict[str, Any]]  # by experiment

# What the claims are about, by experiment
SINGLE, MIX, MOLE = ("lora clinic", "lora bank"), "lora mix", "mole mix"
CLAIMED_ARMS = {
    "uhd_reading": ("slices", "square"),
    "moe_skills": ("dense", "moe"),
    "mole_domains": (*SINGLE, MIX, MOLE),
}


def read_results(folder: Path = RESULTS) -> Results:
    """The results that there are.

    Raises:
        ValueError: if they lack an arm that a claim is about.
    """
    found: Results = {}
    for name, arms in CLAIMED_ARMS.items():
        path = folder / f"{name}.json"
        if not path.is_file():
            print(f"Skipped {name}: there is no {path}. Make it first: python examples/miniature/{name}.py")
            continue
        found[name] = json.loads(path.read_text("utf-8"))
        missing = [arm for arm in arms if arm not in found[name]["summary"]]
        if missing:
            raise ValueError(f"{path} lacks the arms {missing}. Run the experiment again, without --arms.")
    return found


def percent(mean: float, spread: float) -> str:
    return f"{100 * mean:.1f} ± {100 * spread:.1f} %"


def score(results: dict[str, Any], arm: str, name: str) -> str:
    """A mean over the seeds with its standard deviation; a dash where the arm was not asked."""
    found = results["summary"][arm].get(name)
    return percent(found["mean"], found["std"]) if found else "–"


def mean_and_spread(results: dict[str, Any], *arms: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds of the mean over all scores of the arms."""
    means = [
        statistics.mean(
            score
            for run in results["runs"]
            if run["seed"] == seed and run["arm"] in arms
            for score in run["scores"].values()
        )
        for seed in results["seeds"]
    ]
    return statistics.mean(means), statistics.stdev(means) if len(means) > 1 else 0.0


def table(*rows: list[str]) -> str:
    """A table of Markdown whose first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def score_table(name: str, all_results: Results) -> str | None:
    """All scores of all arms of an experiment."""
    if name not in all_results:
        return None
    results = all_results[name]
    names = list(dict.fromkeys(each for scores in results["summary"].values() for each in scores))
    head, rows = ["arm", *names], []
    for arm in results["summary"]:
        rows.append([f"`{arm}`", *(score(results, arm, each) for each in names)])
    if name == "moe_skills":
        head.append("activated parameters")
        for row, arm in zip(rows, results["summary"], strict=True):
            row.append(f"{activated_parameters(results, arm):,}")
    if name == "mole_domains":
        head.append("both")
        for row, (arm, scores) in zip(rows, results["summary"].items(), strict=True):
            row.append(percent(*mean_and_spread(results, arm)) if len(scores) > 1 else "–")
    return table(head, *rows)


def activated_parameters(results: dict[str, Any], arm: str) -> int:
    return next(run["activated_parameters"] for run in results["runs"] if run["arm"] == arm)


def headline_table(all_results: Results) -> str | None:
    """What each paper promises, shown by one line."""
    rows = []
    if "uhd_reading" in all_results:
        uhd = partial(score, all_results["uhd_reading"], name="small text")
        sides = (f"adaptive slices: {uhd(arm='slices')}", f"padded to a square: {uhd(arm='square')}")
        rows.append(["LLaVA-UHD", "small numbers in elongated pictures", *sides])
    if "moe_skills" in all_results:
        moe = partial(score, all_results["moe_skills"], name="all")
        sides = (f"four experts, two per token: {moe(arm='moe')}", f"dense: {moe(arm='dense')}")
        rows.append(["MoE-LLaVA", f"{len(moe_skills.SKILLS)} skills, equal activated parameters", *sides])
    if "mole_domains" in all_results:
        results = all_results["mole_domains"]
        mole, lora, single = (percent(*mean_and_spread(results, *arms)) for arms in ((MOLE,), (MIX,), SINGLE))
        sides = (f"mixture of LoRA experts: {mole}", f"one LoRA: {lora}; one for each domain: {single}")
        rows.append(["LLaVA-MoLE", "two domains that contradict each other", *sides])
    head = ["paper", "right answers to", "its way", "without it"]
    return table(head, *rows) if rows else None


def cost_table(all_results: Results) -> str | None:
    """How long the experiments took."""
    rows = [
        [f"`{name}.py`", str(len(results["runs"])), f"{results['seconds'] / 60:.0f}", results["machine"]]
        for name, results in all_results.items()
    ]
    return table(["script", "trainings", "minutes", "measured on"], *rows) if rows else None


def setting_table(all_results: Results) -> str:
    """What the arms of each experiment learn from, and are asked."""
    uhd, moe, mole = uhd_reading, moe_skills, mole_domains
    groups = len(uhd.SIZES) * len(uhd.TEXT_HEIGHTS)
    skills = len(moe.SKILLS)
    return table(
        ["experiment", "captions", "then", "what is compared learns", "is asked"],
        ["`uhd_reading`", f"{uhd.CAPTIONS:,}", "–", f"{uhd.QUESTIONS:,} questions", f"{groups * uhd.EVALUATED:,}"],
        [
            "`moe_skills`",
            f"{moe.CAPTIONS:,}",
            f"{moe.FIRST_QUESTIONS:,} questions of {len(moe.SKILLS)} skills",
            f"{moe.QUESTIONS:,} questions of {skills} skills",
            f"{skills * moe.EVALUATED:,}",
        ],
        [
            "`mole_domains`",
            f"{mole.CAPTIONS:,}",
            f"{mole.READINGS:,} numbers, as they are",
            f"{mole.QUESTIONS:,} coded numbers of each of its domains, at rank {mole.RANK}",
            f"{mole.EVALUATED:,} of each of its domains",
        ],
    )


def first_answer(all_results: Results) -> str | None:
    """What is written in the first elongated picture."""
    path = PICTURES / "questions.json"
    if not path.is_file():
        print(
            f"Skipped the first answer: there is no {path}. Make it first: python examples/miniature/demo_pictures.py"
        )
        return None
    return str(json.loads(path.read_text("utf-8"))["uhd"][0]["answer"])


def uhd_pictures(all_results: Results) -> str:
    """Which pictures LLaVA-UHD's experiment has."""
    widths, heights = zip(*uhd_reading.SIZES, strict=True)
    lowest, highest = (each(chain(*uhd_reading.TEXT_HEIGHTS.values())) for each in (min, max))
    return (
        f"{len(widths)} sizes, with sides of {min(widths + heights)} to {max(widths + heights)} pixels and digits of "
        f"{lowest} to {highest} pixels"
    )


def small_text(all_results: Results) -> str:
    """Which of its pictures its claim is about."""
    lowest, highest = uhd_reading.TEXT_HEIGHTS[uhd_reading.SMALL_TEXT]
    sides = sorted({max(size) for size in uhd_reading.SIZES if max(size) >= uhd_reading.LONG_SIDE})
    left = (64 * lowest / sides[-1], 64 * highest / sides[0])
    return (
        f"numbers {lowest} to {highest} pixels high in pictures whose longer side has at least {sides[0]} pixels, of "
        f"which a square of 64 leaves {left[0]:.1f} to {left[1]:.1f} pixels"
    )


TABLES: dict[str, Callable[[Results], str | None]] = {
    "headlines": headline_table,
    "costs": cost_table,
    "settings": setting_table,
    "first_answer": first_answer,
    "uhd_pictures": uhd_pictures,
    "small_text": small_text,
    **{name: partial(score_table, name) for name in CLAIMED_ARMS},
}


def fill(text: str, results: Results) -> str:
    """The text with new tables; those without results stay as they are.

    Raises:
        ValueError: if it asks for a table that is not in `TABLES`.
    """

    def replace(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"There are no results {name!r}, but: {', '.join(TABLES)}.")
        content = TABLES[name](results)
        if content is None:
            return match[0]
        return f"{start}\n\n{content}\n\n{end}" if "\n" in content else f"{start}{content}{end}"

    return MARKED.sub(replace, text)
