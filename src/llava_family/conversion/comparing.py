"""What a conversion does to every tensor, and whether a converted checkpoint is just that.

Source: no counterpart: the original codes convert nothing.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.utils import logging

from .mapping import ConversionStep
from .reading import CheckpointReader
from .scripting import Conversion
from .shards import TensorInfo


def key_report(conversion: Conversion) -> list[str]:
    """Says what becomes of every source tensor.

    Args:
        conversion (`Conversion`): The plan.

    Returns:
        `list[str]`: Lines: kind, how often, names with `*` for all numbers; and totals.
    """
    rows: Counter[tuple[str, str]] = Counter()
    tensors: Counter[str] = Counter()
    for step in conversion.plan.steps:
        kind = _kind(step)
        sources = dict.fromkeys(_pattern(name) for _, name in step.sources)
        targets = dict.fromkeys(_pattern(name) for name in step.outputs)
        names = ", ".join(sources) if kind == "mapped" else f"{', '.join(sources)} -> {', '.join(targets)}"
        rows[kind, names] += 1
        tensors[kind] += len(step.sources)
    for name, reason in conversion.plan.ignored.items():
        rows["ignored", f"{_pattern(name)}: {reason}"] += 1
        tensors["ignored"] += 1
    lines = [f"{kind:<9} {count:>5} x  {names}" for (kind, names), count in rows.items()]
    infos = [info for step in conversion.plan.steps for info in step.outputs.values()]
    itemsize = conversion.dtype.itemsize
    num_bytes = sum(info.num_parameters * itemsize for info in infos)
    kinds = ", ".join(f"{count} {kind}" for kind, count in tensors.items())
    return [
        *lines,
        f"Total: {len(conversion.source.tensors)} tensors of the original ({kinds}) become {len(infos)} tensors, "
        f"{sum(info.num_parameters for info in infos):,} parameters, {num_bytes / 1e6:,.0f} MB in "
        f"{str(conversion.dtype)[6:]}.",
    ]


def _kind(step: ConversionStep) -> str:
    if len(step.sources) > 1:
        return "merged" if len(step.outputs) == 1 else "regrouped"
    if len(step.outputs) > 1:
        return "split"
    if getattr(step.transform, "operations", None):
        return "changed"
    return "mapped" if step.sources[0][1] in step.outputs else "renamed"


def _pattern(name: str) -> str:
    return re.sub(r"(?<![A-Za-z_\d])\d+(?![A-Za-z_\d])", "*", name)


def differences(conversion: Conversion, converted: CheckpointReader) -> Iterator[str]:
    """Compares the tensors of a converted checkpoint with those that the conversion makes, bit by bit.

    Args:
        conversion (`Conversion`): What should have been written; its `dtype` does not matter.
        converted (`CheckpointReader`): What was. Every tensor is compared in the dtype that it has there.

    Yields:
        `str`: What differs, one line for each tensor.
    """
    expected = {name for step in conversion.plan.steps for name in step.outputs}
    for name in converted.tensors:
        if name not in expected:
            yield f"{name}: unexpected, the original makes no such tensor."
    total = sum(info.num_bytes for info in converted.tensors.values())
    with logging.tqdm(total=total, unit="B", unit_scale=True, desc="Comparing weights") as progress:
        for step in conversion.plan.steps:
            present = [name for name in step.outputs if name in converted.tensors]
            for name in step.outputs:
                if name not in converted.tensors:
                    yield f"{name}: missing."
            made = step.convert(conversion.source.read) if present else {}
            for name in present:
                if difference := _difference(made[name], converted.read(name)):
                    yield f"{name}: {difference}"
                progress.update(converted.tensors[name].num_bytes)
            made.clear()


def _difference(original: torch.Tensor, found: torch.Tensor) -> str | None:
    if original.shape != found.shape or original.dtype.is_floating_point != found.dtype.is_floating_point:
        expected = TensorInfo(tuple(original.shape), original.dtype)
        return f"shape {tuple(found.shape)} and {found.dtype}, expected {expected.shape} and {expected.dtype}."
    wanted = original.to(found.dtype) if found.dtype.is_floating_point else original
    # Bytes, since values say that NaN differs from itself and that zero equals minus zero.
    if wanted.dtype == found.dtype and torch.equal(_as_bytes(wanted), _as_bytes(found)):
        return None
    unequal = ~((wanted == found) | ((wanted != wanted) & (found != found)))
    count = int(unequal.sum())
    if not count:
        return "the same values in other bits (signs of zero, kinds of NaN, or dtype)."
    largest = (wanted[unequal].double() - found[unequal].double()).abs().max().item()
    return f"{count:,} of {found.numel():,} values differ, by up to {largest:g}."


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def verify_conversion(conversion: Conversion, folder: Path) -> list[str]:
    """Finds all [`differences`] between a conversion and a checkpoint.

    Args:
        conversion (`Conversion`): What should have been written.
        folder (`Path`): What was.

    Returns:
        `list[str]`: What differs; empty if nothing does.

    Raises:
        ValueError: if the checkpoint cannot be read.
    """
    with CheckpointReader(folder) as converted:
        return list(differences(conversion, converted))
