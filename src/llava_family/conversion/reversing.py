"""Plans the way back: which of an original's tensors a converted model makes, checked before any value is read.

Design choices:
- Names and shapes follow from the model alone. What the conversion left out, and the dtypes of a checkpoint that has
  several, only the original knows: with it, what nobody changed comes back bit by bit.
- Nothing is dropped or made up silently: every tensor of the original is restored, or one that conversions leave out.
- Adapters that were merged cannot come back, and weights that have them already must never stand beside them.

Source: `reverse_transform` of transformers' `core_model_loading`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from .lora import LORA_NAME
from .mapping import ConversionStep, _on_meta, _raise_if_any, _reason
from .shards import TensorInfo


# Tells the original's tensors apart from the converted ones: none is called so.
FROM_ORIGINAL = "original:"
# The only name that a layout may share with the native one
SHARED_NAMES = {"lm_head.weight"}
# What a distributed training may put before all names
WRAPPER = "module."


@dataclass(frozen=True)
class Place:
    """Where a restored tensor goes.

    Attributes:
        name (`str`): Its name in the original.
        dtype (`torch.dtype`): Its dtype there.
        num_rows (`int`, *optional*): How many rows it has there, where the model has fewer.
    """

    name: str
    dtype: torch.dtype
    num_rows: int | None = None


@dataclass(frozen=True)
class RestoringStep(ConversionStep):
    """A step whose outputs take their places in the original; those without one are left out. Its other arguments are
    as in [`ConversionStep`].

    Attributes:
        places (`Mapping[str, Place]`): Place by output.
    """

    places: Mapping[str, Place] = field(default_factory=dict)

    def convert(self, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs the transform.

        Args:
            read (`Callable[[str], torch.Tensor]`): Returns the source tensor of a name.

        Returns:
            `dict[str, torch.Tensor]`: The original's tensors by name, of any shape, in the dtypes of their places.

        Raises:
            ValueError: if a value is too large for the dtype that the original has.
        """
        made = super().convert(read)
        restored = {}
        for name, place in self.places.items():
            tensor = made[name].to(place.dtype)
            if tensor.device.type != "meta" and not torch.isfinite(tensor).all() and torch.isfinite(made[name]).all():
                raise ValueError(
                    f"Tensor {place.name!r} has values up to {made[name].abs().max().item():g}, too large for "
                    f"{place.dtype}, which the original has. Restore it without `original` (`--original`)."
                )
            if place.num_rows is not None and place.num_rows > len(tensor):
                tensor = torch.cat([tensor, read(FROM_ORIGINAL + place.name)[len(tensor) :]])
            restored[place.name] = tensor
        return restored


def plan_restoration(
    tensors: Mapping[str, TensorInfo], transforms: Sequence[WeightTransform]
) -> tuple[RestoringStep, ...]:
    """Works out which of the original's tensors `tensors` make, with the dtypes that they have.

    Args:
        tensors (`Mapping[str, TensorInfo]`): Those of the converted model.
        transforms (`Sequence[WeightTransform]`): Every matching renaming applies, then the first matching converter.

    Returns:
        `tuple[RestoringStep, ...]`: What to do.

    Raises:
        ValueError: if the original has no name for a tensor, or one for two of them.
    """
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    collected: dict[str, tuple[WeightTransform, list[tuple[str, str]]]] = {}
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters)
        transform = WeightRenaming(name, target) if pattern is None else converter_of[pattern]
        collected.setdefault(target, (transform, []))[1].append((pattern or name, name))

    steps: list[RestoringStep] = []
    counts: Counter[str] = Counter()
    for target, (transform, sources) in collected.items():
        made = ConversionStep(transform, target, tuple(sources)).convert(partial(_on_meta, tensors))
        outputs = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}
        places = {name: Place(name, info.dtype) for name, info in outputs.items()}
        steps.append(RestoringStep(transform, target, tuple(sources), outputs=outputs, places=places))
        counts.update(list(outputs))
    _raise_if_any(
        {
            "tensors that the original has no name for": [
                name for name in counts if name in tensors and name not in SHARED_NAMES
            ],
            "names of the original for several tensors": [name for name, count in counts.items() if count > 1],
        }
    )
    return tuple(steps)


