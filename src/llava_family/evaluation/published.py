"""Scores of the papers, in percent, by the names that `files` gives to its own. Nobody has measured them here.

LLaVA-MoLE has none: its paper evaluates on other benchmarks.

Source: tables 3 and 4 of MoE-LLaVA (arXiv 2401.15947), and for LLaVA-UHD what `Published.source` says.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """What was published for one model.

    Args:
        source (`str`): Of all scores, and how sure it is.
        scores (`Mapping[str, Mapping[str, float]]`): Percent, by benchmark and score.
    """

    source: str
    scores: Mapping[str, Mapping[str, float]]


def _scores(
    gqa: float, scienceqa: float, textvqa: float, pope: float, mmbench: float
) -> dict[str, Mapping[str, float]]:
    """As papers print them: POPE is a mean F1, ScienceQA that with images."""
    return {
        "gqa": {"accuracy": gqa},
        "scienceqa": {"accuracy, with image": scienceqa},
        "textvqa": {"accuracy": textvqa},
        "pope": {"F1": pope},
        "mmbench": {"CircularEval": mmbench},
    }


# (accuracy, F1, yes ratio) for adversarial, popular and random questions
Pope = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]


def _moe(gqa: float, scienceqa: float, textvqa: float, pope: float, mmbench: float, by_category: Pope) -> Published:
    """Table 3 and table 4 of the paper."""
    pope_scores = {"F1": pope}
    for category, values in zip(("adversarial", "popular", "random"), by_category, strict=True):
        for name, value in zip(("accuracy", "F1", "yes ratio"), values, strict=True):
            pope_scores[f"{name}, {category}"] = value
    return Published(
        "MoE-LLaVA, arXiv 2401.15947, tables 3 and 4; with the noise of a router that draws the second expert",
        {**_scores(gqa, scienceqa, textvqa, pope, mmbench), "pope": pope_scores},
    )


LLAVA = "LLaVA-1.5 in table 3 of MoE-LLaVA, arXiv 2401.15947"

PUBLISHED: Mapping[str, Published] = {
    "moe-llava-stablelm-1.6b-4e": _moe(
        60.3, 62.6, 50.1, 85.7, 60.2, ((86.9, 85.7, 41.7), (85.3, 84.2, 43.5), (88.0, 87.1, 41.6))
    ),
    "moe-llava-qwen-1.8b-4e": _moe(
        61.5, 63.1, 48.0, 87.0, 59.7, ((86.1, 85.4, 44.9), (88.6, 87.7, 42.5), (88.7, 88.0, 43.0))
    ),
    "moe-llava-phi2-2.7b-4e": _moe(
        61.4, 68.5, 51.4, 86.3, 65.2, ((85.9, 84.9, 43.2), (87.5, 86.4, 41.8), (88.5, 87.7, 41.8))
    ),
    "moe-llava-stablelm-1.6b-4e-384": _moe(
        61.5, 63.9, 54.3, 85.9, 63.3, ((86.9, 85.6, 41.5), (85.7, 84.6, 43.0), (88.4, 87.5, 41.5))
    ),
    "moe-llava-phi2-2.7b-4e-384": _moe(
        62.6, 70.3, 57.0, 85.7, 68.0, ((85.5, 84.2, 41.9), (86.7, 84.4, 41.7), (87.9, 86.9, 40.6))
    ),
    "llava-uhd-144-13b": Published(
        "derived: the ECCV abstract's 5.7 points over LLaVA-1.5-13B, whose TextVQA is 61.3; its table was not found",
        {"textvqa": {"accuracy": 67.0}},
    ),
    "llava-uhd-64-13b": Published(
        "LLaVA-UHD, arXiv 2403.11703v1, 64 tokens per view, never released; second-hand, MMBench from memory",
        _scores(65.2, 72.0, 67.7, 89.1, 68.0),
    ),
    "llava-1.5-7b": Published(LLAVA, _scores(62.0, 66.8, 58.2, 85.9, 64.3)),
    "llava-1.5-13b": Published(LLAVA, _scores(63.3, 71.6, 61.3, 85.9, 67.7)),
}
