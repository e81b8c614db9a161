"""Reads the benchmarks' own files, and scores answers to their questions.

Source: the files of LLaVA (its `docs/Evaluation.md`) and of the benchmarks; scores as in `scoring` and `parsing`, each
with its paper or original code.
"""

import base64
import binascii
import csv
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from .parsing import parse_letter, parse_option, parse_yes_no
from .scoring import binary_scores, circular_accuracy, exact_match, vqa_accuracy


LETTERS = "ABCDE"
# VLMEvalKit's files of MMBench number a question's rotations by this step.
ROTATION = 1_000_000


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Args:
        id (`str`): As the file has it; TextVQA's are those of images, so several questions may share one.
        text (`str`): What to ask, without what `GenerationSettings` puts around it.
        image (`Path` or `bytes`, *optional*): An image file, or the content of one.
        truth (`Any`, *optional*): What scoring needs: annotators' answers, a label, the index or letter of a choice.
        category (`str`, *optional*): Within the benchmark.
        options (`dict[str, str]`, *optional*): Texts of the choices by letter.
    """

    id: str
    text: str
    image: Path | bytes | None
    truth: Any = None
    category: str | None = None
    options: dict[str, str] | None = None

    def open_image(self) -> Image.Image | None:
        """
        Opens the image and converts it to RGB.

        Returns:
            `PIL.Image.Image`, *optional*: `None` for a question without an image.

        Raises:
            ValueError: if the image cannot be read.
        """
        if self.image is None:
            return None
        try:
            return Image.open(BytesIO(self.image) if isinstance(self.image, bytes) else self.image).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            name = "in the file" if isinstance(self.image, bytes) else str(self.image)
            raise ValueError(f"The image of question {self.id}, {name}, cannot be read: {error}") from error


def read_textvqa(questions: Path, annotations: Path, images: Path) -> list[Question]:
    """
    Reads questions and annotators' answers of TextVQA.

    Args:
        questions (`Path`): LLaVA's question file, a `.jsonl`.
        annotations (`Path`): `TextVQA_0.5.1_val.json`, with the answers.
        images (`Path`): Folder of the images; they are not opened.

    Returns:
        `list[Question]`: in the order of the question file.

    Raises:
        ValueError: if a file is malformed, or if the annotations lack a question.
    """
    answers = {}
    for number, item in enumerate(_get(read_json(annotations), "data", list, str(annotations))):
        where = f"{annotations}, entry {number} of `data`,"
        key = (_get(item, "image_id", str, where), _get(item, "question", str, where).strip().lower())
        answers[key] = _get(item, "answers", list, where)
        if len(answers[key]) < 2 or not all(isinstance(answer, str) for answer in answers[key]):
            raise ValueError(f"{where} must have at least two `answers`, all of them text.")
    read = []
    for where, item in read_json_lines(questions):
        text, image = _get(item, "text", str, where), _get(item, "image", str, where)
        # The question stands on a line of its own, with tokens of an OCR or the prompt on others.
        keys = [(Path(image).stem, line.strip().lower()) for line in text.splitlines()]
        truth = next((answers[key] for key in keys if key in answers), None)
        if truth is None:
            raise ValueError(f"{where} has a question about {image} that {annotations} does not have: {text!r}.")
        read.append(Question(_id(item, where), text, images / image, truth))
    return read


def read_pope(questions: Path, annotations: Path, images: Path) -> list[Question]:
    """
    Reads POPE; the other arguments are as in [`read_textvqa`].

    Args:
        questions (`Path`): LLaVA's question file, a `.jsonl` with the category.
        annotations (`Path`): Folder of `coco_pope_CATEGORY.json`, with the labels.

    Returns:
        `list[Question]`: in the order of the question file.

    Raises:
        ValueError: if a file is malformed, or if the annotations lack a question.
    """
    labels: dict[str, dict[tuple[str, str], str]] = {}
    read = []
    for where, item in read_json_lines(questions):
        text, image, category = (_get(item, name, str, where) for name in ("text", "image", "category"))
        if category not in labels:
            labels[category] = dict(_read_labels(annotations / f"coco_pope_{category}.json"))
        question = text.partition("\n")[0].strip()
        if (image, question) not in labels[category]:
            raise ValueError(f"{where} asks {question!r} about {image}, which coco_pope_{category}.json does not.")
        read.append(Question(_id(item, where), text, images / image, labels[category][image, question], category))
    return read


def _read_labels(path: Path) -> Iterator[tuple[tuple[str, str], str]]:
    for where, item in read_json_lines(path):
        image, text, label = (_get(item, name, str, where) for name in ("image", "text", "label"))
        if label not in ("yes", "no"):
            raise ValueError(f'{where} must have the `label` "yes" or "no", but has {label!r}.')
        yield (image, text.strip()), label


def read_scienceqa(questions: Path | None, annotations: Path, images: Path) -> list[Question]:
    """
    Reads ScienceQA; the other arguments are as in [`read_textvqa`].

    Args:
        questions (`Path` or `None`): LLaVA's `llava_test_CQM-A.json`. Without it the test split is asked in the same
            format: context, question and choices by letter.
        annotations (`Path`): Folder of `problems.json` and, without LLaVA's file, `pid_splits.json`.

    Returns:
        `list[Question]`: in the order of LLaVA's file, or of the test split.

    Raises:
        ValueError: if a file is malformed, or if `problems.json` lacks a question.
    """
    path = annotations / "problems.json"
    problems = read_json(path)
    asked: list[tuple[str, str, str | None, str | None]]  # where, id, text, image
    if questions is None:
        splits = read_json(annotations / "pid_splits.json")
        ids = _get(splits, "test", list, str(annotations / "pid_splits.json"))
        asked = [(f"{annotations / 'pid_splits.json'}, `test`,", str(id), None, None) for id in ids]
    else:
        items = read_json(questions)
        if not isinstance(items, list):
            raise ValueError(f"{questions} must hold a JSON list, but holds a {type(items).__name__}.")
        asked = [_llava_question(item, f"{questions}, entry {number},") for number, item in enumerate(items)]
    read = []
    for where, id, text, image in asked:
        problem = _get(problems, id, dict, f"{path}, of which {where} has a question,")
        where = f"{path}, problem {id},"
        choices, answer = _get(problem, "choices", list, where), _get(problem, "answer", int, where)
        if not 0 <= answer < len(choices) <= len(LETTERS):
            raise ValueError(f"{where} must have 1 to {len(LETTERS)} `choices` with the `answer` among them.")
        if text is None:
            hint = problem.get("hint")
            lines = [f"Context: {hint}"] if hint else []
            lines += [_get(problem, "question", str, where)]
            lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
            text = "\n".join(lines)
            image = f"{id}/{problem['image']}" if problem.get("image") else None
        options = dict(zip(LETTERS, map(str, choices), strict=False))
        read.append(Question(id, text, images / image if image else None, answer, options=options))
    return read


def _llava_question(item: Any, where: str) -> tuple[str, str, str, str | None]:
    conversations = _get(item, "conversations", list, where)
    text = _get(conversations[0] if conversations else {}, "value", str, f"{where} first of `conversations`,")
    image = _get(item, "image", str, where) if item.get("image") else None
    return where, _id(item, where, "id"), text.replace("<image>", "").strip(), image


def read_mmbench(questions: Path, annotations: None = None, images: None = None) -> list[Question]:
    """
    Reads MMBench. Rotations of a question for CircularEval have its index plus millions.

    Args:
        questions (`Path`): A `.tsv` with its images in base64.
        annotations, images (`None`, *optional*): Not used, as the `.tsv` has all.

    Returns:
        `list[Question]`: one for each row, in order.

    Raises:
        ValueError: if the file is malformed.
    """
    read: list[Question] = []
    contents: dict[str, str] = {}
    for where, row in _read_table(questions):
        index = _get(row, "index", str, where)
        if not index.isdecimal():
            raise ValueError(f"{where} must have a whole number as `index`, but has {index!r}.")
        options: dict[str, str] = {}
        for letter in LETTERS[:4]:
            if _is_missing(row.get(letter)):
                break
            options[letter] = row[letter]
        answer = row.get("answer")
        if _is_missing(answer):
            answer = None
        elif answer not in options:
            raise ValueError(
                f"{where} must have one of the options {', '.join(options)} as `answer`, but has {answer!r}."
            )
        content = _get(row, "image", str, where)
        contents[index] = content = contents.get(content, content)  # or the index of a row above that has the image
        try:
            image = base64.b64decode(content, validate=True)
        except binascii.Error as error:
            raise ValueError(f"{where} must have an `image` in base64: {error}.") from error
        lines = [] if _is_missing(row.get("hint")) else [row["hint"]]
        lines += [_get(row, "question", str, where), *(f"{letter}. {text}" for letter, text in options.items())]
        read.append(Question(index, "\n".join(lines), image, answer, row.get("category"), options))
    return read


def _is_missing(value: str | None) -> bool:
    return value is None or value.strip().lower() in ("", "nan", "none")


def _read_table(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # an image is one field
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}:{reader.line_num} must have as many fields as the first line, "
                        f"{len(reader.fieldnames or [])}."
                    )
                yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num} is no tab-separated row: {error}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error
    finally:
        csv.field_size_limit(limit)


def read_gqa(questions: Path, annotations: Path, images: Path) -> list[Question]:
    """
    Reads GQA; the other arguments are as in [`read_textvqa`].

    Args:
        annotations (`Path`): `testdev_balanced_questions.json`, with the answers.

    Returns:
        `list[Question]`: in the order of the question file.

    Raises:
        ValueError: if a file is malformed, or if the annotations lack a question.
    """
    truths, read = read_json(annotations), []
    for where, item in read_json_lines(questions):
        id = _id(item, where)
        truth = _get(truths, id, dict, f"{annotations}, which has the answer to {where},")
        answer = _get(truth, "answer", str, f"{annotations}, question {id},")
        read.append(Question(id, _get(item, "text", str, where), images / _get(item, "image", str, where), answer))
    return read


def read_json(path: str | os.PathLike) -> Any:
    """
    Reads a JSON file.

    Args:
        path (`str` or `os.PathLike`): A file in UTF-8.

    Returns:
        `Any`: its content.

    Raises:
        ValueError: if the file is no JSON, with its name and, where the syntax is wrong, the line.
    """
    return _parse(Path(path).read_bytes(), str(path))


def read_json_lines(path: str | os.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Reads a file with a JSON object on each line; its arguments are as in [`read_json`].

    Yields:
        `tuple[str, dict[str, Any]]`: file with line, for messages, and content of a line that is not empty.

    Raises:
        ValueError: if a line is no JSON object, with the file's name and the line.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                item = _parse(line, f"{path}:{number}", line_is_known=True)
                if not isinstance(item, dict):
                    raise ValueError(f"{path}:{number} must be a JSON object, but is a {type(item).__name__}.")
                yield f"{path}:{number}", item


def _parse(content: bytes, where: str, line_is_known: bool = False) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        place = where if line_is_known else f"{where}:{error.lineno}"
        raise ValueError(f"{place} is no JSON: {error.msg}, column {error.colno}.") from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{where} is no JSON in UTF-8: {error}.") from error


def _get(item: Any, key: str, kind: type, where: str) -> Any:
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where} must have `{key}`, of the type {kind.__name__}, but has {value!r:.80}.")
    return value


def _id(item: Any, where: str, key: str = "question_id") -> str:
    value = item.get(key) if isinstance(item, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{where} must have `{key}`, a number or text, but has {value!r:.80}.")
    return str(value)


Scores = dict[str, float]


def score_textvqa(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """
    Scores answers to TextVQA.

    Args:
        questions (`Sequence[Question]`): All of the run, as the benchmark's reader returns them.
        answers (`Sequence[str]`): To the first of the questions, one at least.

    Returns:
        `dict[str, float]`: `accuracy`, the mean of `vqa_accuracy`.
    """
    found = [vqa_accuracy(answer, question.truth) for question, answer in zip(questions, answers, strict=False)]
    return {"accuracy": sum(found) / len(found)}


def score_pope(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """
    Scores answers to POPE; arguments are as in [`score_textvqa`].

    Returns:
        `dict[str, float]`: `F1`, the mean of the categories', which papers print as POPE's score; and `binary_scores`
        of every category, such as `recall, popular`.
    """
    categories: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=False):
        categories[str(question.category)].append((parse_yes_no(answer), question.truth))
    scores: Scores = {}
    for category, pairs in categories.items():
        for name, value in binary_scores(*zip(*pairs, strict=True)).items():
            scores[f"{name}, {category}"] = value
    return {"F1": sum(scores[f"F1, {category}"] for category in categories) / len(categories), **scores}


def score_scienceqa(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """
    Scores answers to ScienceQA; arguments are as in [`score_textvqa`].

    Returns:
        `dict[str, float]`: `accuracy`; `accuracy, with image`, that of questions with an image, if there are any,
        which papers print; and `unreadable`, the share of answers that tell no choice.
    """
    rows = [
        (question.image is not None, parse_letter(answer, len(question.options or {})), question.truth)
        for question, answer in zip(questions, answers, strict=False)
    ]
    scores = {"accuracy": sum(given == truth for _, given, truth in rows) / len(rows)}
    with_image = [given == truth for has_image, given, truth in rows if has_image]
    if with_image:
        scores["accuracy, with image"] = sum(with_image) / len(with_image)
    return {**scores, "unreadable": sum(given is None for _, given, _ in rows) / len(rows)}


def score_mmbench(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """
    Scores answers to MMBench; arguments are as in [`score_textvqa`].

    Returns:
        `dict[str, float]`: `accuracy` of the rows that are no rotation, `CircularEval` of questions whose rotations
        were all asked, and by category whichever of both is the last that there is; nothing if the file lacks answers.
    """
    if any(question.truth is None for question in questions):
        return {}
    rows = [
        (int(question.id), question, parse_option(answer, question.options or {}) == question.truth)
        for question, answer in zip(questions, answers, strict=False)
    ]
    first = [(index % ROTATION, question, is_right) for index, question, is_right in rows if index < ROTATION]
    counts: dict[int, int] = defaultdict(int)
    for index, _, _ in rows:
        counts[index % ROTATION] += 1
    complete = [
        (index % ROTATION, question, is_right)
        for index, question, is_right in rows
        if counts[index % ROTATION] == len(question.options or {}) > 1
    ]
    scores: Scores = {}
    for name, chosen in (("accuracy", first), ("CircularEval", complete)):
        if chosen:
            scores[name] = circular_accuracy((index, is_right) for index, _, is_right in chosen)
    last, chosen = ("CircularEval", complete) if complete else ("accuracy", first)
    for category in dict.fromkeys(question.category for _, question, _ in chosen if question.category):
        own = ((index, is_right) for index, question, is_right in chosen if question.category == category)
        scores[f"{last}, {category}"] = circular_accuracy(own)
    return scores


def score_gqa(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """
    Scores answers to GQA; arguments are as in [`score_textvqa`].

    Returns:
        `dict[str, float]`: `accuracy`, the share of exact matches.
    """
    found = [exact_match(answer, question.truth) for question, answer in zip(questions, answers, strict=False)]
    return {"accuracy": sum(found) / len(found)}


@dataclass(frozen=True)
class Benchmark:
    """How to read a benchmark's files and to score answers.

    Args:
        read (`Callable`): From question file, annotations and folder of images to the questions.
        score (`Callable`): From questions and answers to scores by name, fractions from 0 to 1.
        needs (`tuple[str, ...]`): Which of the reader's arguments must be given.
    """

    read: Callable[..., list[Question]]
    score: Callable[[Sequence[Question], Sequence[str]], Scores]
    needs: tuple[str, ...] = ("questions", "annotations", "images")


BENCHMARKS = {
    "textvqa": Benchmark(read_textvqa, score_textvqa),
    "pope": Benchmark(read_pope, score_pope),
    "scienceqa": Benchmark(read_scienceqa, score_scienceqa, ("annotations", "images")),
    "mmbench": Benchmark(read_mmbench, score_mmbench, ("questions",)),
    "gqa": Benchmark(read_gqa, score_gqa),
}


def find_missing_images(questions: Sequence[Question]) -> list[Path]:
    """
    Image files that do not exist.

    Args:
        questions (`Sequence[Question]`): Those whose image is a path are looked at.

    Returns:
        `list[Path]`: each file once, in order.
    """
    paths = dict.fromkeys(question.image for question in questions if isinstance(question.image, Path))
    return [path for path in paths if not path.is_file()]
