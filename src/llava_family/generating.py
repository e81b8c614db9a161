"""What all that lets a model answer has in common: loading, a conversation's inputs, and how they are decoded.

Source: transformers' Auto classes, chat templates and `GenerationConfig`.
"""

import copy
from collections.abc import Sequence
from typing import Any


# Arguments of `generate` for greedy decoding, or beam search, also where a release's configuration samples
NO_SAMPLING: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def load_model(
    model_name: str, vision_tower: str | None = None, dtype: str = "auto", device: str | None = None
) -> tuple[Any, Any]:
    """Loads a checkpoint, converted or original.

    Args:
        model_name (`str`): Folder or Hub repository.
        vision_tower (`str`, *optional*): The vision tower's checkpoint, for an original one that does not say it.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the weights; `"auto"` is that of the files.
        device (`str`, *optional*): By default the GPU where there is one.

    Returns:
        `tuple`: model, in evaluation mode on its device, and processor.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    original = _original_arguments(model_name, vision_tower)
    model = AutoModelForImageTextToText.from_pretrained(model_name, dtype=dtype, **original)
    processor = load_processor(model_name, vision_tower)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor


def load_processor(model_name: str, vision_tower: str | None = None) -> Any:
    """Loads a checkpoint's processor; arguments are as in [`load_model`].

    Returns:
        `ProcessorMixin`: The processor.
    """
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model_name, **_original_arguments(model_name, vision_tower))


def _original_arguments(model_name: str, vision_tower: str | None) -> dict[str, str]:
    """The originals of the families name their vision tower differently."""
    from transformers import PreTrainedConfig

    if not vision_tower:
        return {}
    config_dict, _ = PreTrainedConfig.get_config_dict(model_name)
    return {"mm_image_tower" if "mm_image_tower" in config_dict else "mm_vision_tower": vision_tower}


def images_of(messages: Sequence[dict[str, Any]]) -> list[Any]:
    """The images of a conversation, in the order in which a processor takes them.

    Args:
        messages (`Sequence[dict]`): With `role` and `content`, as `ProcessorMixin.apply_chat_template` takes them.

    Returns:
        `list`: what is under `"image"` in the contents, of any kind that processors take.
    """
    return [item["image"] for message in messages for item in message["content"] if item["type"] == "image"]


def user_message(text: str, images: Sequence[Any]) -> list[dict[str, Any]]:
    """A conversation of one message, images first.

    Args:
        text (`str`): The prompt.
        images (`Sequence`): What the prompt is about, of any kind that processors take; may be empty.

    Returns:
        `list[dict[str, Any]]`: the user's message in the format of `apply_chat_template`.
    """
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def prepare_inputs(model: Any, processor: Any, messages: list[dict[str, Any]]) -> Any:
    """Inputs of `generate` for a conversation that the model is to answer, on its device and in its dtype.

    Args:
        model (`PreTrainedModel`): The model.
        processor (`ProcessorMixin`): Its processor, whose chat template writes the prompt.
        messages (`list[dict]`): With `role` and `content`, as `ProcessorMixin.apply_chat_template` takes them.

    Returns:
        `BatchFeature`: of one row.

    Raises:
        ValueError: if an image cannot be processed, or the text has another number of placeholders than images.
    """
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device, model.dtype)


def decoding_config(model: Any, max_new_tokens: int, temperature: float) -> Any:
    """The model's generation configuration, with what a user asked for in place of what the release says.

    Args:
        model (`PreTrainedModel`): The model, whose own configuration stays as it is.
        max_new_tokens (`int`): Longest answer in tokens.
        temperature (`float`): Of sampling; 0 decodes greedily, also where the release's configuration samples.

    Returns:
        `GenerationConfig`: for `generate`.
    """
    config = copy.deepcopy(model.generation_config)
    if temperature:
        config.update(do_sample=True, temperature=temperature)
    else:
        config.update(**NO_SAMPLING)
    config.update(max_new_tokens=max_new_tokens, max_length=None)
    return config


__all__ = [
    "NO_SAMPLING",
    "decoding_config",
    "images_of",
    "load_model",
    "load_processor",
    "prepare_inputs",
    "user_message",
]
