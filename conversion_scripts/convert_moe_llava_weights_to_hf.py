"""Converts a MoE-LLaVA checkpoint of the original code into a folder that `from_pretrained` loads.

    python conversion_scripts/convert_moe_llava_weights_to_hf.py \\
        --checkpoint LanguageBind/MoE-LLaVA-Phi2-2.7B-4e --output MoE-LLaVA-Phi2-2.7B-4e-hf

All that the original's training writes is accepted: the releases, the dense models of the second stage, unmerged LoRA
adapters on the experts, and the first stage's projector, for which `--base` names the language model.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import GenerationConfig

from llava_family.conversion import (
    CheckpointReader,
    CheckpointTensors,
    ConversionPlan,
    TensorInfo,
    check_output_folder,
    has_lora,
    merge_lora,
    plan_conversion,
    resolve_checkpoint,
)
from llava_family.conversion.scripting import (
    DTYPES,
    VISION_TOWER_PATTERNS,
    WEIGHT_PATTERNS,
    check_options,
    conversion_parser,
    has_weights,
    is_first_stage,
    read_original_config,
    run_conversion,
    write_checkpoint,
)
from llava_family.moe_llava.configuration_moe_llava import ORIGINAL_MODEL_TYPES, MoeLlavaConfig, is_original_config
from llava_family.moe_llava.modeling_moe_llava import MoeLlavaForCausalLM
from llava_family.moe_llava.processing_moe_llava import MoeLlavaProcessor
from llava_family.moe_llava.weight_mapping_moe_llava import original_weight_mapping


PROJECTOR_FILE = "mm_projector.bin"
TOKENIZER_PATTERNS = [
    "*.tiktoken",
    "vocab.json",
    "merges.txt",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
]
CHECKPOINT_PATTERNS = [*WEIGHT_PATTERNS, PROJECTOR_FILE, "*config.json", *TOKENIZER_PATTERNS]
BASE_PATTERNS = [*WEIGHT_PATTERNS, "*config.json", *TOKENIZER_PATTERNS]
CONSTANT = "a constant that older checkpoints store"
# The token that the original's training adds to Phi's tokenizer, for padding
PHI_PAD_TOKEN = "<|extra_0|>"


def convert_moe_llava_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    vision_tower: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    lora_alpha: float | None = None,
    dtype: str | None = None,
    push_to_hub: str | None = None,
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
    folder = resolve_checkpoint(checkpoint, CHECKPOINT_PATTERNS)
    original_config = check_original_checkpoint(folder, has_base=base is not None)
    base_folder = None if base is None else resolve_checkpoint(base, BASE_PATTERNS)
    tower_folder = None if vision_tower is None else resolve_checkpoint(vision_tower, VISION_TOWER_PATTERNS)

    with ExitStack() as stack:
        source = CheckpointTensors()
        if base_folder is None:
            source.add_checkpoint(reader := stack.enter_context(CheckpointReader(folder)), release_names(reader))
            settings = folder
        else:
            add_first_stage(source, folder, base_folder, stack)
            settings = stack.enter_context(first_stage_settings(folder, base_folder))
        merge_adapters(source, folder, original_config, lora_alpha, report)
        target_dtype = source.common_dtype(folder) if dtype is None else DTYPES[dtype]
        choose_vision_tower(source, folder, tower_folder, original_config, stack, report)

        config = MoeLlavaConfig.from_pretrained(settings, mm_image_tower=tower_folder)
        processor = MoeLlavaProcessor.from_pretrained(settings, mm_image_tower=tower_folder)
        set_image_token(config, processor, settings)
        for part in (config, config.text_config, config.vision_config):
            part.dtype = target_dtype
        plan = plan_moe_llava(config, source.tensors, ignore_head_bias=base_folder is not None)
        parts = [config, processor, generation_config(folder, base_folder, processor)]
        write_checkpoint(output, plan, source.read, target_dtype, parts, push_to_hub, report)
    return output


def check_original_checkpoint(folder: Path, has_base: bool) -> dict[str, Any]:
    """The original's configuration in `folder`; ValueError unless there is all that a conversion needs."""
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


def release_names(reader: CheckpointReader) -> dict[str, str]:
    """The tensors' names without what PEFT puts before them.

    The original takes it away when it saves, but of Qwen's, `base_model.model.transformer.`, only the first part.
    """
    names = {name: name.removeprefix("base_model.") for name in reader.tensors}
    if "model.lm_head.weight" in names.values():
        names = {original: name.removeprefix("model.") for original, name in names.items()}
    return names


