"""What the stages of MoE-LLaVA's training leave besides releases: a projector alone, unmerged adapters, odd names.

Source: what the original code's training writes in each stage.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..conversion import CheckpointReader, CheckpointTensors, has_lora, merge_lora
from ..conversion.checking import read_json
from ..conversion.scripting import source_files


PROJECTOR_FILE = "mm_projector.bin"
TOKENIZER_PATTERNS = [
    "*.tiktoken",
    "vocab.json",
    "merges.txt",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
]
# The token that the original's training adds to Phi's tokenizer, for padding
PHI_PAD_TOKEN = "<|extra_0|>"


def release_names(reader: CheckpointReader) -> dict[str, str]:
    """The tensors' names without what PEFT puts before them.

    The original takes it away when it saves, but of Qwen's, `base_model.model.transformer.`, only the first part.

    Args:
        reader (`CheckpointReader`): The checkpoint.

    Returns:
        `dict[str, str]`: New name by old name.
    """
    names = {name: name.removeprefix("base_model.") for name in reader.tensors}
    if "model.lm_head.weight" in names.values():
        names = {original: name.removeprefix("model.") for original, name in names.items()}
    return names


def add_first_stage(
    source: CheckpointTensors, folder: Path, base_folder: Path, stack: ExitStack
) -> list[tuple[str, Path]]:
    """Adds a language model and the projector that the first stage trained for it.

    Args:
        source (`CheckpointTensors`): Receives the tensors.
        folder (`Path`): The first stage's output.
        base_folder (`Path`): The language model.
        stack (`ExitStack`): Closes what is opened here.

    Returns:
        `list[tuple[str, Path]]`: Their files, each with its role.

    Raises:
        ValueError: if the language model is a multimodal one.
    """
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
    return source_files("base", base_folder, base) + source_files("checkpoint", folder, projector)


@contextmanager
def first_stage_settings(folder: Path, base_folder: Path) -> Iterator[Path]:
    """A folder with configuration and tokenizer, as later stages have it: the first writes no tokenizer.

    Args:
        folder (`Path`): The first stage's output.
        base_folder (`Path`): The language model.

    Yields:
        `Path`: A temporary folder.
    """
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
    """Adds the padding token behind all others, as the original's training does with Phi's tokenizer.

    Args:
        settings (`Path`): Folder of the tokenizer, whose files are changed.
    """
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
) -> float | None:
    """Merges LoRA adapters, where there are any.

    Args:
        source (`CheckpointTensors`): Changed in place.
        folder (`Path`): The checkpoint.
        original_config (`dict[str, Any]`): Its configuration.
        lora_alpha (`float`, *optional*): By the caller.
        report (`Callable[[str], None]`): Receives how many were merged.

    Returns:
        `float`: Their alpha; None if there are none.

    Raises:
        ValueError: if there are adapters and nothing tells their alpha, or there are none and `lora_alpha` is given.
    """
    if has_lora(source):
        alpha, rank = lora_settings(folder, original_config, lora_alpha)
        count = merge_lora(source, alpha, rank)
        report(f"Merged: {count} LoRA adapters, with alpha {alpha:g}.")
        return alpha
    if lora_alpha is not None:
        raise ValueError(
            f"`lora_alpha` (`--lora-alpha`) is for unmerged LoRA adapters, but {folder} has none. Leave it out."
        )
    return None


def lora_settings(folder: Path, original_config: dict[str, Any], lora_alpha: float | None) -> tuple[float, int | None]:
    """Alpha and rank of the training.

    The original deletes adapter_config.json when training ends; some versions note both in config.json, as `lora`.

    Args:
        folder (`Path`): The checkpoint.
        original_config (`dict[str, Any]`): Its configuration.
        lora_alpha (`float`, *optional*): By the caller.

    Returns:
        `tuple[float, int | None]`: Alpha, and the rank where a file tells it.

    Raises:
        ValueError: if nothing tells alpha, places differ, or adapters are not plain LoRA.
    """
    adapter_path, config_path = folder / "adapter_config.json", folder / "config.json"
    adapter = read_json(adapter_path, "an adapter's configuration") if os.path.lexists(adapter_path) else {}
    lora = original_config.get("lora") or {}
    for place, settings in ((adapter_path, adapter), (config_path, lora)):
        if not isinstance(settings, dict):
            raise ValueError(f"{place} must hold the settings of LoRA by name, but holds {settings!r:.100}.")
    unknown = [key for key in ("alpha_pattern", "rank_pattern", "use_dora", "use_rslora") if adapter.get(key)]
    if unknown:
        raise ValueError(
            f"{adapter_path} must be of plain LoRA, as MoE-LLaVA's, but has {', '.join(unknown)}. Merge it with PEFT."
        )
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
    """The number that all places agree on, of those that have one.

    Args:
        numbers (`Mapping[str, Any]`): Numbers by place; None where a place has none.

    Returns:
        `float`: The number; None if no place has one.

    Raises:
        ValueError: if they differ, or one is no number.
    """
    found = {place: number for place, number in numbers.items() if number is not None}
    if any(not isinstance(number, (int, float)) for number in found.values()) or len(set(found.values())) > 1:
        stated = ", ".join(f"{place} is {number!r}" for place, number in found.items())
        raise ValueError(f"The settings of LoRA must be numbers and agree, but {stated}.")
    return next(iter(found.values()), None)
