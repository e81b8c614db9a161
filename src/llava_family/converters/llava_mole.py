"""Converts LLaVA-MoLE checkpoints of the original code.

The file may hold the trained tensors alone or the whole model: like in the original, whatever it holds is taken from
it, and the rest from the language model and the vision tower that the training began with.

Source: what the original code's training writes, and its inference reads.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlamaTokenizer
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ..conversion import (
    CheckpointReader,
    CheckpointTensors,
    ConversionPlan,
    TensorInfo,
    check_output_folder,
    merge_lora,
    resolve_checkpoint,
    vision_tower_names,
)
from ..conversion.converting import write_checkpoint
from ..conversion.scripting import (
    DTYPES,
    VISION_TOWER_PATTERNS,
    WEIGHT_PATTERNS,
    Conversion,
    check_options,
    plan_for_model,
    read_original_config,
    settings_of,
    source_files,
)
from ..llava_mole.configuration_llava_mole import ATTENTION_PROJECTIONS, LlavaMoleConfig, LlavaMoleTextConfig
from ..llava_mole.image_processing_pil_llava_mole import LlavaMoleImageProcessorPil
from ..llava_mole.modeling_llava_mole import LlavaMoleForCausalLM
from ..llava_mole.processing_llava_mole import LlavaMoleProcessor
from ..llava_mole.weight_mapping_llava_mole import (
    LANGUAGE_MODEL,
    UNUSED_ORIGINAL_WEIGHTS,
    VISION_TOWER,
    original_weight_mapping,
)
from .llava_mole_contents import find_alpha, infer_experts, trained_names


VICUNA_PATTERNS = [*WEIGHT_PATTERNS, "*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"]
ROUTINGS = ("dense", "top1")
# Where the original's training keeps the weights, beside anything else of its state
ENTRY = "state_dict"
# What the original runs in, whatever its files hold
ORIGINAL_DTYPE = "bfloat16"
# The original sets both, whatever the tokenizer's files and its caller say
MAX_LENGTH, MAX_NEW_TOKENS = 4096, 256
REPETITION_PENALTY = 10.0

TEXT_EMBED = "in_adaptor.text_embed.weight"
EMBED_TOKENS = f"{LANGUAGE_MODEL}model.embed_tokens.weight"


def convert_llava_mole_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    vicuna: str | os.PathLike,
    clip: str | os.PathLike,
    lora_alpha: float | None = None,
    routing: str = "dense",
    merge_attention_lora: bool = False,
    dtype: str | None = None,
    push_to_hub: str | None = None,
    allow_nan: bool = False,
    report: Callable[[str], None] = print,
) -> Path:
    """Converts `checkpoint` into the folder `output`, which appears only when it is complete.

    Args:
        checkpoint (`str` or `os.PathLike`): The original's file, such as `llava_mole_r16_a32_e3.pt`, or its tensors as
            safetensors.
        output (`str` or `os.PathLike`): New or empty folder.
        vicuna (`str` or `os.PathLike`): Folder or Hub repository of the language model that the training began with.
        clip (`str` or `os.PathLike`): Folder or Hub repository of the CLIP that the training began with.
        lora_alpha (`float`, *optional*): `lora_alpha` of the training, where the file's name does not have it.
        routing (`"dense"` or `"top1"`, *optional*, defaults to `"dense"`): What the experts were trained with; see
            [`LlavaMoleTextConfig`]. By default that of the original's released inference.
        merge_attention_lora (`bool`, *optional*, defaults to `False`): Whether to add the attention's adapters to the
            weights that they belong to. The experts stay: tokens differ in which they see.
        dtype (`str`, *optional*): `"float32"`, `"float16"` or `"bfloat16"`; by default bfloat16, in which the original
            runs, while its files hold several.
        push_to_hub (`str`, *optional*): Hub repository to upload the finished folder to.
        allow_nan (`bool`, *optional*, defaults to `False`): Whether to keep NaN and infinite values.
        report (`Callable[[str], None]`, *optional*, defaults to `print`): Receives what was done, line by line.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: if `checkpoint` makes no complete LLaVA-MoLE model with `vicuna` and `clip`, if nothing tells its
            `lora_alpha`, or if `output` is not empty. Nothing is left behind.
        FileNotFoundError: if a file or a folder is missing.
    """
    check_options(dtype, push_to_hub)
    output = check_output_folder(output)
    with open_llava_mole(
        checkpoint, vicuna, clip, lora_alpha, routing, merge_attention_lora, dtype, report
    ) as conversion:
        write_checkpoint(output, conversion, push_to_hub, report, allow_nan=allow_nan)
    return output


@contextmanager
def open_llava_mole(
    checkpoint: str | os.PathLike,
    vicuna: str | os.PathLike,
    clip: str | os.PathLike,
    lora_alpha: float | None = None,
    routing: str = "dense",
    merge_attention_lora: bool = False,
    dtype: str | None = None,
    report: Callable[[str], None] = print,
) -> Iterator[Conversion]:
    """Opens `checkpoint` and plans its conversion; arguments are as in [`convert_llava_mole_checkpoint`].

    Yields:
        `Conversion`: The plan, as long as the files are open.

    Raises:
        ValueError: if `routing` is unknown, or `checkpoint` makes no complete model with `vicuna` and `clip`.
        FileNotFoundError: if a file or a folder is missing.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"`routing` (`--routing`) must be one of {', '.join(ROUTINGS)}, but is {routing!r}.")
    path = check_checkpoint_file(checkpoint)
    vicuna_folder = resolve_checkpoint(vicuna, VICUNA_PATTERNS)
    check_model_type(vicuna_folder, "`vicuna` (`--vicuna`)", "Llama", ("llama",))
    clip_folder = resolve_checkpoint(clip, VISION_TOWER_PATTERNS)
    check_model_type(clip_folder, "`clip` (`--clip`)", "CLIP", ("clip", "clip_vision_model"))
    with settings_of(vicuna_folder):
        llama_config = LlamaConfig.from_pretrained(vicuna_folder)
    target_dtype = DTYPES[dtype or ORIGINAL_DTYPE]

    with ExitStack() as stack:
        source = CheckpointTensors()
        # A link that the user names is trusted. One into the Hub's cache keeps its name, which tells its format.
        linked = path.resolve()
        file = path if linked.parent.name == "blobs" else linked
        trained = stack.enter_context(CheckpointReader(file.parent, file.name, ENTRY))
        source.add_checkpoint(trained, trained_names(path, trained, report))
        num_experts, rank = infer_experts(path, source.tensors, llama_config.num_hidden_layers)
        alpha = find_alpha(path, num_experts, rank, lora_alpha)
        report(f"Experts: {num_experts} per layer, of rank {rank}, with alpha {alpha:g} and {routing} routing.")
        sources = [("checkpoint", file)]
        for role, folder, prefix in (("vicuna", vicuna_folder, LANGUAGE_MODEL), ("clip", clip_folder, VISION_TOWER)):
            reader = stack.enter_context(CheckpointReader(folder))
            add_untrained(source, reader, prefix, report)
            sources += source_files(role, folder, reader)
        check_text_embeddings(path, source)
        if merge_attention_lora:
            # In float32, to be rounded once, when it is written: Vicuna's float16 has not the output's digits.
            count = merge_lora(source, alpha, rank, torch.float32)
            report(f"Merged: {count} LoRA adapters of the attention.")
        if dtype is None:
            report(f"Dtype: {ORIGINAL_DTYPE}, in which the original runs. For its files' own values: --dtype float32.")

        experts: dict[str, Any] = {"num_experts": num_experts, "r": rank, "lora_alpha": alpha, "routing": routing}
        experts["attention_target_modules"] = [] if merge_attention_lora else ATTENTION_PROJECTIONS
        with settings_of(vicuna_folder, clip_folder):
            parts = settings_parts(vicuna_folder, clip_folder, text_config(llama_config, **experts), target_dtype)
        plan = plan_llava_mole(parts[0], source.tensors)
        options = {"dtype": str(target_dtype)[6:], "lora_alpha": alpha, "routing": routing}
        options["merge_attention_lora"] = merge_attention_lora
        yield Conversion(LlavaMoleConfig.model_type, options, sources, source, plan, target_dtype, parts)


