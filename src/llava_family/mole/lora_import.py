"""Makes the experts of a new mixture out of ordinary LoRA adapters that were trained apart.

Design choices:
- Only safetensors and JSON are read: an adapter is untrusted input.
- An adapter may be scaled in its own way. Every scale is folded into `weight_B`, so all experts share the mixture's.
- What an adapter cannot hand over exactly is refused by name, rather than left away.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers.modeling_utils import PreTrainedModel

from ..llava_mole.layers_llava_mole import MoleExperts
from .config import MoleConfig
from .layer import MoleTunerLinear
from .model import get_mole_model
from .targets import find_targets


CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
# Values of a LoRA configuration under which an adapter is `lora_alpha / r * B @ A` on an unchanged weight. PEFT adds
# a field for every variant; those that leave it so stand here too.
HARMLESS = {
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "bias": ("none",),
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "lora_alpha": None,
    "lora_dropout": None,
    "r": None,
    "eva_config": None,
    "lora_ga_config": None,
    "loftq_config": None,
    "corda_config": None,
    "megatron_core": None,
    "qalora_group_size": None,
    "task_type": None,
    "peft_type": None,
    "auto_mapping": None,
    "peft_version": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": None,
}


def mole_from_lora_adapters(
    model: PreTrainedModel,
    adapters: Sequence[str | os.PathLike],
    attention: Literal["first", "drop"] | None = None,
    **config: Any,
) -> PeftModel:
    """A mixture of LoRA experts whose experts are given LoRA adapters; its router is new.

    Where the router sends a token to expert `e`, the feed-forward networks compute what they do with adapter `e`. A
    linear layer that an adapter leaves alone gets an expert that adds nothing.

    Source: no counterpart in the original code; adapters are PEFT's.

    Args:
        model (`PreTrainedModel`): The model that the adapters were trained for. Changed in place.
        adapters (`list` of `str` or `os.PathLike`): Folders as `save_pretrained` writes them, one for every expert.
        attention (`"first"` or `"drop"`, *optional*): A mixture has one adapter of the attention. `"first"` takes that
            of the first folder, `"drop"` none. By default adapters of the attention are refused.
        config (*optional*): Fields of [`MoleConfig`], such as `routing`, but for those that the adapters decide.

    Returns:
        `PeftModel`: Around `model`.

    Raises:
        FileNotFoundError: if a folder has no `adapter_config.json` or no `adapter_model.safetensors`.
        TypeError: if `config` has a field that the adapters decide.
        ValueError: if adapters are no ordinary LoRA, their ranks differ, one adapts no feed-forward network of the
            text model or anything beside its layers, or `attention` is not given and one adapts attention.
        RuntimeError: if a layer was not adapted, which only a bug can do.
    """
    if not adapters:
        raise ValueError("`adapters` must name a folder for every expert, but is empty.")
    if attention not in (None, "first", "drop"):
        raise ValueError(f"`attention` must be 'first', 'drop' or None, but is {attention!r}.")
    decided = [name for name in ("r", "num_experts", "target_modules", "attention_target_modules") if name in config]
    if decided:
        raise TypeError(f"{decided} follow from the adapters and cannot be given.")
    read = [_read_adapter(Path(folder)) for folder in adapters]
    ranks = {str(folder): r for folder, (_, r, _) in zip(adapters, read, strict=True)}
    if len(set(ranks.values())) > 1:
        raise ValueError(f"All adapters must have one rank, but have {ranks}.")

    targets = find_targets(model, MoleConfig())
    names = [_split(folder, layers, targets) for folder, (_, _, layers) in zip(adapters, read, strict=True)]
    adapted_attention = set().union(*(attention_names for _, attention_names in names))
    if adapted_attention and attention is None:
        raise ValueError(
            f"Adapters of the attention, such as {min(adapted_attention)}, cannot be mixed, for a mixture has one. "
            "Choose `attention='first'` or `attention='drop'`."
        )
    kept = names[0][1] if attention == "first" else set()
    mole_config = MoleConfig(
        r=read[0][1],
        num_experts=len(read),
        target_modules=sorted({name.rpartition(".")[2] for mlp_names, _ in names for name in mlp_names}),
        attention_target_modules=sorted({name.rpartition(".")[2] for name in kept}),
        **{"lora_alpha": read[0][0], **config},
    )
    adapted = get_mole_model(model, mole_config)
    _fill(model, mole_config, read, [mlp_names for mlp_names, _ in names], kept)
    return adapted


def _read_adapter(folder: Path) -> tuple[float, int, dict[str, dict[str, torch.Tensor]]]:
    """`lora_alpha`, `r`, and for every adapted layer's name its `A` `(r, in)` and `B` `(out, r)`."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"The adapter {folder} has no {name}. Pickled weights are not read.")
    config = json.loads((folder / CONFIG_FILE).read_text())
    if config.get("peft_type") != "LORA":
        raise ValueError(f"The adapter {folder} must be of the type LORA, but is of {config.get('peft_type')!r}.")
    for name, value in config.items():
        allowed = HARMLESS.get(name, ())
        if value and allowed is not None and value not in allowed:
            raise ValueError(f"The adapter {folder} is no ordinary LoRA: `{name}` is {value!r}, and cannot be kept.")
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / WEIGHTS_FILE).items():
        name, _, side = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if side not in ("A.weight", "B.weight"):
            raise ValueError(f"The adapter {folder} is no ordinary LoRA: it has the tensor {key}.")
        layers.setdefault(name, {})[side[0]] = tensor
    r = config["r"]
    for name, sides in layers.items():
        shapes = {side: tuple(tensor.shape) for side, tensor in sides.items()}
        if set(sides) != {"A", "B"} or sides["A"].shape[0] != r or sides["B"].shape[1:] != (r,):
            raise ValueError(f"The adapter {folder} of rank {r} is damaged: {name} has {shapes}.")
    return config["lora_alpha"], r, layers


