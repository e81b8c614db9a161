"""Writes a converted model's weights back in the layout of its original code, see `reversing` for what comes back.

Source: file names and layouts of the original codes; transformers' `save_pretrained` with `save_original_format`.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from uuid import uuid4

import torch
from transformers import AutoConfig
from transformers.core_model_loading import WeightRenaming

from ..auto import FAMILIES
from .checking import SETTINGS_PATTERNS, file_kind, read_json, settings_files
from .hashing import sync_folder
from .mapping import ConversionStep
from .reading import CheckpointReader, resolve_checkpoint
from .reversing import FROM_ORIGINAL, fit_to_original, plan_restoration
from .writing import atomic_folder, check_free_space, check_output_folder, write_sharded


CHECKPOINT_PATTERNS = ["model*.safetensors", "pytorch_model*.bin", *SETTINGS_PATTERNS]


def restore_checkpoint(
    converted: str | os.PathLike,
    output: str | os.PathLike,
    original: str | os.PathLike | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Writes the weights of `converted` as its original code has them.

    With `original`, they have its names and dtypes, and what the conversion left out is taken from it: tensors that no
    parameter depends on, and rows of the vocabulary behind those of the tokenizer. Its configuration and tokenizer are
    copied; they are never made of the converted ones.

    Args:
        converted (`str` or `os.PathLike`): Folder or Hub repository of a model of this package.
        output (`str` or `os.PathLike`): New or empty folder, for safetensors; for LLaVA-MoLE a new file, `.pt`, which
            is put together in memory.
        original (`str` or `os.PathLike`, *optional*): What `converted` was made from: the folder or Hub repository,
            for LLaVA-MoLE the file. One with trained tensors alone gives a file with these alone.
        report (`Callable[[str], None]`, *optional*, defaults to `print`): Receives what was done, line by line.

    Returns:
        `Path`: `output`, which appears only when it is complete.

    Raises:
        ValueError: if the original code has no such model, if `original` is another one or has adapters that were
            merged, or if `output` exists already. Nothing is left behind.
        FileNotFoundError: if a file or a folder is missing.
    """
    folder = resolve_checkpoint(converted, CHECKPOINT_PATTERNS)
    settings = read_json(folder / "config.json", "a configuration")
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    family = next((family for family in FAMILIES if family.model_type == model_type), None)
    if family is None:
        raise ValueError(
            f"The checkpoint must be a converted one, with a `model_type` of "
            f"{', '.join(family.model_type for family in FAMILIES)}, but {folder / 'config.json'} has {model_type!r}."
        )
    config = AutoConfig.from_pretrained(folder)
    layout = family.load("weight_mapping", "original_layout")(config)
    is_file = layout.entry is not None
    path = check_output_file(output) if is_file else check_output_folder(output)

    with ExitStack() as stack:
        source = stack.enter_context(CheckpointReader(folder))
        steps: Sequence[ConversionStep] = (plan := plan_restoration(source.tensors, layout.transforms))
        reader = None
        if original is None:
            report("Not restored: what the conversion left out, which only `original` (`--original`) could give.")
        else:
            reader = stack.enter_context(open_original(original, layout.entry))
            forward = family.load("weight_mapping", "original_weight_mapping")()
            renamings = [transform for transform in forward if isinstance(transform, WeightRenaming)]
            num_tokens = config.get_text_config().vocab_size
            steps = fit_to_original(plan, reader.tensors, renamings, layout.unused, num_tokens, is_file, report)
        read = partial(_read, source, reader)
        if layout.entry is not None:
            num_bytes = write_torch_file(path, steps, read, layout.entry)
        else:
            with atomic_folder(path) as incomplete:
                num_bytes = write_sharded(incomplete, steps, read)
                copy_settings(reader, incomplete)
    report(f"Wrote {num_bytes / 1e6:,.1f} MB of {sum(len(step.outputs) for step in steps)} tensors, to {path}.")
    if reader is None or is_file:
        report("Configuration and tokenizer are not part of it: take those that the original code has used so far.")
    return path


def check_output_file(output: str | os.PathLike) -> Path:
    """Checks that a file can be created.

    Args:
        output (`str` or `os.PathLike`): The file, called `.pt`.

    Returns:
        `Path`: Its absolute path.

    Raises:
        ValueError: if there is something already, or it is called otherwise.
    """
    path = Path(output).resolve()
    if path.suffix != ".pt" or os.path.lexists(path):
        found = f"is {file_kind(path)}" if os.path.lexists(path) else "does not end in .pt"
        raise ValueError(
            f"The output must be a new file, such as llava_mole_r16_a32_e3.pt, but {path} {found}. Choose another "
            "name."
        )
    return path


def open_original(original: str | os.PathLike, entry: str | None) -> CheckpointReader:
    """Opens the original's tensors.

    Args:
        original (`str` or `os.PathLike`): Folder or Hub repository or, with an `entry`, file.
        entry (`str`, *optional*): Key of the tensors in one torch file.

    Returns:
        `CheckpointReader`: The tensors.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if it holds no weights, or damaged ones.
    """
    if entry is None:
        return CheckpointReader(resolve_checkpoint(original, CHECKPOINT_PATTERNS))
    path = Path(original)
    if not path.is_file():
        raise FileNotFoundError(
            f"`original` (`--original`) must be the file of the original's training, but {path} is {file_kind(path)}."
        )
    # A link that the user names is trusted. One into the Hub's cache keeps its name, which tells its format.
    linked = path.resolve()
    file = path if linked.parent.name == "blobs" else linked
    return CheckpointReader(file.parent, file.name, entry)


def write_torch_file(
    path: Path, steps: Sequence[ConversionStep], read: Callable[[str], torch.Tensor], entry: str
) -> int:
    """Writes `{entry: tensors}`, as the original's training does.

    Args:
        path (`Path`): The file, which appears only when it is complete.
        steps (`Sequence[ConversionStep]`): What makes the tensors.
        read (`Callable[[str], torch.Tensor]`): Returns the source tensor of a name.
        entry (`str`): Key of the tensors.

    Returns:
        `int`: The bytes of all tensors.

    Raises:
        ValueError: if the disk is too full, or there is a file meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = sum(info.num_bytes for step in steps for info in step.outputs.values())
    check_free_space(path.parent, num_bytes)
    # Copies: what shares memory would be saved so, and a part of a tensor with all of it.
    tensors = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for step in steps
        for name, tensor in step.convert(read).items()
    }
    with _atomic_file(path) as incomplete:
        torch.save({entry: tensors}, incomplete)
    return num_bytes


@contextmanager
def _atomic_file(path: Path) -> Iterator[Path]:
    incomplete = path.parent / f".{path.name}.incomplete-{uuid4().hex[:8]}"
    try:
        yield incomplete
        with open(incomplete, "rb+") as file:
            os.fsync(file.fileno())
        check_output_file(path)
        incomplete.rename(path)
        sync_folder(path.parent)
    finally:
        incomplete.unlink(missing_ok=True)


def copy_settings(original: CheckpointReader | None, folder: Path) -> None:
    """Copies the original's configuration and tokenizer, whose weights have another index now.

    Args:
        original (`CheckpointReader`, *optional*): The original; without one nothing is copied.
        folder (`Path`): Where to.
    """
    for path in [] if original is None else settings_files(original.folder):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)


def _read(source: CheckpointReader, original: CheckpointReader | None, name: str) -> torch.Tensor:
    if original is not None and name.startswith(FROM_ORIGINAL):
        return original.read(name.removeprefix(FROM_ORIGINAL))
    return source.read(name)
