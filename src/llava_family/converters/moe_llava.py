"""Converts MoE-LLaVA checkpoints of the original code: all that its training writes.

The releases, the dense models of the second stage, unmerged LoRA adapters on the experts, and the first stage's
projector with the language model that it was trained for.

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
    has_weights,
    is_first_stage,
    plan_for_model,
    read_original_config,
    settings_of,
    source_files,
)
from ..moe_llava.configuration_moe_llava import ORIGINAL_MODEL_TYPES, MoeLlavaConfig, is_original_config
from ..moe_llava.modeling_moe_llava import MoeLlavaForCausalLM
from ..moe_llava.processing_moe_llava import MoeLlavaProcessor
from ..moe_llava.weight_mapping_moe_llava import UNUSED_ORIGINAL_WEIGHTS, original_weight_mapping
from .moe_llava_stages import (
    PROJECTOR_FILE,
    TOKENIZER_PATTERNS,
    add_first_stage,
    first_stage_settings,
    merge_adapters,
    release_names,
)


CHECKPOINT_PATTERNS = [*WEIGHT_PATTERNS, PROJECTOR_FILE, "*config.json", *TOKENIZER_PATTERNS]
BASE_PATTERNS = [*WEIGHT_PATTERNS, "*config.json", *TOKENIZER_PATTERNS]


def convert_moe_llava_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    vision_tower: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    lora_alpha: float | None = None,
    dtype: str | None = None,
    push_to_hub: str | None = None,
    allow_nan: bool = False,
    report: Callable[[str], None] = print,
) -> Path:
    """Converts `checkpoint` into the folder `output`, which appears only when it is complete.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder or Hub repository of the original checkpoint.
        output (`str` or `os.PathLike`): New or empty folder.
        vision_tower (`str` or `os.PathLike`, *optional*): Folder or Hub repository of a CLIP or SigLIP checkpoint, to
            take the vision tower from instead of the checkpoint's own copy.
        base (`str` or `os.PathLike`, *optional*): Folder or Hub repository of the language model that a first stage's
            projector was trained with.
        lora_alpha (`float`, *optional*): `lora_alpha` of unmerged adapters, where no file of the checkpoint has it.
        dtype (`str`, *optional*): `"float32"`, `"float16"` or `"bfloat16"`; the checkpoint's own by default.
        push_to_hub (`str`, *optional*): Hub repository to upload the finished folder to.
        allow_nan (`bool`, *optional*, defaults to `False`): Whether to keep NaN and infinite values.
        report (`Callable[[str], None]`, *optional*, defaults to `print`): Receives what was done, line by line.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: if `checkpoint` is no complete MoE-LLaVA checkpoint or `output` is not empty. Nothing is left
            behind.
        FileNotFoundError: if a folder is missing.
    """
    check_options(dtype, push_to_hub)
    output = check_output_folder(output)
    with open_moe_llava(checkpoint, vision_tower, base, lora_alpha, dtype, report) as conversion:
        write_checkpoint(output, conversion, push_to_hub, report, allow_nan=allow_nan)
    return output


@contextmanager
def open_moe_llava(
    checkpoint: str | os.PathLike,
    vision_tower: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    lora_alpha: float | None = None,
    dtype: str | None = None,
    report: Callable[[str], None] = print,
) -> Iterator[Conversion]:
    """Opens `checkpoint` and plans its conversion; arguments are as in [`convert_moe_llava_checkpoint`].

    Yields:
        `Conversion`: The plan, as long as the files are open.

    Raises:
        ValueError: if `checkpoint` is no complete MoE-LLaVA checkpoint.
        FileNotFoundError: if a folder is missing.
    """
    folder = resolve_checkpoint(checkpoint, CHECKPOINT_PATTERNS)
    original_config = check_original_checkpoint(folder, has_base=base is not None)
    base_folder = None if base is None else resolve_checkpoint(base, BASE_PATTERNS)
    tower_folder = None if vision_tower is None else resolve_checkpoint(vision_tower, VISION_TOWER_PATTERNS)
    for other, kind in ((base_folder, "language model"), (tower_folder, "vision tower")):
        if other is not None:
            read_original_config(other, kind)

    with ExitStack() as stack:
        source, sources = CheckpointTensors(), []
        if base_folder is None:
            source.add_checkpoint(reader := stack.enter_context(CheckpointReader(folder)), release_names(reader))
            sources += source_files("checkpoint", folder, reader)
            settings = folder
        else:
            sources += add_first_stage(source, folder, base_folder, stack)
            settings = stack.enter_context(first_stage_settings(folder, base_folder))
        alpha = merge_adapters(source, folder, original_config, lora_alpha, report)
        target_dtype = source.common_dtype(folder) if dtype is None else DTYPES[dtype]
        sources += choose_vision_tower(source, folder, tower_folder, original_config, stack, report)

        with settings_of(folder, base_folder, tower_folder):
            config = MoeLlavaConfig.from_pretrained(settings, mm_image_tower=tower_folder)
            processor = MoeLlavaProcessor.from_pretrained(settings, mm_image_tower=tower_folder)
            set_image_token(config, processor, settings)
            check_feature_layer(config, folder)
            generation = generation_config(folder, base_folder, processor)
        for part in (config, config.text_config, config.vision_config):
            part.dtype = target_dtype
        plan = plan_moe_llava(config, source.tensors, ignore_head_bias=base_folder is not None)
        options = {"dtype": str(target_dtype)[6:], "lora_alpha": alpha}
        parts = [config, processor, generation]
        yield Conversion(MoeLlavaConfig.model_type, options, sources, source, plan, target_dtype, parts)


def check_original_checkpoint(folder: Path, has_base: bool) -> dict[str, Any]:
    """Checks that a folder has all that a conversion needs.

    Args:
        folder (`Path`): The folder.
        has_base (`bool`): Whether a language model is given beside it.

    Returns:
        `dict[str, Any]`: The original's configuration.

    Raises:
        ValueError: if it is another checkpoint, an adapter alone, or of the first training stage without its language
            model.
    """
    config = read_original_config(folder, "MoE-LLaVA")
    if not is_original_config(config):
        found = {key: config.get(key) for key in ("model_type", "mm_image_tower")}
        hint = " It is converted already." if config.get("model_type") == MoeLlavaConfig.model_type else ""
        raise ValueError(
            "The checkpoint must be one of MoE-LLaVA's original code, with `mm_image_tower` and a `model_type` of "
            f"{', '.join(ORIGINAL_MODEL_TYPES)}, but {folder / 'config.json'} has {found}.{hint}"
        )
    if is_first_stage(folder) and not has_base:
        raise ValueError(
            f"{folder} is the output of the first training stage: it has {PROJECTOR_FILE} but no language model. Pass "
            "the one that it was trained with, such as microsoft/phi-2, by `base` (`--base`), or convert a checkpoint "
            "of a later stage."
        )
    if has_base and not is_first_stage(folder):
        raise ValueError(
            f"`base` (`--base`) is for the output of the first training stage, {PROJECTOR_FILE} without a language "
            f"model, but {folder} is none. Leave it out."
        )
    adapters = [name for name in ("adapter_model.bin", "adapter_model.safetensors") if (folder / name).is_file()]
    if adapters and not has_weights(folder):
        raise ValueError(
            f"{folder} must hold a whole model, but has only an adapter to one, {adapters[0]}. Merge it with the "
            "original's scripts/merge_lora_weights.py, and convert the result."
        )
    return config


def choose_vision_tower(
    source: CheckpointTensors,
    folder: Path,
    tower_folder: Path | None,
    original_config: dict[str, Any],
    stack: ExitStack,
    report: Callable[[str], None],
) -> list[tuple[str, Path]]:
    """Keeps the checkpoint's own vision tower, or takes a given one.

    Args:
        source (`CheckpointTensors`): The checkpoint's tensors. Changed in place.
        folder (`Path`): The checkpoint, for the message.
        tower_folder (`Path`, *optional*): The tower to take.
        original_config (`dict[str, Any]`): The original's configuration.
        stack (`ExitStack`): Closes what is opened here.
        report (`Callable[[str], None]`): Receives what was done.

    Returns:
        `list[tuple[str, Path]]`: Files of the tower that was taken, each with its role.

    Raises:
        ValueError: if there is none.
    """
    marker = ".image_tower.image_tower."
    own = next((name.partition(marker)[0] for name in source.tensors if marker in name), None)
    if tower_folder is not None:
        tower = stack.enter_context(CheckpointReader(tower_folder))
        source.replace_vision_tower(tower, f"{own or 'model'}{marker}")
        report(f"Vision tower: from {tower_folder}, not from the checkpoint.")
        return source_files("vision_tower", tower_folder, tower)
    if own is None:
        raise ValueError(
            f"{folder} has no vision tower. Pass its folder or Hub repository, "
            f"{original_config['mm_image_tower']!r}, by `vision_tower` (`--vision-tower`)."
        )
    report(f"Vision tower: from the checkpoint's own weights, {folder}.")
    return []


def set_image_token(config: MoeLlavaConfig, processor: MoeLlavaProcessor, settings: Path) -> None:
    """Makes the placeholder of a configuration that of the processor.

    Args:
        config (`MoeLlavaConfig`): Changed in place.
        processor (`MoeLlavaProcessor`): Whose placeholder it becomes.
        settings (`Path`): Folder of the tokenizer, for the message.

    Raises:
        ValueError: if tokens other than the placeholder have no embeddings.
    """
    vocabulary_size = config.get_text_config().vocab_size
    if processor.image_token_id > vocabulary_size:
        raise ValueError(
            f"The tokenizer in {settings} has {processor.image_token_id} tokens, but its configuration and its files "
            f"of added tokens say {vocabulary_size}. Take all of them from the same release."
        )
    config.image_token_id = processor.image_token_id


def check_feature_layer(config: MoeLlavaConfig, folder: Path) -> None:
    """Checks that the vision tower has the layer that features are taken from.

    Args:
        config (`MoeLlavaConfig`): The model.
        folder (`Path`): The checkpoint, for the message.

    Raises:
        ValueError: if it has not.
    """
    vision_config: Any = config.vision_config
    num_layers, layer = vision_config.num_hidden_layers, config.vision_feature_layer
    if not isinstance(layer, int) or not -num_layers <= layer + 1 <= num_layers + 1:
        raise ValueError(
            f"{folder / 'config.json'} has {layer!r} as `mm_vision_select_layer`, expected one of the vision tower's "
            f"{num_layers} layers, {-num_layers - 1} to {num_layers}."
        )


def generation_config(folder: Path, base_folder: Path | None, processor: MoeLlavaProcessor) -> GenerationConfig:
    """The checkpoint's generation settings, or its language model's, with the special tokens that they lack: Phi's has
    none.

    Args:
        folder (`Path`): The checkpoint.
        base_folder (`Path`, *optional*): Its language model.
        processor (`MoeLlavaProcessor`): Whose tokenizer tells special tokens.

    Returns:
        `GenerationConfig`: The settings.
    """
    places = [place for place in (folder, base_folder) if place and (place / "generation_config.json").is_file()]
    config = GenerationConfig.from_pretrained(places[0]) if places else GenerationConfig()
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(config, name) is None:
            setattr(config, name, getattr(processor.tokenizer, name))
            config._from_model_config = False  # or transformers may derive it anew
    return config


def plan_moe_llava(
    config: MoeLlavaConfig, tensors: Mapping[str, TensorInfo], ignore_head_bias: bool = False
) -> ConversionPlan:
    """Plans how tensors become a model.

    Args:
        config (`MoeLlavaConfig`): The model.
        tensors (`Mapping[str, TensorInfo]`): Those of an original checkpoint, by their names there.
        ignore_head_bias (`bool`, *optional*, defaults to `False`): Whether to leave out a bias of the language
            modeling head, as Phi-2 itself has.

    Returns:
        `ConversionPlan`: What to do.

    Raises:
        ValueError: if they are not exactly the model's.
    """
    unused = dict(UNUSED_ORIGINAL_WEIGHTS)
    if ignore_head_bias and config.get_text_config().model_type == "moe_llava_phi_text":
        unused[r"^lm_head\.bias$"] = "since the original trains Phi's language modeling head without its bias"
    return plan_for_model(MoeLlavaForCausalLM, config, tensors, original_weight_mapping(), unused)
