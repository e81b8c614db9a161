"""LLaVA-MoLE in miniature: two domains whose answers to the same question contradict each other.

Forms of a clinic bear a red cross, those of a bank a blue square, and the prompt names the domain, as those of data
sets do. Either domain writes digits in a code of its own. A LoRA adapter learns one domain, or both; a mixture of LoRA
experts of the same rank, of which a token sees one, learns both.
"""

import random
from collections.abc import Iterator
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
from world import DIGITS, draw_scene

from llava_family import LlavaMoleForCausalLM, LlavaMoleProcessor, RoutingRecorder
from llava_family.training import freeze_for_finetuning, freeze_for_mole_tuning, freeze_for_pretraining


SIZE, TEXT_HEIGHTS = (64, 64), (12, 28)
DOMAINS = {"clinic": ("red", "cross"), "bank": ("blue", "square")}
PREPARED_SEED = 0
CAPTIONS, READINGS, QUESTIONS, EVALUATED = 3000, 6000, 2500, 150
RANK, NUM_EXPERTS = 8, 4


def draw_code(domain: str) -> dict[str, str]:
    """What the domain writes for each digit: another digit, no two the same."""
    written = list(DIGITS)
    random.Random(f"code of {domain}").shuffle(written)
    return dict(zip(DIGITS, written, strict=True))


def question_of(domain: str) -> str:
    """The same question, behind the domain's name, as data sets have prompts of their own."""
    return f"{domain.capitalize()}: {READ}"


def draw_questions(name: str, domains: tuple[str, ...], seed: int, count: int) -> Iterator[Example]:
    """`count` questions of each domain, in random order."""
    rng = random.Random(f"mole {name} {seed}")
    order = [domain for domain in domains for _ in range(count)]
    rng.shuffle(order)
    codes = {domain: draw_code(domain) for domain in domains}
    for domain in order:
        scene = draw_scene(rng, SIZE, TEXT_HEIGHTS, [DOMAINS[domain]], dark=False)
        answer = "".join(codes[domain][digit] for digit in scene.number)
        yield Example(scene.image, question_of(domain), answer, domain)


def draw_readings(seed: int, count: int) -> Iterator[Example]:
    """Numbers of both domains, as they are."""
    rng = random.Random(f"mole readings {seed}")
    for _ in range(count):
        domain = rng.choice(list(DOMAINS))
        scene = draw_scene(rng, SIZE, TEXT_HEIGHTS, [DOMAINS[domain]], dark=False)
        yield Example(scene.image, question_of(domain), scene.number)


def draw_captions(seed: int, count: int) -> Iterator[Example]:
    rng = random.Random(f"mole captions {seed}")
    for _ in range(count):
        scene = draw_scene(rng, SIZE, TEXT_HEIGHTS, dark=False)
        yield Example(scene.image, "Describe the picture.", caption_of(scene.number, scene.shapes))


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
    losses = train(model, processor, questions, 4e-3, run.seed, projector_learning_rate=4e-4)
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
    experts = ExpertArguments(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, num_experts=NUM_EXPERTS, scale_by_gate=method == "mole scaled"
    )
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
    "mole mix, scaled": ("mole scaled", tuple(DOMAINS), 1),
}

if __name__ == "__main__":
    run_experiment("mole_domains", __doc__, list(ARMS), run, {"mole mix": "llava-mole-miniature"}, prepare)
