"""Writes a converted checkpoint as safetensors: shard by shard, tensor by tensor, none of which is copied needlessly.

Design choices:
- The header of a shard follows from the plan, so tensors go to the disk as they are made. Memory holds two at a time.
- A file has its name only when all of it is on the disk: it is written under a temporary name, synced and renamed.
- Written here rather than by `safetensors.torch.save_file`, which wants all tensors of a file at once, in memory of
  their own. The files are those that it would write, to the last byte.

Source: the format of safetensors, and the names of transformers' `save_pretrained`.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import torch
from transformers.utils import logging

from .hashing import HashedFile, sync_folder
from .mapping import ConversionStep
from .memory import reused_memory
from .shards import TensorInfo


MAX_SHARD_BYTES = 5_000_000_000
# Configuration, tokenizer and the shards' headers, generously.
RESERVED_BYTES = 50_000_000
INDEX_FILE = "model.safetensors.index.json"
PARTIAL_SUFFIX = ".partial"

# In the order in which safetensors puts their tensors into a file
SAFETENSORS_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# Called with a shard, its SHA-256 and how many values that are not finite each of its source tensors has.
ShardCallback = Callable[["Shard", str, Mapping[str, int]], None]


@dataclass(frozen=True)
class Shard:
    """A file to be written.

    Attributes:
        file (`str`): Its name.
        steps (`tuple[ConversionStep, ...]`): What makes its tensors.
        tensors (`Mapping[str, TensorInfo]`): These in the order of the file, after the cast.
    """

    file: str
    steps: tuple[ConversionStep, ...]
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())


def check_output_folder(output: str | os.PathLike) -> Path:
    """Checks that a folder can be created.

    Args:
        output (`str` or `os.PathLike`): The folder, new or empty.

    Returns:
        `Path`: Its absolute path.

    Raises:
        ValueError: if it is a file, or not empty.
    """
    path = Path(output).resolve()
    if path.exists() and not path.is_dir():
        raise ValueError(f"The output must be a new folder, but {path} is a file. Choose another name.")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"The output must be a new or empty folder, but {path} is not empty. Choose another name.")
    return path


def move_to_output(incomplete: Path, output: Path) -> None:
    """Gives a finished folder its name.

    Args:
        incomplete (`Path`): The folder.
        output (`Path`): Its name.

    Raises:
        ValueError: if there is something of this name meanwhile.
    """
    check_output_folder(output)
    if output.exists():
        output.rmdir()  # Windows renames over nothing, not even over an empty folder
    incomplete.rename(output)
    sync_folder(output.parent)


@contextmanager
def atomic_folder(output: str | os.PathLike) -> Iterator[Path]:
    """A folder to write to, `.<name>.incomplete-...` beside `output`, that is renamed to `output` at the end.

    Any exception, also a keyboard interrupt, removes it. Parents of `output` are created and stay.

    Args:
        output (`str` or `os.PathLike`): The folder, new or empty.

    Yields:
        `Path`: The folder to write to.

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
        move_to_output(incomplete, path)
    except BaseException:
        shutil.rmtree(incomplete, ignore_errors=True)
        raise


