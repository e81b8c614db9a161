"""Asks the miniatures about pictures that they have never seen, and draws what they do: `make demo`.

They are models of under a million parameters that examples/miniature trained by the papers' recipes. LLaVA-UHD reads
small numbers in elongated pictures, which the same language model with LLaVA-1.5's square view cannot. MoE-LLaVA sends
tokens to experts, and LLaVA-MoLE answers one question in the codes of two domains.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from llava_family import RoutingRecorder
from llava_family.inspection.routing_plots import plot_domain_routing, plot_expert_loads, plot_image_routing
from llava_family.inspection.slicing_plots import plot_slices


EXAMPLES = Path(__file__).resolve().parent
CHECKPOINTS = EXAMPLES / "miniature" / "checkpoints"
PICTURES = EXAMPLES / "images" / "miniature"
TITLES = {
    "llava-uhd-miniature": "LLaVA-UHD, slices",
    "llava-square-miniature": "LLaVA-1.5, square",
    "moe-llava-miniature": "MoE-LLaVA",
    "llava-mole-miniature": "LLaVA-MoLE",
}


def load(name: str) -> tuple[Any, Any]:
    """A checkpoint's model and processor."""
    folder = CHECKPOINTS / name
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def answer(model: Any, processor: Any, image: Image.Image, question: str) -> str:
    """The model's greedy answer."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def ask(models: dict[str, tuple[Any, Any]], questions: list[dict[str, str]]) -> Table:
    """A table of what several models answer to the same questions."""
    table = Table("picture", "pixels", "question", *(TITLES[name] for name in models), "truth", box=SIMPLE)
    for item in questions:
        image = Image.open(PICTURES / item["image"]).convert("RGB")
        answers = [answer(*model, image, item["question"]) for model in models.values()]
        marked = [f"[green]{given}[/]" if given == item["answer"] else f"[red]{given}[/]" for given in answers]
        table.add_row(item["image"], f"{image.width}×{image.height}", item["question"], *marked, item["answer"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for the pictures")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    console, start = Console(width=120), time.perf_counter()
    questions = json.loads((PICTURES / "questions.json").read_text("utf-8"))

    console.print("[bold]Small numbers in elongated pictures[/]")
    sliced, square = load("llava-uhd-miniature"), load("llava-square-miniature")
    console.print(ask({"llava-uhd-miniature": sliced, "llava-square-miniature": square}, questions["uhd"]))
    first = Image.open(PICTURES / questions["uhd"][0]["image"])
    plot_slices(first, sliced[1], output / "slices.png")

    console.print("[bold]Many skills, four experts[/]")
    model, processor = load("moe-llava-miniature")
    with RoutingRecorder(model, processor) as recorder:
        console.print(ask({"moe-llava-miniature": (model, processor)}, questions["moe"]))
    plot_expert_loads(recorder, output / "routing.png")
    first = Image.open(PICTURES / questions["moe"][0]["image"]).convert("RGB")
    plot_image_routing(first, recorder, path=output / "routing_over_image.png")

    console.print("[bold]One question, two domains[/]")
    model, processor = load("llava-mole-miniature")
    with RoutingRecorder(model, processor) as recorder:
        for domain in dict.fromkeys(item["domain"] for item in questions["mole"]):
            with recorder.domain(domain):
                own = [item for item in questions["mole"] if item["domain"] == domain]
                console.print(ask({"llava-mole-miniature": (model, processor)}, own))
    plot_domain_routing(recorder, path=output / "routing_by_domain.png")

    names = ", ".join(sorted(path.name for path in output.glob("*.png")))
    console.print(f"Drew {names} in {output}, {time.perf_counter() - start:.0f} s in all.", highlight=False)


if __name__ == "__main__":
    main()