def add_first_stage(source: CheckpointTensors, folder: Path, base_folder: Path, stack: ExitStack) -> None:
    """Adds a language model and the projector that the first stage trained for it."""
    base = stack.enter_context(CheckpointReader(base_folder))
    multimodal = [name for name in base.tensors if "mm_projector" in name or "image_tower" in name]
    if multimodal:
        raise ValueError(
            f"`base` (`--base`) must be a language model alone, but {base_folder} has {len(multimodal)} tensors of a "
            f"multimodal one ({multimodal[0]}, ...). If it is of a later stage, convert it by itself."
        )
    projector = stack.enter_context(CheckpointReader(folder, PROJECTOR_FILE))
    source.add_checkpoint(base)
    # Like the original, which takes what follows `mm_projector.`
    places = {name: f"model.mm_projector.{name.rpartition('mm_projector.')[2]}" for name in projector.tensors}
    source.add_checkpoint(projector, places)


@contextmanager
def first_stage_settings(folder: Path, base_folder: Path) -> Iterator[Path]:
    """A folder with configuration and tokenizer, as later stages have it: the first writes no tokenizer."""
    with TemporaryDirectory() as parent:
        settings = Path(parent, folder.resolve().name)
        settings.mkdir()
        for place in (base_folder, folder):
            for path in {path for pattern in TOKENIZER_PATTERNS for path in place.glob(pattern) if path.is_file()}:
                shutil.copyfile(path, settings / path.name)
        shutil.copyfile(folder / "config.json", settings / "config.json")
        if (settings / "vocab.json").is_file():
            add_phi_padding(settings)
        yield settings