def settings_parts(
    vicuna_folder: Path, clip_folder: Path, text_config: LlavaMoleTextConfig, dtype: torch.dtype
) -> tuple[LlavaMoleConfig, LlavaMoleProcessor, GenerationConfig]:
    """Makes all that a converted model has beside weights.

    Args:
        vicuna_folder (`Path`): The language model that the training began with.
        clip_folder (`Path`): The CLIP that the training began with.
        text_config (`LlavaMoleTextConfig`): The text model.
        dtype (`torch.dtype`): Of the weights.

    Returns:
        `tuple[LlavaMoleConfig, LlavaMoleProcessor, GenerationConfig]`: Configuration, processor and generation
        settings.

    Raises:
        ValueError: if there is no tokenizer, or the language model has no embeddings for its tokens.
    """
    processor = build_processor(vicuna_folder, clip_folder)
    config = LlavaMoleConfig(
        architectures=[LlavaMoleForCausalLM.__name__],
        vision_config=CLIPVisionConfig.from_pretrained(clip_folder),
        text_config=text_config,
    )
    set_image_tokens(config, processor, vicuna_folder)
    settings: tuple[Any, ...] = (config, config.text_config, config.vision_config)
    for part in settings:
        part.dtype = dtype
    return config, processor, generation_config(config, processor)


