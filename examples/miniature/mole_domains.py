"""LLaVA-MoLE in miniature: two domains whose answers to the same question contradict each other.

Forms of a clinic are written in red ink, those of a bank in blue, and either domain wants digits in a code of its
own. A LoRA adapter learns one domain, or both; a mixture of LoRA experts of the same rank, of which a token sees one,
learns both.
"""

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from experiment import (
    BASE,
    Example,
    ExpertArguments,
    PartsArguments,
    Run,
    accuracies,
    answers_of,
    compose_llava_mole,
    lora_config,
    run_experiment,
    save_checkpoint,
    train,
    with_experts,
)
from language import CHAT_TEMPLATE, READ, caption_of
from peft import get_peft_model
from transformers import set_seed
from world import DIGITS, INKS, draw_scene

from llava_family import LlavaMoleForCausalLM, LlavaMoleProcessor, RoutingRecorder
from llava_family.training import freeze_for_finetuning, freeze_for_mole_tuning, freeze_for_pretraining


SIZE, TEXT_HEIGHTS = (64, 64), (12, 28)
DOMAINS = {"clinic": "red", "bank": "blue"}  # inks
PREPARED_SEED = 0
CAPTIONS, READINGS, QUESTIONS, EVALUATED = 3000, 3000, 2500, 100
RANK, NUM_EXPERTS, LEARNING_RATE = 2, 4, 4e-3


@cache
def draw_code(domain: str) -> dict[str, str]:
    """What the domain writes for each digit; no two are written the same."""
    return dict(zip(DIGITS, random.Random(f"code of {domain}").sample(DIGITS, len(DIGITS)), strict=True))


def encode(domain: str, number: str) -> str:
    """What the domain writes for a number."""
    code = draw_code(domain)
    return "".join(code[digit] for digit in number)


def draw_questions(name: str, domains: tuple[str, ...], seed: int, count: int) -> Iterator[Example]:
    """`count` questions of each domain, in random order."""
    rng = random.Random(f"mole {name} {seed}")
    order = [domain for domain in domains for _ in range(count)]
    rng.shuffle(order)
    for domain in order:
        scene = draw_scene(rng, SIZE, TEXT_HEIGHTS, dark=False, inks=(DOMAINS[domain],))
        yield Example(scene.image, READ, encode(domain, scene.number), domain)


def draw_readings(seed: int, count: int) -> Iterator[Example]:
    """Numbers of both domains, as they are."""
    rng = random.Random(f"mole readings {seed}")
    for _ in range(count):
        scene = draw_scene(rng, SIZE, TEXT_HEIGHTS, dark=False, inks=tuple(DOMAINS.values()))
        yield Example(scene.image, READ, scene.number)


def draw_captions(seed: int, count: int) -> Iterator[Example]:
    rng = random.Random(f"mole captions {seed}")
    for _ in range(count):
        scene = draw_scene(rng, SIZE, TEXT_HEIGHTS, dark=False, inks=(None, *INKS))
        yield Example(scene.image, "Describe the picture.", caption_of(scene.number, scene.shapes, scene.ink))


def prepare(folder: Path) -> None:
    """What all runs begin with: a model that reads numbers of both domains as they are.

    The paper begins behind the first stage. Here the language model is too small to read by a projector alone.
    """
    set_seed(PREPARED_SEED)
    parts = PartsArguments(str(BASE / "language_model"), str(BASE / "vision_tower"))
    model, processor = compose_llava_mole(parts)
    processor = LlavaMoleProcessor(
        processor.image_processor,
        processor.tokenizer,
        num_image_tokens=processor.num_image_tokens,
        prompt_style="v1",
        chat_template=CHAT_TEMPLATE,
    )
    freeze_for_pretraining(model)
    captions = list(draw_captions(PREPARED_SEED, CAPTIONS))
    train(model, processor, captions, 3e-3, PREPARED_SEED, batch_size=32, template="plain")
    freeze_for_finetuning(model)
    train(model, processor, list(draw_readings(PREPARED_SEED, READINGS)), 1e-3, PREPARED_SEED)
    save_checkpoint(model, processor, folder)


def run(run: Run) -> dict[str, Any]:
    """The second stage of one arm with one seed."""
    set_seed(run.seed)
    method, domains, samples = ARMS[run.arm]
    model = LlavaMoleForCausalLM.from_pretrained(run.prepared)
    processor = LlavaMoleProcessor.from_pretrained(run.prepared)
    model = add_adapters(model, method)
    questions = list(draw_questions("training", domains, run.seed, samples * QUESTIONS))
    losses = train(model, processor, questions, LEARNING_RATE, run.seed, projector_learning_rate=LEARNING_RATE / 10)
    evaluation = list(draw_questions("evaluation", domains, run.seed, EVALUATED))
    found = accuracies(model, processor, evaluation)
    result: dict[str, Any] = {"scores": found, "losses": [round(entry["loss"], 4) for entry in losses]}
    if method != "lora":
        result["loads"] = domain_loads(model, processor, evaluation)
    if run.checkpoint is not None:
        save_checkpoint(model, processor, run.checkpoint)
    return result


def add_adapters(model: Any, method: str) -> Any:
    """LoRA, or a mixture of LoRA experts of the same rank, in the place of nothing."""
    experts = ExpertArguments(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, num_experts=NUM_EXPERTS)
    if method == "lora":
        return get_peft_model(model, lora_config(experts))
    tensors = model.state_dict()
    adapted = LlavaMoleForCausalLM(with_experts(model.config, experts))
    missing, unexpected = adapted.load_state_dict(tensors, strict=False)
    if unexpected or any(".mole_" not in name for name in missing):
        raise ValueError(f"The dense model does not fit: {unexpected or missing}")
    adapted.generation_config = model.generation_config
    freeze_for_mole_tuning(adapted)
    return adapted


def domain_loads(model: Any, processor: Any, examples: list[Example]) -> dict[str, list[list[float]]]:
    """Share of the tokens of each domain that goes to each expert, by layer."""
    with RoutingRecorder(model, processor) as recorder:
        for domain in DOMAINS:
            with recorder.domain(domain):
                answers_of(model, processor, [example for example in examples if example.group == domain])
    return {domain: recorder.loads(domain=domain).tolist() for domain in DOMAINS}


# Method, domains, and how many times QUESTIONS samples of each domain
ARMS = {
    "lora clinic": ("lora", ("clinic",), 1),
    "lora bank": ("lora", ("bank",), 1),
    "lora mix": ("lora", tuple(DOMAINS), 1),
    "lora mix, 2x samples": ("lora", tuple(DOMAINS), 2),
    "mole mix": ("mole", tuple(DOMAINS), 1),
}

if __name__ == "__main__":
    run_experiment("mole_domains", __doc__, list(ARMS), run, {"mole mix": "llava-mole-miniature"}, prepare)
