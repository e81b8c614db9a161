"""Plans a conversion: which source tensors become which target tensors, checked in full before any value is read.

Design choices:
- Keys are renamed, and tensors converted, by transformers' own transforms, so that a converted checkpoint equals one
  that `from_pretrained` converts while it loads.
- The plan runs every transform on meta tensors. That gives names, shapes and dtypes of its outputs for any operation.
- Strict where the loader is lenient: it initialises a missing parameter, skips an unexpected tensor with a warning and
  casts integers and complex numbers to weights.

Source: transformers' `core_model_loading`, which does the same while it loads.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from .shards import TensorInfo


# Of a model's weights. What is quantized to less needs its scales, which a cast would silently leave out.
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ConversionStep:
    """One application of a transform: the tensors it needs together, and those it makes of them.

    Attributes:
        transform (`WeightTransform`): The transform.
        target (`str`): Name of what it makes, the first one of several.
        sources (`tuple[tuple[str, str], ...]`): Pairs of the transform's matching pattern and the tensor's name, in
            the order that operations see.
        model (`PreTrainedModel`, *optional*): For operations that look shapes up in it.
        outputs (`Mapping[str, TensorInfo]`): Shape and dtype of what comes out, by name.
    """

    transform: WeightTransform
    target: str
    sources: tuple[tuple[str, str], ...]
    model: PreTrainedModel | None = field(default=None, repr=False)
    outputs: Mapping[str, TensorInfo] = field(default_factory=dict)

    def convert(self, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs the transform.

        Args:
            read (`Callable[[str], torch.Tensor]`): Returns the source tensor of a name.

        Returns:
            `dict[str, torch.Tensor]`: The targets by name, of the shapes and dtypes of `outputs`. They are of any
            shape.
        """
        transform = deepcopy(self.transform)
        for pattern, name in self.sources:
            transform.add_tensor(self.target, name, pattern, partial(read, name))
        tensors = transform.convert(self.target, model=self.model, config=getattr(self.model, "config", None))
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class ConversionPlan:
    """All that a conversion does.

    Attributes:
        steps (`tuple[ConversionStep, ...]`): In the order of their sources.
        ignored (`Mapping[str, str]`): The sources that are left out on purpose, with the reason.
    """

    steps: tuple[ConversionStep, ...]
    ignored: Mapping[str, str]


def plan_conversion(
    tensors: Mapping[str, TensorInfo],
    transforms: Sequence[WeightTransform],
    expected: Mapping[str, Sequence[int] | TensorInfo],
    ignored: Mapping[str, str] | None = None,
    model: PreTrainedModel | None = None,
) -> ConversionPlan:
    """Works out how `tensors` become exactly the tensors of `expected`.

    Args:
        tensors (`Mapping[str, TensorInfo]`): The source tensors, in the order in which they are best read.
        transforms (`Sequence[WeightTransform]`): Every matching renaming applies, then the first matching converter.
        expected (`Mapping[str, Sequence[int] | TensorInfo]`): Name and shape of every tensor that must come out. With
            a `TensorInfo`, sources of floating point weights must be of one of `WEIGHT_DTYPES`, and all others of just
            the dtype that it says.
        ignored (`Mapping[str, str]`, *optional*): Reasons by regular expression, searched for in the names of sources
            that no expected tensor needs.
        model (`PreTrainedModel`, *optional*): Passed to operations, for those that look shapes up in it.

    Returns:
        `ConversionPlan`: What to do.

    Raises:
        ValueError: if a target is missing, made twice or of another shape or kind of dtype, or a source is left over.
    """
    wanted = {name: info for name, info in expected.items() if isinstance(info, TensorInfo)}
    expected = {name: info.shape if isinstance(info, TensorInfo) else info for name, info in expected.items()}
    collected, left_over, problems = _collect(tensors, transforms, expected)
    reasons = {name: _reason(name, ignored or {}) for name in left_over}
    steps, failures = [], []
    for target, (transform, sources) in collected.items():
        step = ConversionStep(transform, target, tuple(sources), model)
        try:
            outputs = step.convert(partial(_on_meta, tensors))
        except Exception as error:  # operations have no common error
            failures.append(f"{target} from {_names(step)}: {error}")
            continue
        steps.append(replace(step, outputs={name: TensorInfo(tuple(t.shape), t.dtype) for name, t in outputs.items()}))
    _raise_if_any(
        {
            "target tensors without a source": _missing(expected, steps, collected),
            "source tensors without a target": [name for name, reason in reasons.items() if reason is None],
            "source tensors for a target that another one makes": problems,
            "target tensors of another shape or name than expected": _mismatched(expected, steps),
            "source tensors of another kind of dtype than expected": _wrong_dtypes(tensors, wanted, steps),
            "failed conversions": failures,
        }
    )
    position = {name: index for index, name in enumerate(tensors)}
    steps.sort(key=lambda step: min(position[name] for _, name in step.sources))
    return ConversionPlan(tuple(steps), {name: reason for name, reason in reasons.items() if reason is not None})


