"""Asks a model many questions, in batches.

Source: transformers' `apply_chat_template` and `generate`, in place of the evaluation scripts of the original codes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig

from ..generating import images_of, load_model
from .settings import SETTINGS, GenerationSettings


def family_of(model_name: str) -> str:
    """
    The family of a checkpoint, by its configuration.

    Args:
        model_name (`str`): Folder or Hub repository.

    Returns:
        `str`: the `model_type`, a key of `SETTINGS`.

    Raises:
        ValueError: if the checkpoint is of none of these families.
    """
    family = AutoConfig.from_pretrained(model_name).model_type
    if family not in SETTINGS:
        raise ValueError(
            f"{model_name} must be of one of the types {', '.join(SETTINGS)}, but is of the type {family!r}."
        )
    return family


def load(model_name: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """
    A checkpoint of one of the three families, ready to generate.

    Args:
        model_name (`str`): Folder or Hub repository.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the weights; `"auto"` is that of the files.
        device (`str`, *optional*): By default the GPU where there is one.

    Returns:
        `tuple`: model, in evaluation mode on its device, and processor, which pads on the left.

    Raises:
        ValueError: if the checkpoint is of another type.
    """
    family_of(model_name)
    model, processor = load_model(model_name, dtype=dtype, device=device)
    processor.tokenizer.padding_side = "left"
    model.generation_config.max_length = None  # `max_new_tokens` counts
    return model, processor


@torch.inference_mode()
def answer_batch(
    model: Any,
    processor: Any,
    conversations: Sequence[list[dict[str, Any]]],
    settings: GenerationSettings,
    **generate_arguments: Any,
) -> list[str]:
    """
    The model's answers to several conversations.

    Args:
        model (`PreTrainedModel`): Of one of the three families.
        processor (`ProcessorMixin`): The model's; it must pad on the left.
        conversations (`Sequence[list[dict]]`): Messages in the format of `apply_chat_template`, the last one the
            user's, with images as `PIL.Image.Image`. The prompts are taken as they are: `settings.prompt` is the
            caller's to apply.
        settings (`GenerationSettings`): How to decode, and how to process images.
        generate_arguments (`dict[str, Any]`, *optional*): Of `generate`, instead of those of the settings.

    Returns:
        `list[str]`: one answer each, without special tokens and outer white space.
    """
    texts = [processor.apply_chat_template(messages, add_generation_prompt=True) for messages in conversations]
    images = [image for messages in conversations for image in images_of(messages)]
    image_arguments = {"images": images, **settings.image_settings} if images else {}
    inputs = processor(text=texts, padding=True, return_tensors="pt", **image_arguments).to(model.device, model.dtype)
    generated = model.generate(**inputs, **{**settings.generate_arguments(), **generate_arguments})
    answers = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
