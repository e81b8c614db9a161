"""What the conversion scripts of all families share: options, errors, the last steps.

Source: the conversion scripts of transformers, `convert_<model>_weights_to_hf.py`.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import create_repo, upload_folder
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightTransform

from ..llava_uhd.configuration_llava_uhd import MAX_SIZES
from .checking import read_json, settings_files
from .combining import CheckpointTensors
from .mapping import ConversionPlan, plan_conversion
from .reading import WEIGHT_FILES, CheckpointReader
from .shards import TensorInfo


WEIGHT_PATTERNS = ["model*.safetensors", "pytorch_model*.bin", "*.index.json"]
VISION_TOWER_PATTERNS = [*WEIGHT_PATTERNS, "config.json", "preprocessor_config.json"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Of layers or experts. More are a mistake, or an attack.
MAX_COUNT = MAX_SIZES["num_hidden_layers"]


def check_options(dtype: str | None, push_to_hub: str | None) -> None:
    """Checks the options that need no checkpoint.

    Args:
        dtype (`str`, *optional*): Name of the output's dtype.
        push_to_hub (`str`, *optional*): Hub repository to upload to.

    Raises:
        ValueError: if one of them is wrong.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, but is {dtype!r}.")
    if push_to_hub is not None:
        validate_repo_id(push_to_hub)


def read_original_config(folder: Path, kind: str) -> dict[str, Any]:
    """Reads the `config.json` in a folder.

    Args:
        folder (`Path`): The folder.
        kind (`str`): Whose release it should be, for the message.

    Returns:
        `dict[str, Any]`: The configuration.

    Raises:
        ValueError: if there is none, so that it is no release, or it is malformed.
    """
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise ValueError(f"The checkpoint must be a {kind} release, but {folder} has no config.json.")
    settings_files(folder)
    config = read_json(path, "a configuration")
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be a configuration, but holds a {type(config).__name__}. Download it again.")
    if not isinstance(config.get("model_type"), str | None):
        raise ValueError(f"{path} must have a name as `model_type`, but has {config['model_type']!r:.100}.")
    check_counts(config, path, MAX_COUNT)
    return config


def check_counts(config: Any, place: object, limit: int) -> None:
    """Refuses a configuration that claims so many layers or experts that building them would never end.

    Args:
        config (`Any`): The configuration, as JSON has it.
        place (`object`): Where it was found, for the message.
        limit (`int`): How many there may be.

    Raises:
        ValueError: if it claims more, or no whole number.
    """
    entries = config.items() if isinstance(config, dict) else ()
    for key, value in entries:
        check_counts(value, place, limit)
        counts = value if isinstance(value, list) else [value]
        if isinstance(key, str) and re.fullmatch(r"(num|n)_(\w*_)?(layers?|experts)|depth|top_k_experts", key):
            for count in counts:
                if count is not None and (not isinstance(count, int) or not 0 <= count <= limit):
                    raise ValueError(
                        f"{place} has {count!r} as `{key}`, expected a whole number from 0 to {limit}. Check that the "
                        "configuration is the checkpoint's own."
                    )


@contextmanager
def settings_of(*folders: Path | None) -> Iterator[None]:
    """Makes one error of whatever the settings in files of some folders make transformers raise.

    Args:
        folders (`Path`, *optional*): The folders, for the message.

    Raises:
        ValueError: in place of other exceptions.
    """
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:  # wrong types surface anywhere, as anything
        places = " and ".join(f" in {folder}" for folder in folders if folder is not None)
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"The configuration, tokenizer or image processor{places} cannot be used: {message[:1000]}. Check that "
            "the files are the checkpoint's own and complete."
        ) from error


def is_first_stage(folder: Path) -> bool:
    """Whether `folder` is the output of LLaVA's first training stage: a projector without a language model.

    Args:
        folder (`Path`): The folder.
    """
    return (folder / "mm_projector.bin").is_file() and not has_weights(folder)