def _collect(tensors, transforms, expected) -> tuple[dict[str, tuple[WeightTransform, list]], list[str], list[str]]:
    """Transform and sources by (first) target; the sources without a target; the sources of a target that is taken."""
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    collected: dict[str, tuple[WeightTransform, list]] = {}
    left_over, clashes = [], []
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters)
        if target not in expected and name in expected:
            target, pattern = name, None  # a name of the target format that a transform happens to match
        if target not in expected:
            left_over.append(name)
            continue
        converter = converter_of.get(pattern)
        claim = collected.setdefault(target, (converter or WeightRenaming(name, target), []))
        pattern = pattern or name
        taken = [source for source_pattern, source in claim[1] if source_pattern == pattern]
        if claim[1] and (converter is not claim[0] or (taken and _names_one_tensor(pattern))):
            clashes.append(f"{name} for {target}, made of {claim[1][0][1]}")
        else:
            claim[1].append((pattern, name))
    return collected, left_over, clashes


def _names_one_tensor(pattern: str) -> bool:
    return not set(pattern) & set("*+?[({|") and r"\d" not in pattern


def _on_meta(tensors: Mapping[str, TensorInfo], name: str) -> torch.Tensor:
    return torch.empty(tensors[name].shape, dtype=tensors[name].dtype, device="meta")


def _reason(name: str, ignored: Mapping[str, str]) -> str | None:
    return next((reason for pattern, reason in ignored.items() if re.search(pattern, name)), None)


def _names(step: ConversionStep) -> str:
    names = [name for _, name in step.sources]
    return names[0] if len(names) == 1 else f"{len(names)} tensors ({names[0]}, ...)"


def _missing(expected, steps: list[ConversionStep], collected) -> list[str]:
    made = {name for step in steps for name in step.outputs}
    return [name for name in expected if name not in made and name not in collected]


def _mismatched(expected, steps: list[ConversionStep]) -> list[str]:
    mismatched: list[str] = []
    maker_of: dict[str, ConversionStep] = {}
    for step in steps:
        for name, info in step.outputs.items():
            wanted = tuple(expected[name]) if name in expected else None
            if maker_of.setdefault(name, step) is not step:
                mismatched.append(f"{name} from {_names(step)} as well as from {_names(maker_of[name])}")
            elif wanted is None:
                mismatched.append(f"{name} from {_names(step)} is no target")
            elif info.shape != wanted:
                mismatched.append(f"{name} from {_names(step)} has shape {info.shape}, expected {wanted}")
    return mismatched


def _wrong_dtypes(tensors: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo], steps) -> list[str]:
    wrong = []
    for step in steps:
        for info in (wanted[name] for name in step.outputs if name in wanted):
            allowed = WEIGHT_DTYPES if info.dtype.is_floating_point else (info.dtype,)
            for name in [name for _, name in step.sources if tensors[name].dtype not in allowed]:
                dtypes = " or ".join(str(dtype) for dtype in allowed)
                wrong.append(f"{name} for {step.target} has dtype {tensors[name].dtype}, expected {dtypes}")
    return list(dict.fromkeys(wrong))


def _raise_if_any(problems: Mapping[str, list[str]], limit: int = 10):
    lines = []
    for title, entries in problems.items():
        if entries:
            shown = entries[:limit] + ([f"... and {len(entries) - limit} more"] if len(entries) > limit else [])
            lines.append(f"{len(entries)} {title}:\n  " + "\n  ".join(shown))
    if lines:
        raise ValueError(
            "The checkpoint does not fit the model. Check that it is complete and has its own configuration.\n"
            + "\n".join(lines)
        )
