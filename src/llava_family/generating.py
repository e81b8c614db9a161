"""What commands that let a model answer have in common: a conversation's inputs, and how they are decoded.

Source: transformers' chat templates and `GenerationConfig`.
"""

import copy
from typing import Any


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


__all__ = ["decoding_config", "prepare_inputs"]