def _split(folder: Any, layers: dict[str, Any], targets: Any) -> tuple[set[str], set[str]]:
    """Names of an adapter's layers in feed-forward networks, and in the attention."""
    of_mlps, of_attention = set(layers) & set(targets.projections), set(layers) & set(targets.attention)
    others = sorted(set(layers) - of_mlps - of_attention)
    if others:
        raise ValueError(
            f"The adapter {folder} adapts {others[0]} (and {len(others) - 1} more), which is no linear layer of the "
            "text model's feed-forward networks or attention in this model."
        )
    if not of_mlps:
        raise ValueError(
            f"The adapter {folder} must adapt feed-forward networks, such as {targets.projections[0]}, but adapts "
            f"{min(layers, default='nothing')}."
        )
    return of_mlps, of_attention


@torch.no_grad()
def _fill(model: PreTrainedModel, config: MoleConfig, read: list, names: list[set[str]], attention: set[str]) -> None:
    """Copies the adapters over. Experts that have no adapter keep `B` of zeros."""
    scaling = config.lora_alpha / config.r
    for expert, ((alpha, r, layers), mlp_names) in enumerate(zip(read, names, strict=True)):
        for name in mlp_names | (attention if expert == 0 else set()):
            layer = model.get_submodule(name)
            if not isinstance(layer, MoleTunerLinear):
                raise RuntimeError(f"{name} was not adapted.")
            experts, sides = cast(MoleExperts, layer.mole_experts["default"]), layers[name]
            shapes = tuple(sides["A"].shape), tuple(sides["B"].shape)
            expected = (r, layer.in_features), (layer.out_features, r)
            if shapes != expected:
                raise ValueError(f"{name} needs adapters of the shapes {expected}, but there is one of {shapes}.")
            experts.weight_A[expert].copy_(sides["A"])
            experts.weight_B[expert].copy_(sides["B"].float().T * (alpha / r / scaling))


__all__ = ["mole_from_lora_adapters"]
