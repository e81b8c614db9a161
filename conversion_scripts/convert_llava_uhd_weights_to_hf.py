"""Converts a LLaVA-UHD release of the original code into a folder that `from_pretrained` loads.

    python conversion_scripts/convert_llava_uhd_weights_to_hf.py \\
        --checkpoint guozonghao96/llava-uhd-144-13b --output llava-uhd-144-13b-hf

The projector comes from the release's shards: its `mm_projector.bin` is a left-over of the first training stage.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import GenerationConfig

from llava_family.conversion import (
    CheckpointReader,
    CheckpointTensors,
    ConversionPlan,
    TensorInfo,
    check_output_folder,
    plan_conversion,
    resolve_checkpoint,
)
from llava_family.conversion.scripting import (
    DTYPES,
    VISION_TOWER_PATTERNS,
    WEIGHT_PATTERNS,
    check_options,
    conversion_parser,
    is_first_stage,
    read_original_config,
    run_conversion,
    write_checkpoint,
)
from llava_family.llava_uhd.configuration_llava_uhd import LlavaUhdConfig, is_original_config
from llava_family.llava_uhd.modeling_llava_uhd import LlavaUhdForConditionalGeneration
from llava_family.llava_uhd.processing_llava_uhd import LlavaUhdProcessor
from llava_family.llava_uhd.weight_mapping_llava_uhd import original_weight_mapping, unused_original_weights


CHECKPOINT_PATTERNS = [*WEIGHT_PATTERNS, "*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"]
VISION_TOWER_PREFIX = "model.vision_tower.vision_tower."


def convert_llava_uhd_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    vision_tower: str | os.PathLike | None = None,
    dtype: str | None = None,
    push_to_hub: str | None = None,
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
        report (`Callable[[str], None]`, *optional*, defaults to `print`): Receives what was done, line by line.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: if `checkpoint` is no complete LLaVA-UHD release or `output` is not empty. Nothing is left behind.
        FileNotFoundError: if a folder is missing.
    """
    check_options(dtype, push_to_hub)
    output = check_output_folder(output)
    folder = resolve_checkpoint(checkpoint, CHECKPOINT_PATTERNS)
    check_original_release(folder)
    vision_folder = None if vision_tower is None else resolve_checkpoint(vision_tower, VISION_TOWER_PATTERNS)
    config = LlavaUhdConfig.from_pretrained(folder, mm_vision_tower=vision_folder)
    processor = LlavaUhdProcessor.from_pretrained(folder)
    config.image_token_id = processor.image_token_id
    parts = [config, processor]
    if (folder / "generation_config.json").is_file():
        parts.append(GenerationConfig.from_pretrained(folder))

    with ExitStack() as readers:
        source = CheckpointTensors()
        source.add_checkpoint(readers.enter_context(CheckpointReader(folder)))
        target_dtype = source.common_dtype(folder) if dtype is None else DTYPES[dtype]
        if vision_folder is None:
            report(f"Vision tower: from the release's own shards, {folder}.")
        else:
            clip = readers.enter_context(CheckpointReader(vision_folder))
            source.replace_vision_tower(clip, VISION_TOWER_PREFIX)
            report(f"Vision tower: from {vision_folder}, not from the release's shards.")
        for part in (config, config.text_config, config.vision_config):
            part.dtype = target_dtype
        plan = plan_llava_uhd(config, source.tensors)
        write_checkpoint(output, plan, source.read, target_dtype, parts, push_to_hub, report)
    return output


def plan_llava_uhd(config: LlavaUhdConfig, tensors: Mapping[str, TensorInfo]) -> ConversionPlan:
    """How `tensors` become the model of `config`; ValueError unless they are exactly its own."""
    with torch.device("meta"):
        model = LlavaUhdForConditionalGeneration(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unused = unused_original_weights(config.vision_config)
    return plan_conversion(tensors, original_weight_mapping(), expected, unused, model)


def check_original_release(folder: Path):
    """ValueError unless `folder` is a final LLaVA-UHD checkpoint of the original code."""
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


def main(arguments: list[str] | None = None):
    parser = conversion_parser(__doc__)
    parser.add_argument(
        "--vision-tower",
        help="folder or Hub repository of CLIP, such as openai/clip-vit-large-patch14-336, to take the vision "
        "tower from, as the original code does at run time; by default it comes from the release's shards, which hold "
        "the same weights rounded to bfloat16",
    )
    run_conversion(parser, convert_llava_uhd_checkpoint, arguments)


if __name__ == "__main__":
    main()
