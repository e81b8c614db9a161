"""A file of answers that grows while a model gives them, so that an interrupted run goes on where it stopped.

Source: the keys of LLaVA's answer files; no counterpart for going on, as LLaVA's scripts write theirs anew.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from .files import read_json_lines


class PredictionFile:
    """A `.jsonl` whose first line holds the run's settings, and every other one an answer, in the questions' order.

    A line is complete or it does not count: what an interruption cut off is removed when the file is opened again.

    Args:
        path (`Path`): The file; its folder must exist.
        settings (`dict[str, Any]`): What the answers depend on, as JSON has it.

    Attributes:
        ids (`list[str]`): Of the questions that the file has answers to.
        answers (`list[str]`): What the file has.

    Raises:
        ValueError: if the file was written with other settings, or by something else, or if its folder does not exist.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self.ids: list[str] = []
        self.answers: list[str] = []
        if not path.parent.is_dir():
            raise ValueError(f"The folder of the predictions, {path.parent}, does not exist.")
        if path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        if not content:
            return
        lines = list(read_json_lines(self.path)) if content.endswith(b"\n") else self._without_the_last(content)
        if not lines:
            return
        found = lines[0][1].get("settings")
        if not isinstance(found, dict):
            raise ValueError(
                f"{lines[0][0]} must have the `settings` of a run, but has none: this is no file to go on with."
            )
        other = [name for name in {**self.settings, **found} if found.get(name) != self.settings.get(name)]
        if other:
            differences = "; ".join(
                f"{name} was {found.get(name)!r}, is {self.settings.get(name)!r}" for name in other
            )
            raise ValueError(
                f"{self.path} was written with other settings ({differences}). Use them again, or another file."
            )
        for where, item in lines[1:]:
            if not isinstance(item.get("question_id"), str) or not isinstance(item.get("text"), str):
                raise ValueError(f"{where} must have `question_id` and `text`, both text, but is {item!r:.80}.")
            self.ids.append(item["question_id"])
            self.answers.append(item["text"])

    def _without_the_last(self, content: bytes) -> list[tuple[str, dict[str, Any]]]:
        """The complete lines, to which the file is cut; a first line that is not this class's is left alone."""
        if not content.startswith(b'{"settings": '[: len(content)]):
            raise ValueError(f"{self.path}:1 must have the `settings` of a run: this is no file to go on with.")
        with open(self.path, "rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)
        return list(read_json_lines(self.path))

    def __enter__(self) -> "PredictionFile":
        is_new = not self.path.exists() or not self.path.stat().st_size
        self._file = open(self.path, "a", encoding="utf-8")
        if is_new:
            self._write({"settings": self.settings})
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._file.close()

    def add(self, id: str, prompt: str, answer: str) -> None:
        """
        Appends one answer to the file, at once.

        Args:
            id (`str`): That of the question.
            prompt (`str`): What the model was asked.
            answer (`str`): What it wrote.
        """
        self.ids.append(id)
        self.answers.append(answer)
        self._write({"question_id": id, "prompt": prompt, "text": answer})

    def _write(self, item: dict[str, Any]) -> None:
        self._file.write(json.dumps(item, ensure_ascii=False) + "\n")
        self._file.flush()
