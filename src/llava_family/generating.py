"""What commands that let a model answer have in common: a conversation's inputs, and how they are decoded.

Source: transformers' chat templates and `GenerationConfig`.
"""

import copy
from collections.abc import Sequence
from typing import Any


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
        config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    config.update(max_new_tokens=max_new_tokens, max_length=None)
    return config


__all__ = ["decoding_config", "prepare_inputs", "user_message"]
