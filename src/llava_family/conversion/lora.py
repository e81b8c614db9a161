"""Merges LoRA adapters that a checkpoint holds beside the weights that they belong to.

Source: PEFT's `merge_and_unload`, for a checkpoint that is not loaded.
"""

import math
import re

import torch

from .combining import CheckpointTensors


# PEFT names the adapter in a model's own state dict, and leaves the name out of an adapter's checkpoint.
LORA_NAME = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
BASE_LAYER = ".base_layer."


def has_lora(tensors: CheckpointTensors) -> bool:
    """Whether there are adapters to merge.

    Args:
        tensors (`CheckpointTensors`): Of the checkpoint.
    """
    return any(LORA_NAME.match(name) for name in tensors.tensors)


def merge_lora(
    tensors: CheckpointTensors, alpha: float, rank: int | None = None, dtype: torch.dtype | None = None
) -> int:
    """Replaces every weight `W` that has an adapter by `W + alpha / rank * B @ A`.

    The sum is computed in float32, or in float64 where `W` is that, and rounded once.

    Args:
        tensors (`CheckpointTensors`): Changed in place. Values are merged when they are read.
        alpha (`float`): `lora_alpha` of the training.
        rank (`int`, *optional*): What every rank must be; by default they are those of the tensors.
        dtype (`torch.dtype`, *optional*): Of the merged weights; that of `W` by default.

    Returns:
        `int`: How many weights were merged.

    Raises:
        ValueError: if a part is missing, shapes do not fit together, or a weight has several adapters.
    """
    if not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(f"`lora_alpha` must be positive and finite, but is {alpha}.")
    sides: dict[str, dict[str, str]] = {}
    for name in tensors.tensors:
        if match := LORA_NAME.match(name):
            sides_of_module = sides.setdefault(match["module"], {})
            if match["side"] in sides_of_module:
                raise ValueError(
                    f"A weight must have one adapter, but there are {sides_of_module[match['side']]} and {name}."
                )
            sides_of_module[match["side"]] = name
    for name in [name for name in tensors.tensors if BASE_LAYER in name and not LORA_NAME.match(name)]:
        tensors.rename(name, name.replace(BASE_LAYER, "."))
    for module, names in sides.items():
        _merge(tensors, f"{module}.weight", names, alpha, rank, dtype)
    return len(sides)


def _merge(
    tensors: CheckpointTensors,
    weight: str,
    sides: dict[str, str],
    alpha: float,
    rank: int | None,
    target_dtype: torch.dtype | None,
) -> None:
    infos = tensors.tensors
    missing = [f"lora_{side}" for side in "AB" if side not in sides] + [weight] * (weight not in infos)
    if missing:
        raise ValueError(
            f"The adapter {next(iter(sides.values()))} cannot be merged: there is no {', no '.join(missing)}."
        )
    name_a, name_b, base = sides["A"], sides["B"], infos[weight]
    shape_a, shape_b = infos[name_a].shape, infos[name_b].shape
    fits = len(shape_a) == len(shape_b) == 2 and shape_a[0] == shape_b[1] and base.shape == (shape_b[0], shape_a[1])
    if not fits or rank not in (None, shape_a[0]):
        raise ValueError(
            f"{weight} of shape {base.shape} needs an adapter of rank {rank or 'r'}, `lora_A` of shape (r, in) and "
            f"`lora_B` of shape (out, r), but {name_a} has shape {shape_a} and {name_b} {shape_b}."
        )
    scale = alpha / shape_a[0]

    def merged(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(dtype) + scale * (lora_b.to(dtype) @ lora_a.to(dtype))
        return total.to(target_dtype or weight.dtype)

    tensors.replace(weight, (name_a, name_b), merged, target_dtype)
