"""Draws the results of the experiments: `results/<name>.json` to `results/<name>.png`.

Colours are those of Okabe and Ito, which readers of any colour vision tell apart. Bars and numbers are means over the
seeds; lines on bars are standard deviations.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from experiment import RESULTS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter


COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
EXPERT_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


def mean_groups(runs: list[dict[str, Any]], arm: str, key: str) -> dict[str, Any]:
    """Mean over the seeds of what each run of an arm has under `key`."""
    values = [run[key] for run in runs if run["arm"] == arm]
    return {name: np.mean([value[name] for value in values], axis=0) for name in values[0]}


def plot_uhd_reading(results: dict[str, Any]) -> Figure:
    """Accuracy by size of picture and text, of both ways to encode a picture."""
    titles = {"slices": "LLaVA-UHD: adaptive slices", "square": "LLaVA-1.5: padded to a square"}
    arms = list(results["summary"])
    figure = new_figure(5.6 * len(arms), 3.6)
    panels = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    for axes, arm in zip(panels, arms, strict=True):
        groups = mean_groups(results["runs"], arm, "groups")
        sizes = list(dict.fromkeys(name.split()[0] for name in groups))
        heights = list(dict.fromkeys(name.split()[1] for name in groups))
        table = np.array([[groups[f"{size} {height}"] for size in sizes] for height in heights])
        image = axes.imshow(table, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            axes.text(
                column,
                row,
                f"{value:.0%}",
                ha="center",
                va="center",
                fontsize=8,
                color="black" if value > 0.5 else "white",
            )
        axes.set_xticks(range(len(sizes)), [size.replace("x", "×") for size in sizes], rotation=45, ha="right")
        axes.set_yticks(range(len(heights)), [height.replace("-", "–") for height in heights])
        axes.set_xlabel("picture, width × height (pixels)")
        axes.set_title(titles[arm], fontsize=10)
    panels[0].set_ylabel("height of the text (pixels)")
    figure.colorbar(image, ax=panels, label="numbers read right", format=PercentFormatter(1.0), shrink=0.9)
    return figure


def plot_moe_skills(results: dict[str, Any]) -> Figure:
    """Accuracy by skill, and where the experts' tokens come from."""
    # Of one seed: experts of different seeds have nothing but their numbers in common.
    run = next(run for run in results["runs"] if run["arm"] == "moe")
    titles = {f"moe, seed {run['seed']}: {modality} tokens": shares for modality, shares in run["loads"].items()}
    names = list(next(iter(results["summary"].values())))
    return plot_bars_and_experts(results["summary"], names, titles, "share of first choices")


def plot_mole_domains(results: dict[str, Any]) -> Figure:
    """Accuracy by domain, and which experts serve it."""
    run = next(run for run in results["runs"] if "loads" in run)
    titles = {
        f"{run['arm']}, seed {run['seed']}: tokens of the {domain}'s forms": shares
        for domain, shares in run["loads"].items()
    }
    return plot_bars_and_experts(results["summary"], list(run["loads"]), titles, "share of tokens")


def plot_bars_and_experts(
    summary: dict[str, Any], names: list[str], loads: dict[str, list[list[float]]], share: str
) -> Figure:
    """Scores of all arms above; below, panels of `(layers, experts)` loads by their title."""
    figure = new_figure(11, 6.4)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    draw_bars(top.subplots(), summary, names)
    panels = bottom.subplots(1, len(loads), sharey=True)
    for axes, (title, shares) in zip(panels, loads.items(), strict=True):
        stack_experts(axes, np.array(shares), [str(layer) for layer in range(len(shares))])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("layer")
    panels[0].set_ylabel(share)
    bottom.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def draw_bars(axes: Axes, summary: dict[str, Any], names: list[str]) -> None:
    """One group of bars for every score, one bar for every arm."""
    width = 0.8 / len(summary)
    for index, (arm, scores) in enumerate(summary.items()):
        kept = [place for place, name in enumerate(names) if name in scores]
        places = [place + (index - (len(summary) - 1) / 2) * width for place in kept]
        means = [scores[names[place]]["mean"] for place in kept]
        errors = [scores[names[place]]["std"] for place in kept]
        bars = axes.bar(places, means, width * 0.92, yerr=errors, capsize=2, color=COLORS[index], label=arm)
        axes.bar_label(bars, [f"{mean:.0%}" for mean in means], fontsize=7, padding=2)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.12)
    axes.set_ylabel("right answers")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=len(summary), frameon=False, fontsize=8)


def stack_experts(axes: Axes, shares: np.ndarray, labels: list[str]) -> None:
    """A bar for every row of `(rows, experts)` shares."""
    bottom = np.zeros(len(shares))
    for expert in range(shares.shape[1]):
        axes.bar(
            labels, shares[:, expert], bottom=bottom, width=0.75, color=EXPERT_COLORS[expert], label=f"expert {expert}"
        )
        bottom += shares[:, expert]
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


PLOTS = {"uhd_reading": plot_uhd_reading, "moe_skills": plot_moe_skills, "mole_domains": plot_mole_domains}


def plot(path: Path) -> Path:
    """Draws a file of results, beside it."""
    results = json.loads(path.read_text("utf-8"))
    picture = path.with_suffix(".png")
    PLOTS[results["experiment"]](results).savefig(picture)
    return picture


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, default=[RESULTS / f"{name}.json" for name in PLOTS])
    for path in parser.parse_args().results:
        print(f"Wrote {plot(path)}")
