"""Converts LLaVA-UHD releases of the original code.

The projector comes from the release's shards: its `mm_projector.bin` is a left-over of the first training stage.

Source: what the original code's training writes, and its `load_pretrained_model` reads.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..conversion import (
    CheckpointReader,
    CheckpointTensors,
    ConversionPlan,
    TensorInfo,
    check_output_folder,
    resolve_checkpoint,
)
from ..conversion.converting import write_checkpoint
from ..conversion.scripting import (
    DTYPES,
    VISION_TOWER_PATTERNS,
    WEIGHT_PATTERNS,
    Conversion,
    check_options,
    is_first_stage,
    plan_for_model,
    read_original_config,
    settings_of,
    source_files,
)
from ..llava_uhd.configuration_llava_uhd import LlavaUhdConfig, is_original_config
from ..llava_uhd.modeling_llava_uhd import LlavaUhdForConditionalGeneration
from ..llava_uhd.processing_llava_uhd import LlavaUhdProcessor
from ..llava_uhd.weight_mapping_llava_uhd import original_weight_mapping, unused_original_weights


CHECKPOINT_PATTERNS = [*WEIGHT_PATTERNS, "*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"]
VISION_TOWER_PREFIX = "model.vision_tower.vision_tower."


def convert_llava_uhd_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    vision_tower: str | os.PathLike | None = None,
    dtype: str | None = None,
    push_to_hub: str | None = None,
    allow_nan: bool = False,
    report: Callable[[str], None] = print,
) -> Path:
    """Converts `checkpoint` into the folder `output`, which appears only when it is complete.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder or Hub repository of the original release.
        output (`str` or `os.PathLike`): New or empty folder.
        vision_tower (`str` or `os.PathLike`, *optional*): Folder or Hub repository of a CLIP checkpoint, to take the
            vision tower from instead of the release's shards.
        dtype (`str`, *optional*): `"float32"`, `"float16"` or `"bfloat16"`; the release's own by default.
        push_to_hub (`str`, *optional*): Hub repository to upload the finished folder to.
        allow_nan (`bool`, *optional*, defaults to `False`): Whether to keep NaN and infinite values.
        report (`Callable[[str], None]`, *optional*, defaults to `print`): Receives what was done, line by line.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: if `checkpoint` is no complete LLaVA-UHD release or `output` is not empty. Nothing is left behind.
        FileNotFoundError: if a folder is missing.
    """
    check_options(dtype, push_to_hub)
    output = check_output_folder(output)
    with open_llava_uhd(checkpoint, vision_tower, dtype, report) as conversion:
        write_checkpoint(output, conversion, push_to_hub, report, allow_nan=allow_nan)
    return output


@contextmanager
def open_llava_uhd(
    checkpoint: str | os.PathLike,
    vision_tower: str | os.PathLike | None = None,
    dtype: str | None = None,
    report: Callable[[str], None] = print,
) -> Iterator[Conversion]:
    """Opens `checkpoint` and plans its conversion; arguments are as in [`convert_llava_uhd_checkpoint`].

    Yields:
        `Conversion`: The plan, as long as the files are open.

    Raises:
        ValueError: if `checkpoint` is no complete LLaVA-UHD release.
        FileNotFoundError: if a folder is missing.
    """
    folder = resolve_checkpoint(checkpoint, CHECKPOINT_PATTERNS)
    check_original_release(folder)
    vision_folder = None if vision_tower is None else resolve_checkpoint(vision_tower, VISION_TOWER_PATTERNS)
    if vision_folder is not None:
        read_original_config(vision_folder, "CLIP")
    with settings_of(folder, vision_folder):
        config = LlavaUhdConfig.from_pretrained(folder, mm_vision_tower=vision_folder)
        processor = LlavaUhdProcessor.from_pretrained(folder)
        config.image_token_id = processor.image_token_id
        parts = [config, processor]
        if (folder / "generation_config.json").is_file():
            parts.append(GenerationConfig.from_pretrained(folder))

    with ExitStack() as readers:
        source = CheckpointTensors()
        source.add_checkpoint(reader := readers.enter_context(CheckpointReader(folder)))
        sources = source_files("checkpoint", folder, reader)
        target_dtype = source.common_dtype(folder) if dtype is None else DTYPES[dtype]
        if vision_folder is None:
            report(f"Vision tower: from the release's own shards, {folder}.")
        else:
            clip = readers.enter_context(CheckpointReader(vision_folder))
            source.replace_vision_tower(clip, VISION_TOWER_PREFIX)
            sources += source_files("vision_tower", vision_folder, clip)
            report(f"Vision tower: from {vision_folder}, not from the release's shards.")
        for part in (config, config.text_config, config.vision_config):
            part.dtype = target_dtype
        plan = plan_llava_uhd(config, source.tensors)
        options = {"dtype": str(target_dtype)[6:]}
        yield Conversion(LlavaUhdConfig.model_type, options, sources, source, plan, target_dtype, parts)


def plan_llava_uhd(config: LlavaUhdConfig, tensors: Mapping[str, TensorInfo]) -> ConversionPlan:
    """Plans how tensors become a model.

    Args:
        config (`LlavaUhdConfig`): The model.
        tensors (`Mapping[str, TensorInfo]`): Those of an original checkpoint, by their names there.

    Returns:
        `ConversionPlan`: What to do.

    Raises:
        ValueError: if they are not exactly the model's.
    """
    vision_config: Any = config.vision_config
    unused = unused_original_weights(vision_config)
    return plan_for_model(LlavaUhdForConditionalGeneration, config, tensors, original_weight_mapping(), unused)


def check_original_release(folder: Path):
    """Checks that a folder is a final LLaVA-UHD checkpoint of the original code.

    Args:
        folder (`Path`): The folder.

    Raises:
        ValueError: if it is another one, converted already, or of the first training stage.
    """
    config = read_original_config(folder, "LLaVA-UHD")
    if not is_original_config(config):
        found = {key: config.get(key) for key in ("model_type", "mm_projector_type")}
        hint = " It is converted already." if config.get("model_type") == LlavaUhdConfig.model_type else ""
        raise ValueError(
            f"The checkpoint must be a LLaVA-UHD release by the original code, with `mm_projector_type` "
            f"'adapt_spatial_resampler', but {folder / 'config.json'} has {found}.{hint}"
        )
    if is_first_stage(folder):
        raise ValueError(
            f"{folder} is the output of the first training stage: it has mm_projector.bin but no language model. "
            "Pass the final checkpoint, with model-*.safetensors."
        )
