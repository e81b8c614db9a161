"""Exports a checkpoint as a Hub repository that loads by `trust_remote_code=True` without this package.

Design choices:
- Weights are copied byte by byte, in whatever layout they are: the exported code maps an original's when it loads.
- Everything else is read by the classes of the family and written anew, in transformers' own format.
- The output appears when it is complete, with a checksum of every file.

Source: transformers' `custom_object_save`, which copies one file's relative imports alone.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import logging

from ..conversion import atomic_folder, check_output_folder
from ..conversion.checking import settings_files
from ..conversion.scripting import check_options, upload
from ..conversion.writing import check_free_space
from .cards import model_card, package_file
from .checkpoint import Checkpoint, read_checkpoint
from .code import auto_map, repository_code


# Notices that the weights must keep
LICENSE_PATTERNS = ("LICENSE*", "NOTICE*")

MANIFEST = "MANIFEST.sha256"
COPY_BYTES = 1 << 22


def export_model(
    model: str | os.PathLike,
    output: str | os.PathLike,
    push_to_hub: str | None = None,
    vision_tower: str | os.PathLike | None = None,
    card: str | os.PathLike | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Exports `model` into the folder `output`, which appears only when it is complete.

    Args:
        model (`str` or `os.PathLike`): Folder or Hub repository of a checkpoint, converted or of the original code.
        output (`str` or `os.PathLike`): New or empty folder.
        push_to_hub (`str`, *optional*): Hub repository to upload the finished folder to.
        vision_tower (`str` or `os.PathLike`, *optional*): Folder or Hub repository of the vision tower's checkpoint,
            for an original one that does not say how large it is. Only its settings are read.
        card (`str` or `os.PathLike`, *optional*): Name of a release's model card, such as `"moe-llava-phi2-2.7b-4e"`,
            or a Markdown file; by default found by the checkpoint's name and sizes, or else a generic one.
        report (`Callable[[str], None]`, *optional*, defaults to `print`): Receives what was done, line by line.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: if `model` is of none of the families or not complete safetensors, or `output` is not empty.
            Nothing is left behind.
        FileNotFoundError: if a folder is missing.
    """
    check_options(None, push_to_hub)
    output = check_output_folder(output)
    checkpoint = read_checkpoint(model, vision_tower)
    name = push_to_hub or output.name
    text = model_card(None if card is None else os.fspath(card), name, os.fspath(model), checkpoint, report)
    with atomic_folder(output) as incomplete:
        write_repository(incomplete, checkpoint, text)
    layout = "the original's layout" if checkpoint.is_original else "their own layout"
    report(f"Wrote the code and {checkpoint.num_parameters:,} parameters, in {layout}, to {output}.")
    if push_to_hub is not None:
        upload(output, push_to_hub)
        report(f"Uploaded to https://huggingface.co/{push_to_hub}.")
    return output


def write_repository(folder: Path, checkpoint: Checkpoint, card: str) -> None:
    """Writes all files of the repository.

    Args:
        folder (`Path`): An empty folder.
        checkpoint (`Checkpoint`): What is exported.
        card (`str`): The model card, in Markdown.

    Raises:
        ValueError: if the disk is too full.
    """
    checksums = _copy_weights(checkpoint.folder, checkpoint.files, folder)
    _write_settings(folder, checkpoint)
    for file, source in repository_code(checkpoint.config).items():
        (folder / file).write_text(source, encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    for path in settings_files(checkpoint.folder, LICENSE_PATTERNS):
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(package_file("LICENSE"), folder / "LICENSE-CODE")
    _write_manifest(folder, checksums)


def _copy_weights(folder: Path, files: list[str], output: Path) -> dict[str, str]:
    """Copies files, each of which is read once, and returns their checksums. ValueError if the disk is too full."""
    total = sum((folder / file).stat().st_size for file in files)
    check_free_space(output, total)
    checksums = {}
    with logging.tqdm(total=total, unit="B", unit_scale=True, desc="Copying weights") as progress:
        for file in files:
            checksum = hashlib.sha256()
            with open(folder / file, "rb") as source, open(output / file, "wb") as target:
                while block := source.read(COPY_BYTES):
                    checksum.update(block)
                    target.write(block)
                    progress.update(len(block))
            checksums[file] = checksum.hexdigest()
    return checksums


def _write_settings(output: Path, checkpoint: Checkpoint) -> None:
    """Writes configurations, processor and tokenizer, with the map from Auto classes to the repository's code."""
    config, family = checkpoint.config, checkpoint.family
    config.save_pretrained(output)
    checkpoint.processor.save_pretrained(output)
    _generation_config(checkpoint).save_pretrained(output)
    references = auto_map(config)
    # The model's configuration tells the image processor's type, and the processor's does not: so `AutoImageProcessor`
    # must read the former, whose code makes PIL the default backend, before it chooses one.
    model_entries = {
        "architectures": [f"{family.prefix}{family.head}"],
        "auto_map": references,
        "image_processor_type": f"{family.prefix}ImageProcessor",
    }
    _update_json(output / "config.json", lambda saved: saved.update(model_entries))

    def update_processor(saved: dict[str, Any]) -> None:
        saved["auto_map"] = {"AutoProcessor": references["AutoProcessor"]}
        saved["image_processor"].pop("image_processor_type", None)
        saved["image_processor"]["auto_map"] = {"AutoImageProcessor": references["AutoImageProcessor"]}

    _update_json(output / "processor_config.json", update_processor)


def _update_json(path: Path, update: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    update(content)
    path.write_text(f"{json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)}\n", encoding="utf-8")


def _generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """The checkpoint's, or what its configuration says, with the special tokens that it lacks: Phi's has none."""
    if (checkpoint.folder / "generation_config.json").is_file():
        generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    else:
        generation_config = GenerationConfig.from_model_config(checkpoint.config)
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(generation_config, name) is None:
            setattr(generation_config, name, getattr(checkpoint.processor.tokenizer, name))
            generation_config._from_model_config = False  # or transformers may derive it anew
    return generation_config


def _write_manifest(output: Path, checksums: dict[str, str]) -> None:
    """Writes the checksums of all files, in the format of `sha256sum`; those of large ones are known already."""
    lines = []
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        file = path.relative_to(output).as_posix()
        checksum = checksums.get(file) or hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f"{checksum}  {file}\n")
    (output / MANIFEST).write_text("".join(lines), encoding="utf-8")