def check_checkpoint_file(checkpoint: str | os.PathLike) -> Path:
    """Checks that an original checkpoint is a file.

    Args:
        checkpoint (`str` or `os.PathLike`): The file.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: if it is a folder.
        FileNotFoundError: if it is missing.
    """
    path = Path(checkpoint)
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.pt"))
        raise ValueError(
            f"The checkpoint must be a file of the original's training, such as llava_mole_r16_a32_e3.pt, but {path} "
            f"is a folder. Pass a file in it: it has {', '.join(files) or 'none that ends in .pt'}."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"The checkpoint must be a file of the original's training, such as llava_mole_r16_a32_e3.pt, but {path} "
            "is missing."
        )
    return path


def check_model_type(folder: Path, option: str, kind: str, expected: tuple[str, ...]) -> None:
    """Checks that a folder's model is of the right kind.

    Args:
        folder (`Path`): With a `config.json`.
        option (`str`): The option that named it, for the message.
        kind (`str`): What it should be, for the message.
        expected (`tuple[str, ...]`): The model types that are right.

    Raises:
        ValueError: if its `model_type` is another one, or there is no configuration.
    """
    model_type = read_original_config(folder, kind).get("model_type")
    if model_type not in expected:
        raise ValueError(
            f"{option} must be a model of type {' or '.join(expected)}, but {folder / 'config.json'} has the "
            f"`model_type` {model_type!r}. Pass the one that the training began with."
        )


def add_untrained(
    source: CheckpointTensors, reader: CheckpointReader, prefix: str, report: Callable[[str], None]
) -> None:
    """Adds what the trained checkpoint does not have, by whatever name, of a model that the training began with.

    Args:
        source (`CheckpointTensors`): The trained tensors. Changed in place.
        reader (`CheckpointReader`): The language model or the vision tower.
        prefix (`str`): What the trained checkpoint puts before its names.
        report (`Callable[[str], None]`): Receives how many tensors were taken.
    """
    if prefix == VISION_TOWER:
        names = vision_tower_names(reader, prefix)
    else:
        names = {name: prefix + name for name in reader.tensors}
    renamings = [transform for transform in original_weight_mapping() if isinstance(transform, WeightRenaming)]
    trained = {rename_source_key(name, renamings, [])[0] for name in source.tensors}
    names = {
        original: name for original, name in names.items() if rename_source_key(name, renamings, [])[0] not in trained
    }
    if names:
        source.add_checkpoint(reader, names)
    report(f"Taken: {len(names)} tensors from {reader.folder}, which the checkpoint does not have.")


def check_text_embeddings(path: Path, source: CheckpointTensors) -> None:
    """Checks that the original's second name of the text model's embeddings stands for the same values.

    Args:
        path (`Path`): The original's file, for the message.
        source (`CheckpointTensors`): Its tensors.

    Raises:
        ValueError: if it stands for others.
    """
    if not {TEXT_EMBED, EMBED_TOKENS} <= source.tensors.keys():
        return
    # The dtype that the original holds both in: Vicuna's own embeddings have more digits.
    second, first = (source.read(name).to(DTYPES[ORIGINAL_DTYPE]) for name in (TEXT_EMBED, EMBED_TOKENS))
    if not torch.equal(first, second):
        raise ValueError(
            f"{TEXT_EMBED} of {path} must be the text model's embeddings, {EMBED_TOKENS}, but has other values or "
            "another shape. Pass the language model that the training began with by `vicuna` (`--vicuna`)."
        )


