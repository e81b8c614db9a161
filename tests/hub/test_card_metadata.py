"""Every card has its sections, and metadata that the Hub accepts; what the Hub checks on a push is checked offline.

`ModelCard.validate` asks the Hub, so its rules are repeated here: those of hub-docs' `modelcard.md` and its list of
licences, and the tasks of huggingface.js, as far as cards here use them or are likely to.
"""

import re
from pathlib import Path
from string import Template

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id


ROOT = Path(__file__).parents[2]
RELEASES = [path for path in sorted(ROOT.glob("model_cards/*.md")) if path.stem != "mole-adapter"]
ADAPTER = ROOT / "model_cards" / "mole-adapter.md"
MINIATURES = sorted(ROOT.glob("examples/miniature/checkpoints/*/README.md"))
BASE = ROOT / "examples" / "miniature" / "base" / "README.md"
GENERIC = ROOT / "src" / "llava_family" / "hub" / "generic_card.md"

TRAINED = ("Usage", "Training", "Evaluation", "Conversion", "Limits", "Licence", "Citation")
SECTIONS = {
    **dict.fromkeys(RELEASES, (*TRAINED, "Prompt format")),
    **dict.fromkeys(MINIATURES, TRAINED),
    ADAPTER: TRAINED,
    BASE: ("Usage", "Training", "Limits", "Licence"),
    GENERIC: ("Usage", "Weights", "Prompt format", "What is not known"),
}

