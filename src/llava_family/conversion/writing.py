"""Writes a converted checkpoint: shard by shard, into a folder that appears only when it is complete."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch
from safetensors.torch import save_file
from transformers.utils import logging

from .mapping import ConversionStep
from .reading import TensorInfo


MAX_SHARD_BYTES = 5_000_000_000
# Configuration, tokenizer and the shards' headers, generously.
RESERVED_BYTES = 50_000_000


def check_output_folder(output: str | os.PathLike) -> Path:
    """The absolute path of a folder that can be created; ValueError if it exists already and is not empty."""
    path = Path(output).resolve()
    if path.exists() and not path.is_dir():
        raise ValueError(f"The output must be a new folder, but {path} is a file. Choose another name.")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"The output must be a new or empty folder, but {path} is not empty. Choose another name.")
    return path


@contextmanager
def atomic_folder(output: str | os.PathLike) -> Iterator[Path]:
    """A folder to write to, `.<name>.incomplete-...` beside `output`, that is renamed to `output` at the end.

    Any exception, also a keyboard interrupt, removes it. Parents of `output` are created and stay.

    Raises:
        ValueError: if `output` exists already and is not empty.
    """
    path = check_output_folder(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, since a rename is atomic within one file system only.
    incomplete = path.parent / f".{path.name}.incomplete-{uuid4().hex[:8]}"
    try:
        incomplete.mkdir()
        yield incomplete
        check_output_folder(path)
        if path.exists():
            path.rmdir()  # Windows renames over nothing, not even over an empty folder
        incomplete.rename(path)
    except BaseException:
        shutil.rmtree(incomplete, ignore_errors=True)
        raise


def write_sharded(
    folder: str | os.PathLike,
    steps: Sequence[ConversionStep],
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Converts and writes `steps` as safetensors, in one file or in shards with an index, as transformers names them.

    Memory holds one shard at a time. The outputs of one step are never spread over shards.

    Args:
        folder (`str` or `os.PathLike`): Existing folder.
        steps (`Sequence[ConversionStep]`): What to write, see [`plan_conversion`].
        read (`Callable`): Returns the source tensor of a name.
        dtype (`torch.dtype`, *optional*): Of all floating point outputs; theirs by default.
        max_shard_bytes (`int`, *optional*, defaults to 5 GB): Tensor bytes per shard, exceeded only by a single step.

    Returns:
        `int`: The bytes of all tensors.

    Raises:
        ValueError: if the disk is too full, `dtype` cannot hold a value, or a step makes other tensors than planned.
    """
    shards = _plan_shards(steps, dtype, max_shard_bytes)
    outputs = [_cast_info(info, dtype) for step in steps for info in step.outputs.values()]
    total_bytes = sum(info.num_bytes for info in outputs)
    _check_free_space(folder, total_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map = {}
    with logging.tqdm(total=total_bytes, unit="B", unit_scale=True, desc="Converting weights") as progress:
        for file, shard in zip(names, shards, strict=True):
            tensors = {}
            for step in shard:
                converted = _convert(step, read, dtype)
                tensors.update(converted)
                progress.update(sum(tensor.nbytes for tensor in converted.values()))
            save_file(tensors, Path(folder, file), metadata={"format": "pt"})
            # safetensors makes files that nobody else can read, whatever the umask.
            Path(folder, file).chmod(Path(folder).stat().st_mode & 0o666)
            weight_map.update(dict.fromkeys(tensors, file))
            del tensors, converted  # before the next shard is read, not after
    if len(shards) > 1:
        metadata = {"total_parameters": sum(info.num_parameters for info in outputs), "total_size": total_bytes}
        with open(os.path.join(folder, "model.safetensors.index.json"), "w", encoding="utf-8") as index:
            index.write(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n")
    return total_bytes


def _plan_shards(steps: Sequence[ConversionStep], dtype: torch.dtype | None, limit: int) -> list[list[ConversionStep]]:
    shards: list[list[ConversionStep]] = [[]]
    filled = 0
    for step in steps:
        num_bytes = sum(_cast_info(info, dtype).num_bytes for info in step.outputs.values())
        if shards[-1] and filled + num_bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(step)
        filled += num_bytes
    return shards


def _cast_info(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return info if dtype is None or not info.dtype.is_floating_point else TensorInfo(info.shape, dtype)


def _convert(step: ConversionStep, read: Callable[[str], torch.Tensor], dtype: torch.dtype | None) -> dict:
    converted = {}
    for name, tensor in step.convert(read).items():
        info = _cast_info(TensorInfo(tuple(tensor.shape), tensor.dtype), dtype)
        planned = _cast_info(step.outputs[name], dtype) if name in step.outputs else None
        if info != planned:
            raise ValueError(f"Tensor {name!r} was planned as {planned}, but was converted to {info}.")
        # A copy of its own: nothing stays mapped to the source files, no two tensors share memory.
        converted[name] = tensor.to(info.dtype, copy=True, memory_format=torch.contiguous_format)
        if info.dtype != tensor.dtype:
            _check_finite(name, tensor, converted[name])
    if len(converted) != len(step.outputs):
        raise ValueError(f"The tensors {list(step.outputs)} were planned, but only {list(converted)} were converted.")
    return converted


def _check_finite(name: str, original: torch.Tensor, cast: torch.Tensor):
    if not torch.isfinite(cast).all() and torch.isfinite(original).all():
        raise ValueError(
            f"Tensor {name!r} has values up to {original.abs().max().item():g}, too large for {cast.dtype}, which "
            f"ends at {torch.finfo(cast.dtype).max:g}. Convert to bfloat16 or float32."
        )


def _check_free_space(folder: str | os.PathLike, num_bytes: int):
    free = shutil.disk_usage(folder).free
    if free < num_bytes + RESERVED_BYTES:
        raise ValueError(
            f"The output needs {math.ceil((num_bytes + RESERVED_BYTES) / 1e6)} MB, but the disk of {folder} has "
            f"{free // 10**6} MB left. Free some, or choose an output folder on another disk."
        )
