"""MoE-LLaVA in miniature: several skills in one model, with experts and without.

All models begin with the same first stage. "dense" and "moe" go on with the same dense second stage. In the third one
the feed-forward networks, routers and projector learn on: of four experts, copies of the dense networks, two for every
token; or of dense networks that are widened to as many activated parameters. "moe without stage 2" learns all data in
the third stage's way, as in the paper's ablation (section 4.3).
"""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from experiment import (
    BASE,
    Example,
    PartsArguments,
    Run,
    accuracies,
    answers_of,
    compose_moe_llava,
    run_experiment,
    save_checkpoint,
    train,
)
from language import CHAT_TEMPLATE, COLOUR_OF, COUNT, LIVES, PEOPLE, READ, SHAPE_OF, caption_of
from torch import nn
from transformers import set_seed
from world import Scene, draw_scene

from llava_family import MoeLlavaForCausalLM, MoeLlavaProcessor, RoutingRecorder
from llava_family.training import (
    freeze_for_finetuning,
    freeze_for_moe_tuning,
    freeze_for_pretraining,
    upcycle,
)


SIZE, TEXT_HEIGHTS = (64, 64), (12, 28)
NUM_EXPERTS, TOP_K = 4, 2
PREPARED_SEED = 0
CAPTIONS, FIRST_QUESTIONS, QUESTIONS, EVALUATED = 4000, 12_000, 8000, 150
SKILLS = ("reading", "residents", "colours", "shapes", "counting")
# Who lives at each number, which no picture tells
RESIDENTS = random.Random("residents").choices(PEOPLE, k=100)


def ask(rng: random.Random, skill: str, scene: Scene) -> tuple[str, str] | None:
    """A question and its answer; None where the scene has nothing to ask about."""
    if skill == "reading":
        return READ, scene.number
    if skill == "residents":
        return LIVES, RESIDENTS[int(scene.number)]
    if skill == "counting":
        return COUNT, str(len(scene.shapes))
    if not scene.shapes:
        return None
    colour, shape = rng.choice(scene.shapes).split()
    return (COLOUR_OF.format(shape), colour) if skill == "colours" else (SHAPE_OF.format(colour), shape)


def draw_captions(seed: int, count: int) -> Iterator[Example]:
    rng = random.Random(f"moe captions {seed}")
    for _ in range(count):
        scene = draw_scene(rng, SIZE, TEXT_HEIGHTS)
        yield Example(scene.image, "Describe the picture.", caption_of(scene.number, scene.shapes))


def draw_questions(name: str, skills: tuple[str, ...], seed: int, count: int) -> Iterator[Example]:
    """`count` questions, about equally many of each skill."""
    rng, drawn = random.Random(f"moe {name} {seed}"), 0
    while drawn < count:
        skill = rng.choice(skills)
        scene = draw_scene(rng, SIZE, TEXT_HEIGHTS)
        asked = ask(rng, skill, scene)
        if asked:
            drawn += 1
            yield Example(scene.image, *asked, skill)


@torch.no_grad()
def widen(model: Any, intermediate_size: int, generator: torch.Generator) -> None:
    """More neurons in every feed-forward network; new ones add nothing yet."""
    for layer in model.model.language_model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(layer.mlp, name)
            new = nn.Linear(
                *(
                    (old.in_features, intermediate_size)
                    if name != "down_proj"
                    else (intermediate_size, old.out_features)
                ),
                bias=False,
            )
            nn.init.normal_(new.weight, std=model.config.text_config.initializer_range, generator=generator)
            if name == "down_proj":
                new.weight.zero_()
            new.weight[: old.out_features, : old.in_features] = old.weight
            setattr(layer.mlp, name, new)
    model.config.text_config.intermediate_size = intermediate_size


def count_activated(model: Any) -> int:
    """Parameters of the language model's layers that a token meets: all, but of the experts those of its two."""
    layers = [(name, parameter) for name, parameter in model.named_parameters() if "language_model.layers." in name]
    return sum(
        parameter.numel() * TOP_K // NUM_EXPERTS if ".experts." in name else parameter.numel()
        for name, parameter in layers
    )


def make_experts(model: Any) -> Any:
    """Four experts in every layer, so that the dense model of as many activated parameters is wider in every layer."""
    return upcycle(model, num_experts=NUM_EXPERTS, top_k=TOP_K, moe_layers="dense")


def make_wide(model: Any, seed: int) -> Any:
    """As many activated parameters, those of the routers too."""
    config = model.config.text_config
    routers_share = math.ceil(NUM_EXPERTS / 3)  # neurons of three matrices that have a router's parameters
    widen(model, TOP_K * config.intermediate_size + routers_share, torch.Generator().manual_seed(seed))
    return model


def prepare(folder: Path) -> None:
    """The first stage, and the dense second one, which all runs share."""
    set_seed(PREPARED_SEED)
    model, processor = compose_moe_llava(PartsArguments(str(BASE / "language_model"), str(BASE / "vision_tower")))
    processor.chat_template = CHAT_TEMPLATE
    freeze_for_pretraining(model)
    captions = list(draw_captions(PREPARED_SEED, CAPTIONS))
    train(model, processor, captions, 3e-3, PREPARED_SEED, batch_size=32, template="plain")
    save_checkpoint(model, processor, folder / "first")
    freeze_for_finetuning(model)
    train(model, processor, draw_first(PREPARED_SEED), 2e-3, PREPARED_SEED)
    save_checkpoint(model, processor, folder / "second")


def draw_first(seed: int) -> list[Example]:
    """What the second stage learns, or the third one where there is no second."""
    return list(draw_questions("first", SKILLS, seed, FIRST_QUESTIONS))


def run(run: Run) -> dict[str, Any]:
    """The third stage of one arm with one seed."""
    set_seed(run.seed)
    learned = list(draw_questions("second", SKILLS, run.seed, QUESTIONS))
    folder = run.prepared / "second"
    if run.arm == "moe without stage 2":
        folder, learned = run.prepared / "first", draw_first(run.seed) + learned
    model, processor = MoeLlavaForCausalLM.from_pretrained(folder), MoeLlavaProcessor.from_pretrained(folder)
    model = make_wide(model, run.seed) if run.arm == "dense" else make_experts(model)
    freeze_for_moe_tuning(model)
    losses = train(model, processor, learned, 2e-3, run.seed)
    evaluation = [
        example for skill in SKILLS for example in draw_questions(f"evaluation {skill}", (skill,), run.seed, EVALUATED)
    ]
    found = accuracies(model, processor, evaluation)
    result: dict[str, Any] = {
        "scores": {**found, "all": sum(found.values()) / len(found)},
        "activated_parameters": count_activated(model),
        "losses": [round(entry["loss"], 4) for entry in losses],
    }
    if run.arm != "dense":
        result["loads"] = expert_loads(model, processor, evaluation)
    if run.checkpoint is not None:
        save_checkpoint(model, processor, run.checkpoint)
    return result


def expert_loads(model: Any, processor: Any, examples: list[Example]) -> dict[str, list[list[float]]]:
    """Share of the tokens of each modality that goes to each expert, by layer."""
    recorder = RoutingRecorder(model, processor)
    with recorder:
        answers_of(model, processor, examples)
    return {name: recorder.loads(name).tolist() for name in ("text", "image")}


ARMS = ("dense", "moe", "moe without stage 2")

if __name__ == "__main__":
    run_experiment("moe_skills", __doc__, ARMS, run, {"moe": "moe-llava-miniature"}, prepare)