LICENSES = {"afl-3.0", "agpl-3.0", "apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "gpl-3.0"}
LICENSES |= {"llama2", "llama3", "mit", "mpl-2.0", "openrail", "other", "unknown"}
TASKS = {"image-text-to-text", "text-generation", "visual-question-answering", "image-to-text"}
LIBRARIES = {"peft", "transformers"}
RELATIONS = {"adapter", "finetune", "merge", "quantized"}
KEYS = {"base_model", "base_model_relation", "datasets", "language", "library_name", "license", "license_link"}
KEYS |= {"license_name", "model-index", "pipeline_tag", "tags"}


def many(value):
    return [] if value is None else value if isinstance(value, list) else [value]


def problems_of(text):
    """What the Hub would refuse, or not understand, in the metadata of a card."""
    head = re.match(r"---\n(.*?\n)---\n", text, flags=re.DOTALL)
    if not head:
        return ["there is no metadata"]
    data, found = yaml.safe_load(head[1]), []
    found += [f"unknown key {key}" for key in sorted(set(data) - KEYS)]
    for key, known in (("license", LICENSES), ("library_name", LIBRARIES)):
        if data.get(key) not in known:
            found.append(f"{key}: {data.get(key)}")
    if "pipeline_tag" in data and data["pipeline_tag"] not in TASKS:
        found.append(f"pipeline_tag: {data['pipeline_tag']}")
    named = ("license_name" in data) + ("license_link" in data)
    if named != (2 if data.get("license") == "other" else 0):
        found.append("license_name and license_link belong to `license: other`, both")
    if "license_name" in data and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", data["license_name"]):
        found.append(f"license_name: {data['license_name']}")
    if "license_link" in data and not re.fullmatch(r"https://\S+|LICENSE(\.\w+)?", data["license_link"]):
        found.append(f"license_link: {data['license_link']}")
    for key in ("base_model", "datasets"):
        for name in many(data.get(key)):
            try:
                validate_repo_id(name)
                assert name.count("/") == 1
            except (HFValidationError, AssertionError):
                found.append(f"{key}: {name}")
    if "base_model_relation" in data and not (data.get("base_model") and data["base_model_relation"] in RELATIONS):
        found.append(f"base_model_relation: {data['base_model_relation']}")
    found += [f"language: {code}" for code in many(data.get("language")) if not re.fullmatch("[a-z]{2,3}", str(code))]
    tags = many(data.get("tags"))
    found += [f"tag: {tag}" for tag in tags if not re.fullmatch(r"[a-z0-9_-]{1,100}", str(tag))]
    if len(tags) != len(set(tags)):
        found.append("tags are repeated")
    found += [problem for model in data.get("model-index", []) for problem in problems_of_results(model)]
    return found


def problems_of_results(model):
    found = [] if model.get("name") else ["model-index: no name"]
    for result in model.get("results") or [{}]:
        task, dataset = result.get("task", {}), result.get("dataset", {})
        if task.get("type") not in TASKS or not dataset.get("type") or not dataset.get("name"):
            found.append(f"model-index: task {task}, dataset {dataset}")
        for metric in result.get("metrics") or [{}]:
            if not metric.get("type") or not isinstance(metric.get("value"), int | float):
                found.append(f"model-index: metric {metric}")
    return found


def text_of(path):
    text = path.read_text("utf-8")
    return Template(text).safe_substitute(tag="llava-uhd") if path == GENERIC else text


@pytest.mark.parametrize("path", SECTIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_metadata(path):
    assert problems_of(text_of(path)) == []
    card = ModelCard(text_of(path))  # raises for a model index that it cannot read
    assert bool(card.data.eval_results) == (path in MINIATURES)


@pytest.mark.parametrize("path", SECTIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_sections(path):
    parts = re.split(r"^## (.+)$", path.read_text("utf-8"), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(SECTIONS[path]) <= set(sections)
    assert path == GENERIC or all(len(content.strip()) > 40 for content in sections.values())
    assert "```python" in sections["Usage"]
    if "Citation" in SECTIONS[path]:
        assert re.search(r"```bibtex\n@misc\{", sections["Citation"])


@pytest.mark.parametrize("path", RELEASES, ids=lambda path: path.stem)
def test_release_cards_say_who_measured_and_how_to_convert(path):
    parts = re.split(r"^## (.+)$", path.read_text("utf-8"), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert re.search(r"```bash\npython conversion_scripts/convert_\w+_weights_to_hf.py", sections["Conversion"])
    evaluation = sections["Evaluation"]
    assert evaluation.strip().startswith("No benchmark was run with this conversion, and the package's tests run tiny")
    assert "`examples/evaluate.py` of `llava-family` evaluates this model so" in evaluation
    assert re.search(r"^\| .*TextVQA", evaluation, flags=re.MULTILINE)
    assert "Measured by the authors, table 3" in evaluation or "second-hand quotations" in evaluation
    # The licence is no more sure than its sources: either it is open, or the card names what speaks against it.
    assert re.search(r"has no LICENSE file|was not established", sections["Licence"])


CARD = {
    "library_name": "transformers",
    "license": "other",
    "license_name": "see-below",
    "license_link": "https://huggingface.co/a/b",
    "base_model": "a/b",
    "language": ["en"],
    "tags": ["llava"],
    "model-index": [
        {
            "name": "m",
            "results": [
                {
                    "task": {"type": "image-text-to-text"},
                    "dataset": {"type": "drawn", "name": "d"},
                    "metrics": [{"type": "accuracy", "value": 0.5}],
                }
            ],
        }
    ],
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"license": "apache 2"}, "license: apache 2"),
        ({"license": "mit"}, "license_name and license_link belong to `license: other`, both"),
        ({"license_link": "nowhere"}, "license_link: nowhere"),
        ({"license_name": "See below"}, "license_name: See below"),
        ({"pipeline_tag": "image-text"}, "pipeline_tag: image-text"),
        ({"base_model": "vicuna"}, "base_model: vicuna"),
        ({"base_model": "a//b"}, "base_model: a//b"),
        ({"datasets": ["a/b", "c/d/e"]}, "datasets: c/d/e"),
        ({"base_model_relation": "copy"}, "base_model_relation: copy"),
        ({"language": ["English"]}, "language: English"),
        ({"tags": ["llava", "llava"]}, "tags are repeated"),
        ({"tags": ["LLaVA 1.5"]}, "tag: LLaVA 1.5"),
        ({"licence": "mit"}, "unknown key licence"),
        ({"model-index": [{"results": []}]}, "model-index: no name"),
    ],
)
def test_what_the_hub_would_refuse(change, problem):
    text = f"---\n{yaml.safe_dump({**CARD, **change})}---\n"
    found = problems_of(text)
    assert found[:1] == ([problem] if problem else [])
