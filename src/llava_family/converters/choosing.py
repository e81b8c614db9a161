"""Finds out which family an original checkpoint is of, and opens it with the options that this family knows.

Source: no counterpart: the original codes know one family each.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ..conversion import CheckpointReader, check_output_folder, resolve_checkpoint
from ..conversion.comparing import verify_conversion
from ..conversion.converting import write_checkpoint
from ..conversion.manifest import MANIFEST_FILE, Manifest
from ..conversion.scripting import DTYPES, Conversion, check_options, read_original_config
from ..llava_uhd.configuration_llava_uhd import is_original_config as is_llava_uhd
from ..moe_llava.configuration_moe_llava import ORIGINAL_MODEL_TYPES
from ..moe_llava.configuration_moe_llava import is_original_config as is_moe_llava
from .llava_mole import open_llava_mole
from .llava_uhd import open_llava_uhd
from .moe_llava import open_moe_llava


OPENERS: dict[str, Callable[..., AbstractContextManager[Conversion]]] = {
    "llava_uhd": open_llava_uhd,
    "moe_llava": open_moe_llava,
    "llava_mole": open_llava_mole,
}


def find_family(checkpoint: str | os.PathLike) -> str:
    """Tells the family of an original checkpoint by its configuration; LLaVA-MoLE's is a file without one.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder, Hub repository or, of LLaVA-MoLE, file.

    Returns:
        `str`: Its model type here, such as `"llava_uhd"`.

    Raises:
        ValueError: if it is of none of the families.
        FileNotFoundError: if there is no such checkpoint.
    """
    if os.path.isfile(checkpoint):
        return "llava_mole"
    folder = resolve_checkpoint(checkpoint, ["config.json"])
    config = read_original_config(folder, "LLaVA-UHD or MoE-LLaVA")
    tests = {"llava_uhd": is_llava_uhd, "moe_llava": is_moe_llava}
    found = [family for family, matches in tests.items() if matches(config)]
    if len(found) != 1:
        kinds = {key: config.get(key) for key in ("model_type", "mm_projector_type", "mm_image_tower")}
        hint = " It is converted already." if config.get("model_type") in OPENERS else ""
        raise ValueError(
            "The checkpoint must be LLaVA-UHD's, with `mm_projector_type` 'adapt_spatial_resampler', MoE-LLaVA's, "
            f"with `mm_image_tower` and a `model_type` of {', '.join(ORIGINAL_MODEL_TYPES)}, or the file of a "
            f"LLaVA-MoLE training, but {folder / 'config.json'} has {kinds}.{hint}"
        )
    return found[0]


@contextmanager
def open_checkpoint(
    checkpoint: str | os.PathLike, options: Mapping[str, Any], report: Callable[[str], None] = print
) -> Iterator[Conversion]:
    """Opens an original checkpoint of any family and plans its conversion.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder, Hub repository or, of LLaVA-MoLE, file.
        options (`Mapping[str, Any]`): Of the family's conversion, by name. None stands for an option's default.
        report (`Callable[[str], None]`, *optional*, defaults to `print`): Receives what is found, line by line.

    Yields:
        `Conversion`: The plan, as long as the files are open.

    Raises:
        ValueError: if it is of no family, damaged, or an option is not its family's or missing.
    """
    family = find_family(checkpoint)
    opener = OPENERS[family]
    known = inspect.signature(opener).parameters
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    unknown = [f"`--{name.replace('_', '-')}`" for name in given if name not in known]
    missing = [
        f"`--{name.replace('_', '-')}`"
        for name, parameter in list(known.items())[1:]
        if parameter.default is inspect.Parameter.empty and name not in given
    ]
    if unknown or missing:
        problem = f"does not have {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
        raise ValueError(f"{checkpoint} is of the family {family}, whose conversion {problem}.")
    with opener(checkpoint, **given, report=report) as conversion:
        yield conversion


def convert_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    options: Mapping[str, Any],
    push_to_hub: str | None = None,
    report: Callable[[str], None] = print,
    allow_nan: bool = False,
) -> Path:
    """Converts an original checkpoint of any family into the folder `output`, which appears only when it is complete.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder, Hub repository or, of LLaVA-MoLE, file.
        output (`str` or `os.PathLike`): New or empty folder.
        options (`Mapping[str, Any]`): Of the family's conversion, by name. None stands for an option's default.
        push_to_hub (`str`, *optional*): Hub repository to upload the finished folder to.
        report (`Callable[[str], None]`, *optional*, defaults to `print`): Receives what was done, line by line.
        allow_nan (`bool`, *optional*, defaults to `False`): Whether to keep NaN and infinite values.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: if it is of no family, damaged, or an option is not its family's or missing.
        FileNotFoundError: if a file or a folder is missing.
    """
    check_options(options.get("dtype"), push_to_hub)
    path = check_output_folder(output)
    with open_checkpoint(checkpoint, options, report) as conversion:
        write_checkpoint(path, conversion, push_to_hub, report, allow_nan=allow_nan)
    return path


def verify_checkpoint(
    original: str | os.PathLike,
    converted: str | os.PathLike,
    options: Mapping[str, Any],
    report: Callable[[str], None] = print,
) -> list[str]:
    """Compares a converted checkpoint with what its original makes, bit by bit.

    Options that are not given are those of the conversion, which its manifest has.

    Args:
        original (`str` or `os.PathLike`): Folder, Hub repository or, of LLaVA-MoLE, file.
        converted (`str` or `os.PathLike`): Folder of the converted checkpoint.
        options (`Mapping[str, Any]`): Of the family's conversion, by name. None stands for an option's default.
        report (`Callable[[str], None]`, *optional*, defaults to `print`): Receives what is found, line by line.

    Returns:
        `list[str]`: What differs, tensor by tensor.

    Raises:
        ValueError: if one of the two cannot be read.
    """
    folder = Path(converted)
    with CheckpointReader(folder) as reader:  # fails before the original, which may be large, is opened
        dtype = next((str(info.dtype)[6:] for info in reader.tensors.values() if info.dtype.is_floating_point), "")
    settled = {name: value for name, value in options.items() if value is not None and value is not False}
    if os.path.lexists(folder / MANIFEST_FILE):
        manifest = Manifest.load(folder / MANIFEST_FILE)
        noted = {name: value for name, value in manifest.options.items() if name in options and name not in settled}
        noted = {name: value for name, value in noted.items() if isinstance(value, (str, int, float)) and value}
        noted.pop("dtype", None)
        if noted:
            report(f"Options of the conversion, by its manifest: {', '.join(f'{k} {v}' for k, v in noted.items())}.")
        settled |= noted
    if dtype in DTYPES:
        settled["dtype"] = dtype
    with open_checkpoint(original, settled, report) as conversion:
        report(f"Compared in {dtype}, which {folder} has.")
        return verify_conversion(conversion, folder)