def fit_to_original(
    steps: Sequence[RestoringStep],
    original: Mapping[str, TensorInfo],
    renamings: Sequence[WeightRenaming],
    unused: Mapping[str, str],
    num_tokens: int,
    may_lack: bool,
    report: Callable[[str], None],
) -> list[ConversionStep]:
    """`steps` with the original's names, dtypes and rows, and further ones that copy what only the original has.

    Args:
        steps (`Sequence[RestoringStep]`): See [`plan_restoration`].
        original (`Mapping[str, TensorInfo]`): The original's tensors.
        renamings (`Sequence[WeightRenaming]`): Those of the conversion, which bring names of several versions of the
            original code together.
        unused (`Mapping[str, str]`): Why conversions leave tensors out, by regular expression.
        num_tokens (`int`): Rows of the model's vocabulary. The original may have more.
        may_lack (`bool`): Whether an original may lack tensors, as one of trained tensors alone. These are left out.
        report (`Callable[[str], None]`): Receives what was done, line by line.

    Returns:
        `list[ConversionStep]`: What to do.

    Raises:
        ValueError: if the original is not what the model was made from.
    """

    def key(name: str) -> str:
        return rename_source_key(name, list(renamings), [])[0]

    wrapper = WRAPPER if all(name.startswith(WRAPPER) for name in original) else ""
    name_of = {key(name.removeprefix(wrapper)): name for name in original}
    fitted: list[ConversionStep] = []
    absent: list[str] = []
    mismatched: list[str] = []
    rounded: list[str] = []
    extended: list[str] = []
    for step in steps:
        places, outputs = {}, {}
        for made, info in step.outputs.items():
            name = name_of.pop(key(made), None)
            if name is None:
                absent.append(made)
                continue
            wanted = original[name]
            if wanted.shape != info.shape:
                is_cut = info.shape[:1] == (num_tokens,) < wanted.shape[:1] and info.shape[1:] == wanted.shape[1:]
                (extended if is_cut else mismatched).append(f"{name} {wanted.shape}, not {info.shape}")
            rounded += [name] * _has_fewer_digits(info.dtype, wanted.dtype)
            places[made] = Place(name, wanted.dtype, wanted.shape[0] if wanted.shape else None)
            outputs[name] = wanted
        if places:
            fitted.append(replace(step, places=places, outputs=outputs))
    left_out = {name: _reason(name, unused) for name in name_of.values()}
    merged = [name for name in left_out if LORA_NAME.match(name)]
    _raise_if_any(
        {
            "tensors of `original` (`--original`) have another shape than the model's": mismatched,
            "tensors of the model are not in `original` (`--original`)": [] if may_lack else absent,
            "adapters of `original` (`--original`) were merged, and cannot come back": merged,
            "tensors of `original` (`--original`) are not in the model": [
                name for name, reason in left_out.items() if reason is None and name not in merged
            ],
        }
    )
    for reason, count in Counter(left_out.values()).items():
        report(f"From the original: {count} tensors, {reason}.")
    if extended:
        report(f"From the original: rows behind the tokenizer's vocabulary, of {len(extended)} tensors.")
    if absent:
        report(f"Left out: {len(absent)} tensors that the original does not have ({absent[0]}, ...).")
    if rounded:
        report(
            f"Rounded: {len(rounded)} tensors ({rounded[0]}, ...) have fewer digits here than in the original, and "
            "stay so. A conversion with --dtype float32 keeps all."
        )
    return [*fitted, *(_copy(name, original[name]) for name in left_out)]


def _has_fewer_digits(dtype: torch.dtype, other: torch.dtype) -> bool:
    are_floats = dtype.is_floating_point and other.is_floating_point
    return are_floats and torch.finfo(dtype).eps > torch.finfo(other).eps


def _copy(name: str, info: TensorInfo) -> ConversionStep:
    return ConversionStep(WeightRenaming(name, name), name, ((name, FROM_ORIGINAL + name),), outputs={name: info})