def write_sharded(
    folder: str | os.PathLike,
    steps: Sequence[ConversionStep],
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    finished: Collection[str] = (),
    on_shard: ShardCallback = lambda shard, digest, not_finite: None,
) -> int:
    """Converts and writes `steps` as safetensors, in one file or in shards with an index, as transformers names them.

    Memory holds two tensors at a time, or those of a step. The outputs of one step are never spread over shards.

    Args:
        folder (`str` or `os.PathLike`): Existing folder.
        steps (`Sequence[ConversionStep]`): What to write, see [`plan_conversion`].
        read (`Callable`): Returns the source tensor of a name.
        dtype (`torch.dtype`, *optional*): Of all floating point outputs; theirs by default.
        max_shard_bytes (`int`, *optional*, defaults to 5 GB): Tensor bytes per shard, exceeded only by a single step.
        finished (`Collection[str]`, *optional*): Names of shards that are in the folder already, and stay.
        on_shard (`Callable`, *optional*): Called when a shard is on the disk.

    Returns:
        `int`: The bytes of all tensors.

    Raises:
        ValueError: if the disk is too full, `dtype` cannot hold a value, or a step makes other tensors than planned.
    """
    shards = plan_shards(steps, dtype, max_shard_bytes)
    total_bytes = sum(shard.num_bytes for shard in shards)
    done_bytes = sum(shard.num_bytes for shard in shards if shard.file in finished)
    check_free_space(folder, total_bytes - done_bytes)
    with logging.tqdm(
        total=total_bytes, initial=done_bytes, unit="B", unit_scale=True, desc="Converting weights"
    ) as progress:
        for shard in shards:
            if shard.file not in finished:
                not_finite: dict[str, int] = {}
                with reused_memory():
                    digest = write_shard(Path(folder), shard, read, dtype, progress.update, not_finite)
                on_shard(shard, digest, not_finite)
    if len(shards) > 1:
        infos = [info for shard in shards for info in shard.tensors.values()]
        metadata = {"total_parameters": sum(info.num_parameters for info in infos), "total_size": total_bytes}
        weight_map = {name: shard.file for shard in shards for name in shard.tensors}
        index = {"metadata": metadata, "weight_map": weight_map}
        write_file(Path(folder, INDEX_FILE), (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
    return total_bytes


def plan_shards(
    steps: Sequence[ConversionStep], dtype: torch.dtype | None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Shard]:
    """Plans the files that [`write_sharded`] writes.

    Args:
        steps (`Sequence[ConversionStep]`): What is written.
        dtype (`torch.dtype`, *optional*): Of all floating point outputs; theirs by default.
        max_shard_bytes (`int`, *optional*, defaults to 5 GB): Tensor bytes per shard, exceeded only by a single step.

    Returns:
        `list[Shard]`: The files.

    Raises:
        ValueError: if safetensors has no such dtype.
    """
    groups: list[list[ConversionStep]] = [[]]
    filled = 0
    for step in steps:
        num_bytes = sum(_cast_info(info, dtype).num_bytes for info in step.outputs.values())
        if groups[-1] and filled + num_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(step)
        filled += num_bytes
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    shards = []
    for name, group in zip(names, groups, strict=True):
        infos = {output: _cast_info(info, dtype) for step in group for output, info in step.outputs.items()}
        for output, info in infos.items():
            if info.dtype not in SAFETENSORS_DTYPES:
                raise ValueError(
                    f"Tensor {output!r} has dtype {info.dtype}, expected one of "
                    f"{', '.join(str(known) for known in SAFETENSORS_DTYPES)}."
                )
        ordered = sorted(infos.items(), key=lambda item: (list(SAFETENSORS_DTYPES).index(item[1].dtype), item[0]))
        shards.append(Shard(name, tuple(group), dict(ordered)))
    return shards


def write_shard(
    folder: Path,
    shard: Shard,
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype | None,
    progress: Callable[[int], object],
    not_finite: dict[str, int],
) -> str:
    """Writes one file.

    Args:
        folder (`Path`): Existing folder.
        shard (`Shard`): What to write.
        read (`Callable`): Returns the source tensor of a name.
        dtype (`torch.dtype`, *optional*): Of all floating point outputs; theirs by default.
        progress (`Callable[[int], object]`): Called with the bytes of each tensor that was written.
        not_finite (`dict[str, int]`): Receives how many NaN and infinite values source tensors have, where any.

    Returns:
        `str`: Its hexadecimal SHA-256.

    Raises:
        ValueError: see [`write_sharded`]. The file does not appear then.
    """

    def counted_read(name: str) -> torch.Tensor:
        tensor = read(name)
        if count := count_not_finite(tensor):
            not_finite[name] = count
        return tensor

    step_of = {name: step for step in shard.steps for name in step.outputs}
    pending: dict[str, torch.Tensor] = {}
    with _new_file(folder / shard.file) as file:
        file.write(_header(shard.tensors))
        for name in shard.tensors:
            if name not in pending:
                pending |= _convert(step_of[name], counted_read, dtype)
            tensor = pending.pop(name).detach().contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            progress(tensor.nbytes)
            del tensor
        return file.finish()


def write_file(path: Path, data: bytes) -> str:
    """Writes a file that appears only when it is on the disk.

    Args:
        path (`Path`): The file.
        data (`bytes`): Its content.

    Returns:
        `str`: Its hexadecimal SHA-256.
    """
    with _new_file(path) as file:
        file.write(data)
        return file.finish()


@contextmanager
def _new_file(path: Path) -> Iterator[HashedFile]:
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    partial.unlink(missing_ok=True)  # of a run that was killed
    file = HashedFile(partial)
    try:
        yield file
    except BaseException:
        file.close()
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)
    sync_folder(path.parent)


def _header(tensors: Mapping[str, TensorInfo]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in tensors.items():
        start, end = end, end + info.num_bytes
        shape = list(info.shape)
        entries[name] = {"dtype": SAFETENSORS_DTYPES[info.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    return len(text).to_bytes(8, "little") + text


def _cast_info(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return info if dtype is None or not info.dtype.is_floating_point else TensorInfo(info.shape, dtype)


def _convert(
    step: ConversionStep, read: Callable[[str], torch.Tensor], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    converted = {}
    for name, tensor in step.convert(read).items():
        info = _cast_info(TensorInfo(tuple(tensor.shape), tensor.dtype), dtype)
        planned = _cast_info(step.outputs[name], dtype) if name in step.outputs else None
        if info != planned:
            raise ValueError(f"Tensor {name!r} was planned as {planned}, but was converted to {info}.")
        converted[name] = tensor.to(info.dtype)
        if info.dtype != tensor.dtype:
            _check_finite(name, tensor, converted[name])
    if len(converted) != len(step.outputs):
        raise ValueError(f"The tensors {list(step.outputs)} were planned, but only {list(converted)} were converted.")
    return converted


def count_not_finite(tensor: torch.Tensor) -> int:
    """Counts values that are NaN or infinite.

    Args:
        tensor (`torch.Tensor` of any shape and dtype): Integers are always finite.

    Returns:
        `int`: How many there are.
    """
    if tensor.numel() == 0 or not tensor.dtype.is_floating_point:
        return 0
    # Forty times as fast as `isfinite`, which has the last word only where it is needed.
    smallest, largest = torch.aminmax(tensor)
    if torch.isfinite(smallest) and torch.isfinite(largest):
        return 0
    return tensor.numel() - int(torch.isfinite(tensor).sum())


def _check_finite(name: str, original: torch.Tensor, cast: torch.Tensor):
    if count_not_finite(cast) > count_not_finite(original):
        finite = original[torch.isfinite(original)]
        raise ValueError(
            f"Tensor {name!r} has values up to {finite.abs().max().item():g}, too large for {cast.dtype}, which "
            f"ends at {torch.finfo(cast.dtype).max:g}. Convert to bfloat16 or float32."
        )


def check_free_space(folder: str | os.PathLike, num_bytes: int):
    """Checks that weights, and all else that belongs to them, have room.

    Args:
        folder (`str` or `os.PathLike`): Where they are to be written.
        num_bytes (`int`): Bytes of the weights.

    Raises:
        ValueError: if the disk is too full.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes + RESERVED_BYTES:
        raise ValueError(
            f"The output needs {math.ceil((num_bytes + RESERVED_BYTES) / 1e6)} MB, but the disk of {folder} has "
            f"{free // 10**6} MB left. Free some, or choose an output folder on another disk."
        )
