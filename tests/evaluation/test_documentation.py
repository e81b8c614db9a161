"""The tables of docs/evaluation.md are those of the code."""

import re
from pathlib import Path

from llava_family.evaluation.files import BENCHMARKS
from llava_family.evaluation.published import PUBLISHED
from llava_family.evaluation.settings import SETTINGS


ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "evaluation.md"


def rows():
    for line in DOCUMENT.read_text("utf-8").splitlines():
        if line.startswith("| `"):
            yield [cell.strip().strip("`") for cell in line.strip("|").split("|")]


def test_settings():
    images = {
        "longer side to 1024 pixels first": {"pre_resize_longest_edge": 1024},
        "not padded to a square": {"do_pad": False},
        "as it is": {},
    }
    documented = {}
    for family, benchmark, beams, tokens, image, penalty in (row for row in rows() if row[0] in SETTINGS):
        for name in SETTINGS[family] if benchmark == "each of them" else [benchmark]:
            documented[family, name] = (int(beams), int(tokens), images[image], float(penalty))
    assert documented == {
        (family, name): (each.num_beams, each.max_new_tokens, dict(each.image_settings), each.repetition_penalty)
        for family, benchmarks in SETTINGS.items()
        for name, each in benchmarks.items()
    }


COLUMNS = {
    "textvqa": "accuracy",
    "pope": "F1",
    "scienceqa": "accuracy, with image",
    "mmbench": "CircularEval",
    "gqa": "accuracy",
}


def test_published_scores():
    documented = {row[0]: row[1:] for row in rows() if row[0] in PUBLISHED}
    assert documented == {
        name: [
            str(published.scores[benchmark][score]) if benchmark in published.scores else "–"
            for benchmark, score in COLUMNS.items()
        ]
        for name, published in PUBLISHED.items()
    }


def test_published_scores_are_those_of_the_cards():
    """Those of table 3 stand in every card of MoE-LLaVA."""
    for name, published in PUBLISHED.items():
        if name.startswith("moe-llava"):
            text = (ROOT / "model_cards" / f"{name}.md").read_text("utf-8")
            (row,) = re.findall(r"^\| MoE-LLaVA .* \|$", text, flags=re.MULTILINE)
            # VQAv2, GQA, VizWiz, ScienceQA, TextVQA, POPE, MME, MMBench, LLaVA-Wild, MM-Vet
            cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
            places = {"gqa": 1, "scienceqa": 3, "textvqa": 4, "pope": 5, "mmbench": 7}
            for benchmark, place in places.items():
                assert cells[place] == str(published.scores[benchmark][COLUMNS[benchmark]]), (name, benchmark)


def test_pope_is_the_mean_of_its_categories():
    """Table 3 of MoE-LLaVA has the mean F1 of its table 4, but for one model."""
    exceptions = []
    for name, published in PUBLISHED.items():
        if name.startswith("moe-llava"):
            scores = published.scores["pope"]
            mean = sum(scores[f"F1, {category}"] for category in ("adversarial", "popular", "random")) / 3
            if round(mean, 1) != scores["F1"]:
                exceptions.append((name, round(mean, 1), scores["F1"]))
    assert exceptions == [("moe-llava-phi2-2.7b-4e-384", 85.2, 85.7)]
    text = DOCUMENT.read_text("utf-8")
    assert "whose mean is 85.2 where table 3 has 85.7" in text


def test_every_benchmark_is_documented():
    assert set(BENCHMARKS) <= {row[0] for row in rows()}
