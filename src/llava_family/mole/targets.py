"""Finds what a mixture of LoRA experts adapts: linear layers of the text model, and of nothing else.

Source: LLaVA-MoLE's section 3: experts in every feed-forward network, LoRA in the attention; PEFT finds targets by
name alone.
"""

from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..llava_mole.layers_llava_mole import MoleLinear, MoleMLP
from .config import MoleConfig
from .layer import MoleTunerLayer, MoleTunerMLP, has_linear_layers, mlp_projections


# Phi's output projection is called `dense`.
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "dense")


@dataclass(frozen=True)
class Targets:
    """Names of a model's modules that are adapted.

    Attributes:
        mlps (`tuple[str, ...]`): Feed-forward networks.
        projections (`tuple[str, ...]`): Their linear layers.
        attention (`tuple[str, ...]`): The attention's linear layers.
    """

    mlps: tuple[str, ...]
    projections: tuple[str, ...]
    attention: tuple[str, ...]


def find_targets(model: nn.Module, config: MoleConfig) -> Targets:
    """
    Finds the modules that a configuration asks for.

    Args:
        model (`PreTrainedModel`): A language model, or a vision-language model around one.
        config (`MoleConfig`): What to adapt.

    Returns:
        `Targets`: Names within `model`.

    Raises:
        TypeError: if `model` is none of transformers'.
        ValueError: if it has no text model whose feed-forward networks have a known shape, is adapted already, or
            lacks what the configuration names.
    """
    prefix, text_model = _text_model(model)
    _refuse_adapted(model, text_model)
    # Direct children: what lies inside of a sparse block is an expert, or serves beside some.
    layers = {
        f"{prefix}{name}": layer
        for name, layer in text_model.named_modules()
        if hasattr(layer, "mlp") and hasattr(layer, "self_attn")
    }
    mlps = {f"{name}.mlp": mlp_projections(layer.mlp) for name, layer in layers.items()}
    known = {name: projections for name, projections in mlps.items() if projections is not None}
    if not known:
        found = sorted({type(layer.mlp).__name__ for layer in layers.values()})
        raise ValueError(
            f"The text model {type(text_model).__name__} has no feed-forward network to adapt: expected layers whose "
            "`mlp` has the linear layers gate_proj, up_proj and down_proj and an `act_fn`, or fc1 and fc2 and an "
            f"`activation_fn`, but found {', '.join(found) or 'no layer with `mlp` and `self_attn`'}."
        )
    projections = _named(known, config.target_modules, "target_modules", "feed-forward networks")
    attentions = {
        f"{name}.self_attn": tuple(
            each for each in ATTENTION_PROJECTIONS if has_linear_layers(layer.self_attn, [each])
        )
        for name, layer in layers.items()
    }
    attention = _named(attentions, config.attention_target_modules, "attention_target_modules", "attention")
    return Targets(tuple(known), projections, attention)


def wrap_mlps(model: nn.Module, names: tuple[str, ...]) -> None:
    """Puts a [`MoleTunerMLP`] into the place of every feed-forward network that is not one yet.

    Args:
        model (`nn.Module`): Changed in place.
        names (`tuple[str, ...]`): Of the networks.

    Raises:
        ValueError: if a network computes something else than others of its shape.
    """
    wrapped = {}
    for name in names:
        mlp = model.get_submodule(name)
        if not isinstance(mlp, MoleTunerMLP):
            wrapped[name] = MoleTunerMLP(mlp)
    if wrapped:
        _check_equal(*next(iter(wrapped.items())))
    for name, mlp in wrapped.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, mlp)


def _text_model(model: nn.Module) -> tuple[str, PreTrainedModel]:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` must be a transformers model, but is a {type(model).__name__}. Add an adapter to a PeftModel by "
            "its `add_adapter`."
        )
    text_model = model.get_decoder()
    embedding = text_model.get_input_embeddings() if isinstance(text_model, PreTrainedModel) else None
    if not isinstance(embedding, (nn.Embedding, AuxiliaryTrainingWrapper)):
        raise ValueError(f"`model` must have a text model, but {type(model).__name__} has none that embeds tokens.")
    name = next(name for name, module in model.named_modules() if module is text_model)
    return f"{name}." if name else "", text_model


def _refuse_adapted(model: nn.Module, text_model: nn.Module) -> None:
    if any(isinstance(module, (MoleMLP, MoleLinear)) for module in text_model.modules()):
        raise ValueError(
            f"{type(text_model).__name__} has LoRA experts of its own: train these (see `freeze_for_mole_tuning`), or "
            "adapt a model with a plain text model."
        )
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, MoleTunerLayer):
            raise ValueError(
                f"The model has an adapter of another method already ({type(module).__module__} at {name}): merge or "
                "unload it first."
            )


def _named(
    owners: dict[str, tuple[str, ...]], wanted: list[str] | None, field_name: str, what: str
) -> tuple[str, ...]:
    present = list(dict.fromkeys(name for names in owners.values() for name in names))
    unknown = [name for name in wanted or [] if name not in present]
    if unknown:
        raise ValueError(f"`{field_name}` names {unknown}, but this model's {what} have {present}.")
    return tuple(
        f"{owner}.{name}" for owner, names in owners.items() for name in names if wanted is None or name in wanted
    )


@torch.no_grad()
def _check_equal(name: str, wrapped: MoleTunerMLP) -> None:
    """Children do not tell what a network does with them: some models scale in between."""
    weight = getattr(wrapped, wrapped.projections[0]).weight
    is_plain = weight.device.type != "meta" and weight.is_floating_point() and type(weight.data) is torch.Tensor
    if not is_plain or weight.ndim != 2:
        return
    probe = torch.linspace(-1, 1, weight.shape[1], device=weight.device, dtype=weight.dtype)[None, None]
    if not torch.equal(wrapped(probe), wrapped.replaced(probe)):
        raise ValueError(
            f"{name}, a {type(wrapped.replaced).__name__}, computes something else than its linear layers around "
            "their activation: its experts' place is not known."
        )


__all__ = ["Targets", "find_targets", "wrap_mlps"]
