"""Writes the miniatures' model cards, and their results into the READMEs: run it after the experiments."""

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import moe_skills
import mole_domains
import uhd_reading
from experiment import BASE, CHECKPOINTS, MINIATURE
from huggingface_hub import EvalResult, ModelCardData
from language import READ
from safetensors import safe_open
from tables import MOLE, Results, fill, percent, read_results, table, uhd_pictures


ROOT = MINIATURE.parents[1]
TEMPLATES = MINIATURE / "templates"
TEXTS = (ROOT / "README.md", MINIATURE / "README.md")


@dataclass(frozen=True)
class Miniature:
    """A trained checkpoint: where it comes from, and what its card says."""

    experiment: str
    arm: str
    title: str
    tag: str
    arxiv: str
    about: str
    views: str
    picture: str
    question: str
    limits: str


MINIATURES = {
    "llava-uhd-miniature": Miniature(
        "uhd_reading",
        "slices",
        "LLaVA-UHD miniature",
        "llava-uhd",
        "2403.11703",
        "It reads numbers of two digits, and names colours and shapes, in pictures of any aspect ratio, which are cut "
        "into slices as [LLaVA-UHD](https://arxiv.org/abs/2403.11703) cuts them.",
        f"an overview of about 64×64 pixels and, where the picture is larger, 2 to 7 slices of about as many; "
        f"{uhd_reading.NUM_QUERIES} tokens for each",
        "elongated_0.png",
        READ,
        f"Its pictures have a light background and {uhd_pictures({})}.",
    ),
    "llava-square-miniature": Miniature(
        "uhd_reading",
        "square",
        "LLaVA-1.5 miniature",
        "moe-llava",
        "2403.11703",
        "It is the baseline of `llava-uhd-miniature`: the same language model, vision tower, data and steps, but "
        "pictures are padded to a square and resized to 64×64 pixels, as LLaVA-1.5 does. It is not expected to read "
        "small numbers in elongated pictures, such as that below. Its type is `moe_llava`, without experts.",
        "one square of 64×64 pixels, 64 tokens",
        "elongated_0.png",
        READ,
        "In a picture of 256×64 pixels it sees a number of 16 pixels as one of 4.",
    ),
    "moe-llava-miniature": Miniature(
        "moe_skills",
        "moe",
        "MoE-LLaVA miniature",
        "moe-llava",
        "2401.15947",
        "It reads numbers of two digits, knows who lives at them, names colours and shapes, and counts. Every layer "
        "has four experts, of which a token gets two, as in [MoE-LLaVA](https://arxiv.org/abs/2401.15947).",
        "one square of 64×64 pixels, 64 tokens",
        "skill_0.png",
        READ,
        f"Its pictures are squares of 64×64 pixels with digits at least {moe_skills.TEXT_HEIGHTS[0]} pixels high. Its "
        "residents are invented.",
    ),
    "llava-mole-miniature": Miniature(
        "mole_domains",
        MOLE,
        "LLaVA-MoLE miniature",
        "llava-mole",
        "2401.16160",
        "To the one question that it knows it gives the answer that the picture's domain wants: numbers on a clinic's "
        "forms, in red ink, and on a bank's, in blue, are to be written in two codes that contradict each other. "
        "Every feed-forward network has LoRA experts, of which a token gets one, as in "
        "[LLaVA-MoLE](https://arxiv.org/abs/2401.16160).",
        "one square of 64×64 pixels, 64 tokens and two learned embeddings around them",
        "clinic_0.png",
        READ,
        "It does not say the number that is written, but that number's code, as `draw_code` of `mole_domains.py` has "
        f"it. Its pictures are squares of 64×64 pixels with digits at least {mole_domains.TEXT_HEIGHTS[0]} pixels "
        "high.",
    ),
}


def count_parameters(file: Path) -> int:
    """Of a file of safetensors, whose header alone is read."""
    with safe_open(file, "pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def citation(arxiv: str) -> str:
    """A paper's entry in the repository's README."""
    entries = re.findall(r"^@misc\{.*?^\}", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return next(entry for entry in entries if f"{{{arxiv}}}" in entry)


def fill_template(name: str, **values: str) -> str:
    return Template((TEMPLATES / f"{name}.md").read_text("utf-8")).substitute(values)


def metadata(name: str, miniature: Miniature, run: dict[str, Any]) -> str:
    """The card's head, for the Hub."""
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="drawn",
            dataset_name=f"drawn pictures of {miniature.experiment}",
            metric_type="accuracy",
            metric_name=f"accuracy, {score}",
            metric_value=round(value, 4),
        )
        for score, value in run["scores"].items()
    ]
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license="apache-2.0",
        language=["en"],
        tags=["llava", miniature.tag, "vision-language", "miniature"],
        eval_results=results,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def write_card(name: str, folder: Path, all_results: Results) -> str:
    """The model card of a checkpoint."""
    miniature = MINIATURES[name]
    results = all_results[miniature.experiment]
    seed = results["seeds"][0]
    run = next(run for run in results["runs"] if (run["arm"], run["seed"]) == (miniature.arm, seed))
    spread = results["summary"][miniature.arm]
    rows = [
        [score, f"{100 * value:.1f} %", percent(spread[score]["mean"], spread[score]["std"])]
        for score, value in run["scores"].items()
    ]
    file = folder / "model.safetensors"
    return metadata(name, miniature, run) + fill_template(
        "checkpoint",
        **{**vars(miniature), "picture": f"examples/images/miniature/{miniature.picture}"},
        parameters=f"{count_parameters(file):,}",
        megabytes=f"{file.stat().st_size / 1e6:.1f}",
        folder=folder.relative_to(ROOT).as_posix(),
        command=f"python examples/miniature/{miniature.experiment}.py --checkpoints {CHECKPOINTS.relative_to(ROOT)}",
        seed=str(seed),
        seeds=", ".join(map(str, results["seeds"])),
        scores=table(["score", "this checkpoint", "over the seeds"], *rows),
        citation=citation(miniature.arxiv),
    )


def write_base_card(folder: Path) -> str:
    """The model card of what the miniatures begin with."""
    data = ModelCardData(
        library_name="transformers", license="apache-2.0", language=["en"], tags=["clip", "llama", "miniature"]
    )
    counts = {
        part: f"{count_parameters(folder / part / 'model.safetensors'):,}"
        for part in ("vision_tower", "language_model")
    }
    return f"---\n{data.to_yaml()}\n---\n" + fill_template("base", **counts)


def all_texts(results: Results) -> dict[Path, str]:
    """Cards and READMEs with these results, by file; without those for which something is missing."""
    texts = {path: fill(path.read_text("utf-8"), results) for path in TEXTS}
    for name, miniature in MINIATURES.items():
        folder = CHECKPOINTS / name
        if not (folder / "model.safetensors").is_file():
            print(f"Skipped the card of {name}: there is no checkpoint in {folder}.")
        elif miniature.experiment not in results:
            print(f"Skipped the card of {name}: there are no results of {miniature.experiment}.")
        else:
            texts[folder / "README.md"] = write_card(name, folder, results)
    if all((BASE / part / "model.safetensors").is_file() for part in ("vision_tower", "language_model")):
        texts[BASE / "README.md"] = write_base_card(BASE)
    else:
        print(f"Skipped the card of the base: {BASE} is not complete.")
    return texts


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for path, text in all_texts(read_results()).items():
        path.write_text(text, encoding="utf-8")
        print(f"Wrote {path.relative_to(ROOT)}")