def has_weights(folder: Path) -> bool:
    """Whether `folder` has a model's weights.

    Args:
        folder (`Path`): The folder.
    """
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def plan_for_model(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: Mapping[str, TensorInfo],
    transforms: Sequence[WeightTransform],
    ignored: Mapping[str, str] | None = None,
) -> ConversionPlan:
    """Plans how tensors become a model.

    Args:
        model_class (`type[PreTrainedModel]`): Class of the model.
        config (`PreTrainedConfig`): Its configuration.
        tensors (`Mapping[str, TensorInfo]`): Those of a checkpoint.
        transforms (`Sequence[WeightTransform]`): As in [`plan_conversion`].
        ignored (`Mapping[str, str]`, *optional*): As in [`plan_conversion`].

    Returns:
        `ConversionPlan`: What to do.

    Raises:
        ValueError: if they are not exactly the model's.
    """
    # None of them is without a tensor.
    check_counts(config.to_dict(), "The configuration", len(tensors))
    with settings_of(), torch.device("meta"):
        model = model_class(config)
    expected = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
    return plan_conversion(tensors, transforms, expected, ignored, model)


@dataclass(frozen=True)
class Conversion:
    """A checkpoint that is open and planned, but not converted yet.

    Attributes:
        family (`str`): Its model type.
        options (`Mapping[str, Any]`): All that the written bytes depend on beside files, as JSON has it.
        sources (`Sequence[tuple[str, Path]]`): The files that it is made of, each with the role of its checkpoint.
        source (`CheckpointTensors`): Their tensors.
        plan (`ConversionPlan`): What becomes of these.
        dtype (`torch.dtype`): Of all floating point weights that come out.
        parts (`Sequence`): Configurations and processors, anything with `save_pretrained`.
    """

    family: str
    options: Mapping[str, Any]
    sources: Sequence[tuple[str, Path]]
    source: CheckpointTensors
    plan: ConversionPlan
    dtype: torch.dtype
    parts: Sequence[Any]


def source_files(role: str, folder: Path, reader: CheckpointReader) -> list[tuple[str, Path]]:
    """The files of a checkpoint's folder that matter.

    Args:
        role (`str`): Of the checkpoint in the conversion.
        folder (`Path`): Its folder.
        reader (`CheckpointReader`): Its weights.

    Returns:
        `list[tuple[str, Path]]`: The role and the file, in the order of a conversion: settings, then weights.
    """
    paths = [path for path in settings_files(folder) if path.name not in reader.files]
    paths += [reader.folder / file for file in reader.files]
    return [(role, path) for path in paths]


def upload(folder: Path, repo_id: str) -> None:
    """Uploads a folder to the Hub.

    Args:
        folder (`Path`): The folder.
        repo_id (`str`): The repository, which is created where it does not exist.

    Raises:
        ValueError: if the Hub refuses it.
    """
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
    """Makes a parser with the options of every conversion script but `--vision-tower`, whose help differs.

    Args:
        description (`str`, *optional*): What the script does.
        checkpoint (`str`, *optional*): Help of `--checkpoint`.
        default_dtype (`str`, *optional*): What the help says of `--dtype`.

    Returns:
        `argparse.ArgumentParser`: The parser.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help=checkpoint)
    parser.add_argument("--output", required=True, help="new folder for the converted checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, help=f"of the converted weights; {default_dtype} by default")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the finished folder to this Hub repository")
    parser.add_argument("--allow-nan", action="store_true", help="keep NaN and infinite values, not refuse them")
    return parser


def run_conversion(
    parser: argparse.ArgumentParser, convert: Callable[..., os.PathLike], arguments: list[str] | None
) -> None:
    """Converts with the parsed arguments; what is wrong with the input is one line and exit status 2.

    Args:
        parser (`argparse.ArgumentParser`): The script's.
        convert (`Callable[..., os.PathLike]`): Called with the arguments by their names.
        arguments (`list[str]`, *optional*): Those of the command line by default.
    """
    options = parser.parse_args(arguments)
    try:
        convert(**vars(options))
    except (ValueError, OSError) as error:
        parser.error(str(error))