def add_phi_padding(settings: Path) -> None:
    """Adds the padding token behind all others, as the original's training does with Phi's tokenizer."""
    vocabulary, added, config = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for path in (settings / name for name in ("vocab.json", "added_tokens.json", "tokenizer_config.json"))
    )
    known = config.setdefault("added_tokens_decoder", {})
    contents = {token["content"] for token in known.values()}
    if PHI_PAD_TOKEN in contents | set(vocabulary) | set(added):
        return
    token_id = max([*vocabulary.values(), *added.values(), *map(int, known)]) + 1
    added[PHI_PAD_TOKEN] = token_id
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    known[str(token_id)] = {"content": PHI_PAD_TOKEN, **flags}
    config.update(pad_token=PHI_PAD_TOKEN, unk_token=PHI_PAD_TOKEN)
    (settings / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    (settings / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def merge_adapters(
    source: CheckpointTensors,
    folder: Path,
    original_config: dict[str, Any],
    lora_alpha: float | None,
    report: Callable[[str], None],
) -> None:
    """Merges LoRA adapters, where there are any."""
    if has_lora(source):
        alpha, rank = lora_settings(folder, original_config, lora_alpha)
        count = merge_lora(source, alpha, rank)
        report(f"Merged: {count} LoRA adapters, with alpha {alpha:g}.")
    elif lora_alpha is not None:
        raise ValueError(
            f"`lora_alpha` (`--lora-alpha`) is for unmerged LoRA adapters, but {folder} has none. Leave it out."
        )


def lora_settings(folder: Path, original_config: dict[str, Any], lora_alpha: float | None) -> tuple[float, int | None]:
    """Alpha and rank of the training.

    The original deletes adapter_config.json when training ends; some versions note both in config.json, as `lora`.
    """
    adapter_path, config_path = folder / "adapter_config.json", folder / "config.json"
    adapter = json.loads(adapter_path.read_text(encoding="utf-8")) if adapter_path.is_file() else {}
    unknown = [key for key in ("alpha_pattern", "rank_pattern", "use_dora", "use_rslora") if adapter.get(key)]
    if unknown:
        raise ValueError(
            f"{adapter_path} must be of plain LoRA, as MoE-LLaVA's, but has {', '.join(unknown)}. Merge it with PEFT."
        )
    lora = original_config.get("lora") or {}
    alphas = {
        "`lora_alpha` (`--lora-alpha`)": lora_alpha,
        f"{adapter_path} (`lora_alpha`)": adapter.get("lora_alpha"),
        f"{config_path} (`lora.lora_alpha`)": lora.get("lora_alpha"),
    }
    ranks = {f"{adapter_path} (`r`)": adapter.get("r"), f"{config_path} (`lora.lora_r`)": lora.get("lora_r")}
    alpha, rank = (one_number(numbers) for numbers in (alphas, ranks))
    if alpha is None:
        raise ValueError(
            f"{folder} has unmerged LoRA adapters, but neither adapter_config.json nor config.json has their "
            "`lora_alpha`. Pass that of the training by `lora_alpha` (`--lora-alpha`)."
        )
    return alpha, None if rank is None else int(rank)


def one_number(numbers: Mapping[str, Any]) -> float | None:
    """The number that all places agree on, of those that have one."""
    found = {place: number for place, number in numbers.items() if number is not None}
    if any(not isinstance(number, (int, float)) for number in found.values()) or len(set(found.values())) > 1:
        stated = ", ".join(f"{place} is {number!r}" for place, number in found.items())
        raise ValueError(f"The settings of LoRA must be numbers and agree, but {stated}.")
    return next(iter(found.values()), None)


def choose_vision_tower(
    source: CheckpointTensors,
    folder: Path,
    tower_folder: Path | None,
    original_config: dict[str, Any],
    stack: ExitStack,
    report: Callable[[str], None],
) -> None:
    """Keeps the checkpoint's own vision tower, or takes that of `tower_folder`."""
    marker = ".image_tower.image_tower."
    own = next((name.partition(marker)[0] for name in source.tensors if marker in name), None)
    if tower_folder is not None:
        tower = stack.enter_context(CheckpointReader(tower_folder))
        source.replace_vision_tower(tower, f"{own or 'model'}{marker}")
        report(f"Vision tower: from {tower_folder}, not from the checkpoint.")
    elif own is not None:
        report(f"Vision tower: from the checkpoint's own weights, {folder}.")
    else:
        raise ValueError(
            f"{folder} has no vision tower. Pass its folder or Hub repository, "
            f"{original_config['mm_image_tower']!r}, by `vision_tower` (`--vision-tower`)."
        )


def set_image_token(config: MoeLlavaConfig, processor: MoeLlavaProcessor, settings: Path) -> None:
    """Makes the placeholder the processor's; ValueError if other tokens have no embeddings."""
    vocabulary_size = config.get_text_config().vocab_size
    if processor.image_token_id > vocabulary_size:
        raise ValueError(
            f"The tokenizer in {settings} has {processor.image_token_id} tokens, but its configuration and its files "
            f"of added tokens say {vocabulary_size}. Take all of them from the same release."
        )
    config.image_token_id = processor.image_token_id


def generation_config(folder: Path, base_folder: Path | None, processor: MoeLlavaProcessor) -> GenerationConfig:
    """The checkpoint's, or its language model's, with the special tokens that it lacks: Phi's has none."""
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
    """How `tensors` become the model of `config`; ValueError unless they are exactly its own."""
    with torch.device("meta"):
        model = MoeLlavaForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unused = {r"embeddings\.position_ids$": CONSTANT, r"rotary_emb\.inv_freq$": CONSTANT}
    if ignore_head_bias and config.get_text_config().model_type == "moe_llava_phi_text":
        unused[r"^lm_head\.bias$"] = "since the original trains Phi's language modeling head without its bias"
    return plan_conversion(tensors, original_weight_mapping(), expected, unused, model)


def main(arguments: list[str] | None = None):
    parser = conversion_parser(__doc__)
    parser.add_argument(
        "--vision-tower",
        help="folder or Hub repository of CLIP or SigLIP, such as openai/clip-vit-large-patch14-336, to take the "
        "vision tower from, as the original code does at run time; by default it comes from the checkpoint, where "
        "releases hold the same weights rounded to bfloat16",
    )
    parser.add_argument(
        "--base",
        help="folder or Hub repository of the language model, such as microsoft/phi-2, that the first stage's "
        "mm_projector.bin was trained with; only for that, which needs --vision-tower too",
    )
    parser.add_argument(
        "--lora-alpha",
        type=float,
        help="of unmerged LoRA adapters, where neither adapter_config.json nor config.json has it",
    )
    run_conversion(parser, convert_moe_llava_checkpoint, arguments)


if __name__ == "__main__":
    main()
