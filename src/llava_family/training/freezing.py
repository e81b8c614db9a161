"""Makes trainable what the originals train in each of their stages, and freezes the rest.

Source: the papers' stages of training, and what the original codes make trainable in each.
"""

from collections.abc import Callable

from torch import nn

from ..llava_mole.layers_llava_mole import MoleExperts, MoleRouter
from ..llava_mole.modeling_llava_mole import LlavaMoleForCausalLM
from ..moe_llava.modeling_moe_llava import MoeLlavaForCausalLM


# What lies between the vision tower and the text model. The resampler's position table is a buffer, as in LLaVA-UHD,
# which never trains it.
CONNECTORS = ("multi_modal_projector", "resampler", "image_boundaries")


def is_connector(name: str) -> bool:
    """Whether a parameter of this name lies between the vision tower and the text model."""
    return any(part in CONNECTORS for part in name.split("."))


def freeze_for_pretraining(model: nn.Module) -> list[str]:
    """Makes trainable what the first stage of all three families trains, and freezes the rest.

    It is what lies between vision tower and text model: the projector, or the resampler of slices, and LLaVA-MoLE's
    start and end embeddings of an image.

    Args:
        model (`PreTrainedModel`): A vision-language model. Its parameters' `requires_grad` are set.

    Returns:
        `list[str]`: Names of the trainable parameters.

    Raises:
        ValueError: if the model has no such part.
    """
    return _train(model, is_connector)


def freeze_for_finetuning(model: nn.Module) -> list[str]:
    """Makes trainable what the second stage of LLaVA-UHD and MoE-LLaVA trains: everything but the vision tower.

    Args:
        model (`PreTrainedModel`): A vision-language model. Its parameters' `requires_grad` are set.

    Returns:
        `list[str]`: Names of the trainable parameters.

    Raises:
        ValueError: if the model has nothing but a vision tower.
    """
    return _train(model, lambda name: "vision_tower" not in name.split("."))


def freeze_for_moe_tuning(model: MoeLlavaForCausalLM) -> list[str]:
    """Makes trainable what the third stage of MoE-LLaVA trains, and freezes the rest.

    As the released code does: the feed-forward networks of all layers, those without experts too, the routers, and
    what lies between vision tower and text model. The paper's text names the experts alone.

    Args:
        model (`MoeLlavaForCausalLM`): The sparse model. Its parameters' `requires_grad` are set.

    Returns:
        `list[str]`: Names of the trainable parameters.

    Raises:
        ValueError: if the model has neither.
    """
    return _train(model, lambda name: is_connector(name) or ("language_model.layers." in name and ".mlp." in name))


def freeze_for_mole_tuning(model: LlavaMoleForCausalLM) -> list[str]:
    """Makes trainable what LLaVA-MoLE trains, and freezes the rest.

    As in the released code: all LoRA experts and routers, the attention's adapters, and what lies between vision tower
    and text model: the projector, or the resampler of slices, and the start and end embeddings of an image.

    Args:
        model (`LlavaMoleForCausalLM`): The model. Its parameters' `requires_grad` are set.

    Returns:
        `list[str]`: Names of the trainable parameters.

    Raises:
        ValueError: if the model has neither.
    """
    adapters = [name for name, module in model.named_modules() if isinstance(module, (MoleExperts, MoleRouter))]
    prefixes = tuple(f"{adapter}." for adapter in adapters)
    return _train(model, lambda name: is_connector(name) or name.startswith(prefixes))


def _train(model: nn.Module, is_trained: Callable[[str], bool]) -> list[str]:
    trained = [name for name, _ in model.named_parameters() if is_trained(name)]
    if not trained:
        raise ValueError(f"A {type(model).__name__} has nothing that this stage trains.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in set(trained))
    return trained


__all__ = ["freeze_for_finetuning", "freeze_for_moe_tuning", "freeze_for_mole_tuning", "freeze_for_pretraining"]
