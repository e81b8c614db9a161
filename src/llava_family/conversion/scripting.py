"""What the conversion scripts of all families share: options, errors, the last steps."""

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import create_repo, upload_folder
from huggingface_hub.utils import validate_repo_id

from .mapping import ConversionPlan
from .reading import WEIGHT_FILES
from .writing import atomic_folder, write_sharded


WEIGHT_PATTERNS = ["model*.safetensors", "pytorch_model*.bin", "*.index.json"]
VISION_TOWER_PATTERNS = [*WEIGHT_PATTERNS, "config.json", "preprocessor_config.json"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_options(dtype: str | None, push_to_hub: str | None) -> None:
    """ValueError if one of the options that need no checkpoint is wrong."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, but is {dtype!r}.")
    if push_to_hub is not None:
        validate_repo_id(push_to_hub)


def read_original_config(folder: Path, kind: str) -> dict[str, Any]:
    """The `config.json` in `folder`; ValueError if there is none, so that it is no release of `kind`."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"The checkpoint must be a {kind} release, but {folder} has no config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be a configuration, but is no JSON: {error}. Download it again.") from error
    return config if isinstance(config, dict) else {}


def is_first_stage(folder: Path) -> bool:
    """Whether `folder` is the output of LLaVA's first training stage: a projector without a language model."""
    return (folder / "mm_projector.bin").is_file() and not has_weights(folder)


def has_weights(folder: Path) -> bool:
    """Whether `folder` has a model's weights."""
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def write_checkpoint(
    output: Path,
    plan: ConversionPlan,
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    parts: Sequence[Any],
    push_to_hub: str | None,
    report: Callable[[str], None],
) -> None:
    """Writes the weights and whatever else the checkpoint consists of, and uploads it.

    Args:
        output (`Path`): Folder, which appears only when it is complete.
        plan (`ConversionPlan`): How the weights are made.
        read (`Callable`): Returns the source tensor of a name.
        dtype (`torch.dtype`): Of all floating point weights.
        parts (`Sequence`): Configurations and processors, anything with `save_pretrained`.
        push_to_hub (`str`, *optional*): Hub repository to upload to.
        report (`Callable[[str], None]`): Receives what was done, line by line.
    """
    for reason, count in Counter(plan.ignored.values()).items():
        report(f"Left out: {count} tensors, {reason}.")
    with atomic_folder(output) as incomplete:
        num_bytes = write_sharded(incomplete, plan.steps, read, dtype=dtype)
        for part in parts:
            part.save_pretrained(incomplete)
    report(f"Wrote {num_bytes / 1e6:,.0f} MB in {str(dtype)[6:]}, to {output}.")
    if push_to_hub is not None:
        upload(output, push_to_hub)
        report(f"Uploaded to https://huggingface.co/{push_to_hub}.")


def upload(folder: Path, repo_id: str) -> None:
    """Uploads `folder`; ValueError if the Hub refuses it."""
    try:
        create_repo(repo_id, exist_ok=True)
        upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Upload converted checkpoint")
    except (OSError, ValueError) as error:  # all of the Hub's errors are one or the other
        raise ValueError(
            f"The conversion is complete in {folder}, but could not be uploaded to {repo_id!r}: "
            f"{' '.join(str(error).split())} Log in with `hf auth login`, or upload it with `hf upload`."
        ) from error


def conversion_parser(
    description: str | None,
    checkpoint: str = "folder or Hub repository of the original release",
    default_dtype: str = "the release's own",
) -> argparse.ArgumentParser:
    """A parser with the options of every conversion script but `--vision-tower`, whose help differs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help=checkpoint)
    parser.add_argument("--output", required=True, help="new folder for the converted checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, help=f"of the converted weights; {default_dtype} by default")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the finished folder to this Hub repository")
    return parser


def run_conversion(
    parser: argparse.ArgumentParser, convert: Callable[..., os.PathLike], arguments: list[str] | None
) -> None:
    """Calls `convert` with the parsed arguments; what is wrong with the input is one line and exit status 2."""
    options = parser.parse_args(arguments)
    try:
        convert(**vars(options))
    except (ValueError, OSError) as error:
        parser.error(str(error))
