"""Settings of the training scripts, from a yaml and the command line.

A yaml is turned into words in front of those of the command line, so both are checked and converted by one parser, and
the last word wins.
"""

import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser


CONFIGS = Path(__file__).parent / "configs"


@dataclass
class RunArguments:
    """Settings of every script."""

    config: str | None = field(default=None, metadata={"help": "yaml of settings; the script's own in configs/"})
    data: str | None = field(default=None, metadata={"help": "conversations, .json or .jsonl"})
    image_folder: str | None = field(default=None, metadata={"help": "where the images of the data lie"})
    output: str | None = field(default=None, metadata={"help": "new folder for the trained checkpoint"})
    attn_implementation: str | None = field(default=None, metadata={"help": "such as flash_attention_2"})
    skip_bad_samples: bool = field(default=False, metadata={"help": "leave them out, and list them in a file"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in <output>-run"})
    smoke: bool = field(default=False, metadata={"help": "train a tiny random model on drawn pictures, and check it"})


@dataclass
class ConversationArguments(RunArguments):
    """Settings of every script on LlavaTrainer, whose names TRL's have too."""

    template: str = field(default="chat", metadata={"help": '"chat" learns answers, "plain" captions (first stages)'})
    max_length: int = field(default=2048, metadata={"help": "tokens of a sample"})


@dataclass
class ModelArguments:
    """What a later stage starts from."""

    model: str | None = field(default=None, metadata={"help": "checkpoint of the stage before"})


class SettingsParser(HfArgumentParser):
    """Reports one line, without the usage, whose three hundred options hide it."""

    source = ""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {self.source}{' '.join(message.split())}\n")


def read_settings(path: str | Path, parser: SettingsParser) -> list[str]:
    """The settings of a yaml as words of a command line.

    Raises:
        ValueError: if it cannot be read, is no mapping, or has a setting that no script argument is called.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The settings in {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"The settings in {path} must be lines `name: value`, but are a {type(settings).__name__}.")
    known = [each.name for dataclass_type in parser.dataclass_types for each in fields(dataclass_type) if each.init]
    words = []
    for name, value in settings.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else " `--help` lists the settings there are."
            raise ValueError(f"{path} has an unknown setting, {name!r}.{hint}")
        if value is not None:
            words += [f"--{name}", *_words(value)]
    return words


def _words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(each) for each in value]
    return [json.dumps(value) if isinstance(value, (dict, bool)) else str(value)]


def parse(parser: SettingsParser, smoke: dict[str, Any], words: Sequence[str]) -> list[Any]:
    """The settings of a script: those of its yaml, then those of its smoke test, then `words`; the last one counts.

    Raises:
        ValueError: if a setting is unknown, impossible or missing. One of the wrong type ends the script, with a line.
    """
    # What is wrong with the command line shall not be blamed on the yaml.
    given = parser.parse_args(list(words))
    path = given.config or CONFIGS / f"{parser.prog}.yaml"
    settings = read_settings(path, parser)
    parser.source = f"{path}: "
    parser.parse_args(settings)
    parser.source = ""
    if given.smoke:
        settings += [word for name, value in smoke.items() for word in (f"--{name}", *_words(value))]
    parsed = list(parser.parse_args_into_dataclasses([*settings, *words], look_for_args_file=False))
    check_settings(parsed)
    return parsed


@contextmanager
def input_errors(parser: SettingsParser) -> Iterator[None]:
    """Ends the script with one line where its input is wrong."""
    try:
        yield
    except (ValueError, OSError) as error:
        parser.error(str(error))


def check_settings(parsed: Sequence[Any]) -> None:
    """
    Raises:
        ValueError: if the data, the model or the output is missing, or the output is not to be written to.
    """
    run, training = parsed[0], parsed[1]
    if training.output_dir != type(training)(use_cpu=True).output_dir:
        raise ValueError("`--output_dir` is not used here: name the folder of the trained checkpoint with `--output`.")
    needed = {"data": run.data, "output": run.output}
    for arguments in parsed[2:]:
        sources = ("model", "language_model", "vision_tower")
        needed |= {name: value for name, value in vars(arguments).items() if name in sources}
    for name, value in needed.items():
        if not value and not run.smoke:
            raise ValueError(f"`--{name}` is missing. `--help` says what it is; `--smoke` runs without data or model.")
