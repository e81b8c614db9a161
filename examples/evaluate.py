"""Evaluates a checkpoint on local files of TextVQA, POPE, ScienceQA, MMBench or GQA, as its paper did.

Answers go to a file while they are given. Interrupted, run it again: it goes on where it stopped. See
docs/evaluation.md for the files, prompts, decoding and scores.
"""

import argparse
import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging

from llava_family.evaluation.answering import answer_batch, family_of, load
from llava_family.evaluation.files import BENCHMARKS, Question, find_missing_images
from llava_family.evaluation.predictions import PredictionFile
from llava_family.evaluation.published import PUBLISHED
from llava_family.evaluation.settings import GenerationSettings, settings_for
from llava_family.generating import user_message


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub repository of a checkpoint")
    parser.add_argument("--benchmark", required=True, choices=sorted(BENCHMARKS))
    parser.add_argument("--questions", type=Path, help="LLaVA's question file; MMBench's .tsv")
    parser.add_argument(
        "--annotations", type=Path, help="the benchmark's file with the truth; a folder for two of them"
    )
    parser.add_argument("--images", type=Path, help="folder of the images")
    parser.add_argument("--answers", type=Path, required=True, help=".jsonl for the answers, new or to go on with")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--limit", type=int, help="only the first questions")
    parser.add_argument("--num-beams", type=int, help="instead of the paper's")
    parser.add_argument("--max-new-tokens", type=int, help="instead of the paper's")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16")
    parser.add_argument("--compare", choices=sorted(PUBLISHED), help="model with published scores to print beside")
    return parser.parse_args(arguments)


def read_questions(options: argparse.Namespace) -> list[Question]:
    """The questions to ask, all of whose images exist."""
    benchmark = BENCHMARKS[options.benchmark]
    for name in benchmark.needs:
        if getattr(options, name) is None:
            raise ValueError(f"`--{name}` is missing, which {options.benchmark} needs.")
    for name in ("batch_size", "limit", "num_beams", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least 1, but is {value}.")
    questions = benchmark.read(options.questions, options.annotations, options.images)[: options.limit]
    if not questions:
        raise ValueError(f"There are no questions in {options.questions or options.annotations}.")
    missing = find_missing_images(questions)
    if missing:
        names = ", ".join(path.name for path in missing[:5])
        raise ValueError(f"{len(missing)} images are missing in {options.images}: {names}{', …' * (len(missing) > 5)}")
    return questions


def choose_settings(options: argparse.Namespace) -> GenerationSettings:
    """Those of the paper, but for what the options say."""
    settings = settings_for(family_of(options.model), options.benchmark)
    chosen = {name: getattr(options, name) for name in ("num_beams", "max_new_tokens")}
    return replace(settings, **{name: value for name, value in chosen.items() if value is not None})


def describe(options: argparse.Namespace, settings: GenerationSettings) -> dict[str, Any]:
    """What answers depend on; another limit or batch size may go on with a file."""
    files = [path for path in (options.questions, options.annotations) if path is not None and path.is_file()]
    return {
        "model": options.model,
        "benchmark": options.benchmark,
        "dtype": options.dtype,
        "prefix": settings.prefix,
        "suffix": settings.suffix,
        "num_beams": settings.num_beams,
        "max_new_tokens": settings.max_new_tokens,
        "repetition_penalty": settings.repetition_penalty,
        "image_settings": dict(settings.image_settings),
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files},
    }


def check_ids(predictions: PredictionFile, questions: list[Question]) -> None:
    for number, (found, question) in enumerate(zip(predictions.ids, questions, strict=False)):
        if found != question.id:
            raise ValueError(
                f"{predictions.path}:{number + 2} must answer question {question.id}, but answers {found}. Use "
                "another file."
            )


def answer_all(
    options: argparse.Namespace,
    questions: list[Question],
    settings: GenerationSettings,
    predictions: PredictionFile,
    console: Console,
) -> None:
    """Asks what the file has no answer to yet."""
    done = len(predictions.answers)
    if done:
        console.print(f"{predictions.path} has {done} answers already.", highlight=False, markup=False, soft_wrap=True)
    if done >= len(questions):
        return
    model, processor = load(options.model, options.dtype)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with predictions, Progress(*columns, console=console) as progress:
        task = progress.add_task(options.benchmark, total=len(questions), completed=done, rate="")
        for start in range(done, len(questions), options.batch_size):
            batch = questions[start : start + options.batch_size]
            prompts = [settings.prompt(question.text) for question in batch]
            images = [question.open_image() for question in batch]
            conversations = [
                user_message(prompt, [image] if image is not None else [])
                for prompt, image in zip(prompts, images, strict=True)
            ]
            answers = answer_batch(model, processor, conversations, settings)
            for question, prompt, answer in zip(batch, prompts, answers, strict=True):
                predictions.add(question.id, prompt, answer)
            speed = progress.tasks[task].speed
            progress.update(task, advance=len(batch), rate=f"{speed:.1f} questions/s" if speed else "")


def score_table(options: argparse.Namespace, scores: dict[str, float]) -> Table:
    """The scores in percent, beside published ones where the model is known or named."""
    name = options.compare or Path(options.model).name.lower()
    published = PUBLISHED[name].scores.get(options.benchmark, {}) if name in PUBLISHED else {}
    table = Table(f"{options.benchmark}, %", "this run", box=SIMPLE)
    if name in PUBLISHED:
        table.add_column(f"{name}, published")
        table.caption = escape(f"Published: {PUBLISHED[name].source}.")
    for score, value in scores.items():
        row = [score, f"{100 * value:.1f}"]
        if name in PUBLISHED:
            row.append(str(published[score]) if score in published else "–")
        table.add_row(*map(escape, row))
    return table


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options = parse_options(arguments)
    console = Console()
    logging.disable_progress_bar()
    try:
        questions = read_questions(options)
        settings = choose_settings(options)
        predictions = PredictionFile(options.answers, describe(options, settings))
        check_ids(predictions, questions)
        torch.manual_seed(0)
        answer_all(options, questions, settings, predictions, console)
        scores = BENCHMARKS[options.benchmark].score(questions, predictions.answers[: len(questions)])
    except (OSError, ValueError) as error:
        sys.exit(f"Error: {error}")
    if scores:
        console.print(score_table(options, scores))
    else:
        console.print("The questions have no answers to compare with.")
    console.print(f"{len(questions)} answers are in {options.answers}.", highlight=False, markup=False, soft_wrap=True)
    return scores


if __name__ == "__main__":
    main()
