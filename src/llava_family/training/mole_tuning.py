"""Freezes LLaVA-MoLE as its training does."""

from ..llava_mole.layers_llava_mole import MoleExperts, MoleRouter
from ..llava_mole.modeling_llava_mole import LlavaMoleForCausalLM


def freeze_for_mole_tuning(model: LlavaMoleForCausalLM) -> list[str]:
    """Makes trainable what LLaVA-MoLE trains, and freezes the rest.

    As in the released code: all LoRA experts and routers, the attention's adapters, and what lies between vision tower
    and text model: the projector, or the resampler of slices, and the start and end embeddings of an image.

    Returns:
        `list[str]`: Names of the trainable parameters.
    """
    adapters = [name for name, module in model.named_modules() if isinstance(module, (MoleExperts, MoleRouter))]
    parts = ("model.multi_modal_projector", "model.resampler", "model.image_boundaries", *adapters)
    trainable = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(f"{part}." for part in parts)))
        if parameter.requires_grad:
            trainable.append(name)
    return trainable


__all__ = ["freeze_for_mole_tuning"]