def text_config(llama_config: LlamaConfig, **settings) -> LlavaMoleTextConfig:
    """Adds the experts to the language model's configuration.

    Args:
        llama_config (`LlamaConfig`): The language model.
        settings: Of the experts, as [`LlavaMoleTextConfig`] has them.

    Returns:
        `LlavaMoleTextConfig`: Both.
    """
    unlike = ("model_type", "architectures", "transformers_version", "_name_or_path")
    shared = {key: value for key, value in llama_config.to_dict().items() if key not in unlike}
    return LlavaMoleTextConfig(**shared, **settings)


def build_processor(vicuna_folder: Path, clip_folder: Path) -> LlavaMoleProcessor:
    """Makes a processor of the language model's tokenizer and CLIP's preprocessing.

    Args:
        vicuna_folder (`Path`): The language model.
        clip_folder (`Path`): The vision tower.

    Returns:
        `LlavaMoleProcessor`: With padding on the left.

    Raises:
        ValueError: if there is no tokenizer.
    """
    if not any((vicuna_folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        # transformers would make one that knows no words.
        raise ValueError(
            f"`vicuna` (`--vicuna`) must have a tokenizer, but {vicuna_folder} has neither tokenizer.model nor "
            "tokenizer.json. Download it again, completely."
        )
    tokenizer = LlamaTokenizer.from_pretrained(vicuna_folder, model_max_length=MAX_LENGTH, padding_side="left")
    image_processor = LlavaMoleImageProcessorPil.from_pretrained(clip_folder)
    return LlavaMoleProcessor(image_processor, tokenizer, prompt_style="original")


def set_image_tokens(config: LlavaMoleConfig, processor: LlavaMoleProcessor, vicuna_folder: Path) -> None:
    """Makes placeholder and number of features the same in configuration and processor.

    Args:
        config (`LlavaMoleConfig`): Changed in place.
        processor (`LlavaMoleProcessor`): Changed in place.
        vicuna_folder (`Path`): The language model, for the message.

    Raises:
        ValueError: if tokens other than the placeholder have no embeddings.
    """
    vision_config: Any = config.vision_config
    text_config: Any = config.text_config
    # Those of all patches, between the start and the end embedding
    processor.num_image_tokens = (vision_config.image_size // vision_config.patch_size) ** 2 + 2
    if processor.image_token_id > text_config.vocab_size:
        raise ValueError(
            f"The tokenizer in {vicuna_folder} has {processor.image_token_id} tokens, but config.json there says "
            f"{text_config.vocab_size}. Take both from the same release."
        )
    config.image_token_id = processor.image_token_id


def generation_config(config: LlavaMoleConfig, processor: LlavaMoleProcessor) -> GenerationConfig:
    """How the original generates. Vicuna's own settings are for sampling, which the original does not.

    Args:
        config (`LlavaMoleConfig`): The model.
        processor (`LlavaMoleProcessor`): Its processor.

    Returns:
        `GenerationConfig`: With the original's penalty of repetition.
    """
    ids = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token_id = getattr(config.text_config, name)
        ids[name] = getattr(processor.tokenizer, name) if token_id is None else token_id
    return GenerationConfig(
        do_sample=False, repetition_penalty=REPETITION_PENALTY, max_new_tokens=MAX_NEW_TOKENS, **ids
    )


def plan_llava_mole(config: LlavaMoleConfig, tensors: Mapping[str, TensorInfo]) -> ConversionPlan:
    """Plans how tensors become a model.

    Args:
        config (`LlavaMoleConfig`): The model.
        tensors (`Mapping[str, TensorInfo]`): Those of an original checkpoint, by their names there.

    Returns:
        `ConversionPlan`: What to do.

    Raises:
        ValueError: if they are not exactly the model's.
    """
    return plan_for_model(LlavaMoleForCausalLM, config, tensors, original_weight_mapping(), UNUSED_ORIGINAL_WEIGHTS)
