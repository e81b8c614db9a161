"""Reads a checkpoint for its export: everything but the values of its weights.

Source: transformers' `from_pretrained`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..auto import FAMILIES, Family
from ..conversion import WEIGHT_FILES, CheckpointReader, TensorInfo, resolve_checkpoint
from ..conversion.scripting import plan_for_model, read_original_config
from .code import family_of


# Not the pickles: they are refused.
EXPORT_PATTERNS = [
    "*.json",
    "*.jinja",
    "*.safetensors",
    "*.tiktoken",
    "merges.txt",
    "tokenizer.model",
    "LICENSE*",
    "NOTICE*",
]
VISION_TOWER_PATTERNS = ["config.json", "preprocessor_config.json"]

# The argument by which an original's configuration and processor are told where the vision tower's files lie
VISION_TOWER_ARGUMENTS = {"llava_uhd": "mm_vision_tower", "moe_llava": "mm_image_tower"}


@dataclass(frozen=True)
class Checkpoint:
    """What is exported.

    Attributes:
        folder (`Path`): Where it lies.
        files (`list[str]`): Its files of weights, and their index.
        num_parameters (`int`): Values in these.
        config (`PreTrainedConfig`): Its configuration.
        family (`Family`): Whose model it is.
        processor (`ProcessorMixin`): Its processor.
        is_original (`bool`): Whether it is of a family's original code, weights included.
    """

    folder: Path
    files: list[str]
    num_parameters: int
    config: PreTrainedConfig
    family: Family
    processor: Any
    is_original: bool


def read_checkpoint(model: str | os.PathLike, vision_tower: str | os.PathLike | None = None) -> Checkpoint:
    """Reads all of a checkpoint but the weights' values; arguments are as in [`export_model`].

    Returns:
        `Checkpoint`: What is exported.

    Raises:
        ValueError: if it is of none of the families or not complete safetensors, or `vision_tower` does not belong to
            it.
        FileNotFoundError: if a folder is missing.
    """
    folder = resolve_checkpoint(model, EXPORT_PATTERNS)
    original, arguments = _original_arguments(folder, vision_tower)
    config = AutoConfig.from_pretrained(folder, **arguments)
    family = family_of(config)
    processor = family.load("processing", "Processor").from_pretrained(folder, **arguments)
    with _open_weights(folder) as reader:
        files, tensors = reader.files, reader.tensors
    if original:
        _set_image_token(folder, config, processor)
        _check_original_weights(folder, tensors, config, family)
    num_parameters = sum(info.num_parameters for info in tensors.values())
    return Checkpoint(folder, files, num_parameters, config, family, processor, original)


def _original_arguments(folder: Path, vision_tower: str | os.PathLike | None) -> tuple[bool, dict[str, Any]]:
    """Whether a checkpoint is of the original code, and what the family's classes need to read it.

    Raises:
        ValueError: if it is of no family, or `vision_tower` is given for a converted one.
    """
    config_dict = read_original_config(folder, "LLaVA-UHD, MoE-LLaVA or LLaVA-MoLE")
    model_type = config_dict.get("model_type")
    if any(family.model_type == model_type for family in FAMILIES):
        if vision_tower is not None:
            raise ValueError(
                f"`vision_tower` (`--vision-tower`) is for checkpoints of the original code, but {folder} is "
                "converted. Leave it out."
            )
        return False, {}
    for family in FAMILIES:
        if any(original.model_type == model_type for original in family.load("configuration", "original_configs")()):
            tower = None if vision_tower is None else resolve_checkpoint(vision_tower, VISION_TOWER_PATTERNS)
            return True, {} if tower is None else {VISION_TOWER_ARGUMENTS[family.model_type]: tower}
    raise ValueError(
        "The model must be LLaVA-UHD, MoE-LLaVA or LLaVA-MoLE, converted or of the original code, but the "
        f"`model_type` in {folder / 'config.json'} is {model_type!r}."
    )


def _open_weights(folder: Path) -> CheckpointReader:
    """The checkpoint's weights, their names and files checked; ValueError if they are pickles or there are none."""
    found = next((name for name in WEIGHT_FILES if os.path.lexists(folder / name)), "")
    if ".bin" in found:
        raise ValueError(
            f"The weights of a repository must be safetensors, but those of {folder} are pickles ({found}), which can "
            "run code when they are loaded. Convert the checkpoint by `llava-family convert`, or its "
            "conversion_scripts/convert_<family>_weights_to_hf.py, which read them safely, and export the result."
        )
    return CheckpointReader(folder)


def _set_image_token(folder: Path, config: PreTrainedConfig, processor: Any) -> None:
    """Makes the placeholder the processor's; ValueError if other tokens have no embeddings."""
    vocabulary_size = config.get_text_config().vocab_size
    if processor.image_token_id > vocabulary_size:
        raise ValueError(
            f"The tokenizer in {folder} has {processor.image_token_id} tokens, but the model has embeddings of "
            f"{vocabulary_size}. Take tokenizer and weights from the same release."
        )
    config.image_token_id = processor.image_token_id


def _check_original_weights(
    folder: Path, tensors: Mapping[str, TensorInfo], config: PreTrainedConfig, family: Family
) -> None:
    """ValueError unless an original's tensors are those of the model, once the exported code has mapped them."""
    unused = {r"embeddings\.position_ids$": "a constant", r"rotary_emb\.inv_freq$": "a constant"}
    if family.model_type == "llava_uhd":
        unused |= family.load("weight_mapping", "unused_original_weights")(config.vision_config)
    mapping = family.load("weight_mapping", "original_weight_mapping")()
    try:
        plan_for_model(family.load("modeling", family.head), config, tensors, mapping, unused)
    except ValueError as error:
        raise ValueError(
            f"{folder} cannot be exported as it is. Its conversion script accepts more than direct loading does: "
            f"convert it, and export the result. {error}"
        ) from error
