"""LLaVA-UHD in miniature: small numbers anywhere in large and elongated pictures.

Two models of the same language model, vision tower, data and number of steps. "slices" cuts pictures adaptively, as
LLaVA-UHD does. "square" pads them and resizes them to the vision tower's resolution, as LLaVA-1.5 does.
"""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

from experiment import (
    BASE,
    Example,
    PartsArguments,
    Run,
    accuracies,
    compose_llava_uhd,
    compose_moe_llava,
    run_experiment,
    save_checkpoint,
    train,
)
from language import CHAT_TEMPLATE, COLOUR_OF, READ, SHAPE_OF, caption_of
from transformers import set_seed
from world import draw_scene

from llava_family.training import freeze_for_finetuning, freeze_for_pretraining


# (width, height)
SIZES = ((64, 64), (128, 64), (64, 128), (192, 64), (64, 192), (256, 64), (64, 256))
TEXT_HEIGHTS = {"13-16": (13, 16), "17-23": (17, 23), "24-32": (24, 32)}
NUM_QUERIES = 36
# The split of the claim: where a square of 64 pixels leaves the text no more than five pixels high
SMALL_TEXT, LONG_SIDE = "13-16", 192
CAPTIONS, QUESTIONS, EVALUATED = 5000, 14_000, 50


def draw_captions(seed: int, count: int) -> Iterator[Example]:
    """Stage 1: small pictures with captions."""
    rng = random.Random(f"captions {seed}")
    for _ in range(count):
        scene = draw_scene(rng, (64, 64), (12, 32), dark=False)
        yield Example(scene.image, "Describe the picture.", caption_of(scene.number, scene.shapes))


def draw_questions(seed: int, count: int) -> Iterator[Example]:
    """Stage 2: pictures of all sizes with questions, most of them about the number, which is small in half of them."""
    rng = random.Random(f"questions {seed}")
    for _ in range(count):
        heights = TEXT_HEIGHTS[rng.choice([SMALL_TEXT, *TEXT_HEIGHTS])]
        scene = draw_scene(rng, rng.choice(SIZES), heights, dark=False)
        question, answer = READ, scene.number
        if scene.shapes and rng.random() < 0.2:
            colour, shape = rng.choice(scene.shapes).split()
            question, answer = rng.choice(((COLOUR_OF.format(shape), colour), (SHAPE_OF.format(colour), shape)))
        yield Example(scene.image, question, answer)


def draw_evaluation(seed: int, count: int) -> Iterator[Example]:
    """`count` new pictures for every length and text height."""
    rng = random.Random(f"evaluation {seed}")
    for size in SIZES:
        for name, heights in TEXT_HEIGHTS.items():
            for _ in range(count):
                scene = draw_scene(rng, size, heights, dark=False)
                yield Example(scene.image, READ, scene.number, f"{size[0]}x{size[1]} {name}")


def run(run: Run) -> dict[str, Any]:
    """Both stages of one arm with one seed."""
    set_seed(run.seed)
    model, processor = ARMS[run.arm](PartsArguments(str(BASE / "language_model"), str(BASE / "vision_tower")))
    processor.chat_template = CHAT_TEMPLATE
    freeze_for_pretraining(model)
    captions = list(draw_captions(run.seed, CAPTIONS))
    losses = train(model, processor, captions, 3e-3, run.seed, batch_size=32, template="plain")
    freeze_for_finetuning(model)
    losses += train(model, processor, list(draw_questions(run.seed, QUESTIONS)), 2e-3, run.seed)
    found = accuracies(model, processor, list(draw_evaluation(run.seed, EVALUATED)))
    small = [value for group, value in found.items() if is_small(group)]
    scores = {"small text": sum(small) / len(small), "all": sum(found.values()) / len(found)}
    if run.checkpoint is not None:
        save_checkpoint(model, processor, run.checkpoint)
    return {"scores": scores, "groups": found, "losses": [round(entry["loss"], 4) for entry in losses]}


def is_small(group: str) -> bool:
    size, heights = group.split()
    return heights == SMALL_TEXT and max(map(int, size.split("x"))) >= LONG_SIDE


ARMS = {
    "slices": partial(compose_llava_uhd, num_queries=NUM_QUERIES, num_heads=4),
    "square": compose_moe_llava,
}

if __name__ == "__main__":
    run_experiment(
        "uhd_reading", __doc__, list(ARMS), run, {"slices": "llava-uhd-miniature", "square": "llava-square-miniature"}
    )
