"""What the three experiments share: training by the recipes' parts, evaluation, seeds side by side, and results."""

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from base import BASE
from PIL import Image
from transformers.utils import logging

from llava_family.training import ConversationCollator, ConversationDataset, LlavaTrainer, LlavaTrainingArguments


MINIATURE = Path(__file__).resolve().parent
sys.path.insert(0, str(MINIATURE.parent / "training"))

# The recipes' own parts; imported by the experiments from here, whatever the order of their imports.
from composing import PartsArguments, compose_llava_mole, compose_llava_uhd, compose_moe_llava  # noqa: E402, F401
from llava_mole_finetune import ExpertArguments, lora_config, with_experts  # noqa: E402, F401


RESULTS = MINIATURE / "results"
CHECKPOINTS = MINIATURE / "checkpoints"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Example:
    """A picture, a question about it, its answer, and the part of an evaluation that it belongs to."""

    image: Image.Image
    question: str
    answer: str
    group: str = ""

    def as_sample(self) -> dict[str, Any]:
        turns = (("human", f"<image>\n{self.question}"), ("gpt", self.answer))
        return {"image": self.image, "conversations": [{"from": who, "value": text} for who, text in turns]}


def train(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    learning_rate: float,
    seed: int,
    batch_size: int = 16,
    template: str = "chat",
    **settings: Any,
) -> list[dict[str, float]]:
    """Trains what is not frozen for one epoch, as the recipes do, and returns the log of losses."""
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="llava-family-miniature-") as folder:
        arguments = LlavaTrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            weight_decay=0.0,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            **settings,
        )
        trainer = LlavaTrainer(
            model=model,
            args=arguments,
            train_dataset=ConversationDataset([example.as_sample() for example in examples]),
            data_collator=ConversationCollator(processor, template),
            processing_class=processor,
        )
        trainer.train()
    model.eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def answers_of(model: Any, processor: Any, examples: Sequence[Example], batch_size: int = 32) -> list[str]:
    """The model's greedy answers."""
    answers: list[str] = []
    # Pictures of one size are encoded together.
    order = sorted(range(len(examples)), key=lambda index: examples[index].image.size)
    for start in range(0, len(order), batch_size):
        messages = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": example.image}, {"type": "text", "text": example.question}],
                }
            ]
            for example in (examples[index] for index in order[start : start + batch_size])
        ]
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        ).to(model.device)
        generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers += processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    given = dict(zip(order, answers, strict=True))
    return [given[index].strip() for index in range(len(examples))]


def accuracies(model: Any, processor: Any, examples: Sequence[Example]) -> dict[str, float]:
    """Part of exactly right answers, by group."""
    right: dict[str, list[bool]] = {}
    for example, given in zip(examples, answers_of(model, processor, examples), strict=True):
        right.setdefault(example.group, []).append(given == example.answer)
    return {group: sum(values) / len(values) for group, values in right.items()}


def save_checkpoint(model: Any, processor: Any, folder: Path) -> None:
    """Writes a checkpoint that loads with Auto classes."""
    model.save_pretrained(folder, save_original_format=False)
    processor.save_pretrained(folder)


@dataclass(frozen=True)
class Run:
    """One training of an experiment."""

    arm: str
    seed: int
    prepared: Path  # what all runs begin with
    checkpoint: Path | None  # where to save what was trained


def run_experiment(
    name: str,
    title: str,
    arms: Sequence[str],
    run: Callable[[Run], dict[str, Any]],
    saved: dict[str, str],
    prepare: Callable[[Path], None] | None = None,
) -> None:
    """Runs all arms with all seeds, two at a time, and writes `results/<name>.json`.

    Args:
        name (`str`): Of the experiment.
        title (`str`): What it is about.
        arms (`Sequence[str]`): What is compared.
        run (`Callable`): Trains one, and returns `{"scores": {name: accuracy}, ...}`; a function of a module.
        saved (`dict[str, str]`): Names of the checkpoints to keep, of the first seed, by arm.
        prepare (`Callable`, *optional*): Writes what all runs begin with to a folder.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--arms", nargs="+", default=list(arms), choices=list(arms))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, of one thread each")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--checkpoints", type=Path, help="folder for the trained checkpoints of the first seed")
    options = parser.parse_args()
    if not (BASE / "language_model").is_dir():
        raise SystemExit(f"{BASE} has no language model. Make it first: python examples/miniature/base.py")
    start, records = time.perf_counter(), []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(options.jobs, _use_one_thread) as pool:
        if prepare is not None:
            pool.apply(prepare, [Path(folder)])
            print(f"[{time.perf_counter() - start:.0f} s] First stages are trained.", flush=True)
        runs = [
            Run(
                arm,
                seed,
                Path(folder),
                options.checkpoints and options.checkpoints / saved[arm]
                if arm in saved and seed == options.seeds[0]
                else None,
            )
            for seed in options.seeds
            for arm in options.arms
        ]
        for record in pool.imap_unordered(_Timed(run), runs):
            records.append(record)
            scores = ", ".join(f"{key} {value:.1%}" for key, value in record["scores"].items())
            elapsed = time.perf_counter() - start
            remaining = elapsed / len(records) * (len(runs) - len(records))
            print(
                f"[{len(records)}/{len(runs)}, {elapsed:.0f} s, about {remaining:.0f} s to go] "
                f"{record['arm']}, seed {record['seed']}: {scores}",
                flush=True,
            )
    records.sort(key=lambda record: (options.arms.index(record["arm"]), record["seed"]))
    results = {
        "experiment": name,
        "title": title,
        "seeds": options.seeds,
        "summary": {arm: summarise([each for each in records if each["arm"] == arm]) for arm in options.arms},
        "runs": records,
        "seconds": round(time.perf_counter() - start),
        "machine": f"{describe_jobs(options.jobs)}, {platform.machine()}, torch {torch.__version__}",
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"Wrote {path}")


def describe_jobs(jobs: int) -> str:
    return f"{jobs} {'process' if jobs == 1 else 'processes'} of one thread"


class _Timed:
    """A run, and how long it took."""

    def __init__(self, run: Callable[[Run], dict[str, Any]]):
        self.run = run

    def __call__(self, run: Run) -> dict[str, Any]:
        start = time.perf_counter()
        result = self.run(run)
        return {"arm": run.arm, "seed": run.seed, **result, "seconds": round(time.perf_counter() - start)}


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the seeds, of every score."""
    scores = {name: [record["scores"][name] for record in records] for name in records[0]["scores"]}
    return {
        name: {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}
        for name, values in scores.items()
    }
