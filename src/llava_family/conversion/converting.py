"""Runs a planned conversion to its end: weights, then whatever else the checkpoint consists of, then its name.

Source: transformers' `save_pretrained`, whose files it writes.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from .hashing import SourceHashes, hash_file
from .manifest import Manifest, SourceFile
from .resuming import resumable_folder
from .scripting import Conversion, upload
from .writing import INDEX_FILE, MAX_SHARD_BYTES, Shard, plan_shards, write_file, write_sharded


# Configurations and processors are saved here before each file is written to where it belongs, at once.
STAGING_FOLDER = ".staging"


def write_checkpoint(
    output: Path,
    conversion: Conversion,
    push_to_hub: str | None,
    report: Callable[[str], None],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_nan: bool = False,
) -> None:
    """Writes the weights and whatever else the checkpoint consists of, and uploads it.

    Args:
        output (`Path`): Folder, which appears only when it is complete. Interrupted, a rerun goes on.
        conversion (`Conversion`): What to write.
        push_to_hub (`str`, *optional*): Hub repository to upload to.
        report (`Callable[[str], None]`): Receives what was done, line by line.
        max_shard_bytes (`int`, *optional*, defaults to 5 GB): Tensor bytes per file, see [`write_sharded`].
        allow_nan (`bool`, *optional*, defaults to `False`): Whether to keep NaN and infinite values of the original.

    Raises:
        ValueError: if the checkpoint cannot be converted. Nothing is left behind.
        OSError: if the disk does not let it. A rerun goes on with what is finished.
    """
    for reason, count in Counter(conversion.plan.ignored.values()).items():
        report(f"Left out: {count} tensors, {reason}.")
    shards = plan_shards(conversion.plan.steps, conversion.dtype, max_shard_bytes)
    paths = {path: SourceFile(role, path.name, path.stat().st_size) for role, path in _in_order(conversion)}
    options = {**conversion.options, "max_shard_bytes": max_shard_bytes}
    manifest = Manifest.planned(conversion.family, options, list(paths.values()), shards)
    with resumable_folder(output, manifest, paths, report) as incomplete:
        num_bytes = _write_weights(incomplete, conversion, manifest, paths, max_shard_bytes)
        if not_finite := _not_finite(manifest):
            if not allow_nan:
                raise ValueError(
                    f"{not_finite} The checkpoint is damaged, or its training failed. Download it again, or keep them "
                    "by `allow_nan` (`--allow-nan`)."
                )
            report(f"{not_finite} They were kept.")
        _write_parts(incomplete, conversion, manifest)
    report(f"Wrote {num_bytes / 1e6:,.0f} MB in {str(conversion.dtype)[6:]}, to {output}.")
    if push_to_hub is not None:
        upload(output, push_to_hub)
        report(f"Uploaded to https://huggingface.co/{push_to_hub}.")


def _in_order(conversion: Conversion) -> list[tuple[str, Path]]:
    """The sources as the plan reads them; first those that it does not, which are small."""
    source = conversion.source
    reading = [name for step in conversion.plan.steps for _, name in step.sources]
    files = list(dict.fromkeys(path for name in reading for path in source.files_of(name)))
    return sorted(conversion.sources, key=lambda pair: files.index(pair[1]) if pair[1] in files else -1)


def _write_weights(
    incomplete: Path,
    conversion: Conversion,
    manifest: Manifest,
    paths: Mapping[Path, SourceFile],
    max_shard_bytes: int,
) -> int:
    source = conversion.source
    hashes = SourceHashes(paths, [path for path, known in paths.items() if known.sha256 is not None])

    def read(name: str) -> torch.Tensor:
        for path in source.files_of(name):
            hashes.reached(path)
        return source.read(name)

    def finish(shard: Shard, digest: str, not_finite: Mapping[str, int]) -> None:
        names = [name for step in shard.steps for _, name in step.sources]
        know_hashes({path for name in names for path in source.files_of(name)})
        manifest.shards[shard.file] |= {"sha256": digest, "not_finite": dict(not_finite)}
        manifest.save(incomplete)

    def know_hashes(wanted: set[Path]) -> None:
        for path, known in paths.items():
            if path in wanted and known.sha256 is None:
                known.sha256 = hashes[path]

    try:
        num_bytes = write_sharded(
            incomplete, conversion.plan.steps, read, conversion.dtype, max_shard_bytes, manifest.finished, finish
        )
        know_hashes(set(paths))
        hashes.check_unchanged()
    finally:
        hashes.close()
    return num_bytes


def _write_parts(incomplete: Path, conversion: Conversion, manifest: Manifest) -> None:
    staging = incomplete / STAGING_FOLDER
    staging.mkdir()
    for part in conversion.parts:
        part.save_pretrained(staging)
    names = sorted(str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file())
    for name in sorted(names, key=lambda name: name == "config.json"):
        (incomplete / name).parent.mkdir(parents=True, exist_ok=True)
        manifest.files[name] = write_file(incomplete / name, (staging / name).read_bytes())
    shutil.rmtree(staging)
    if os.path.exists(incomplete / INDEX_FILE):
        manifest.files[INDEX_FILE] = hash_file(incomplete / INDEX_FILE)
    manifest.save(incomplete)


def _not_finite(manifest: Manifest, limit: int = 5) -> str:
    """What is NaN or infinite in the original; empty if nothing is."""
    counts = {name: count for shard in manifest.shards.values() for name, count in shard["not_finite"].items()}
    if not counts:
        return ""
    shown = ", ".join(f"{count} in {name}" for name, count in list(counts.items())[:limit])
    return (
        f"Not finite: {sum(counts.values())} values of {len(counts)} tensors of the original are NaN or infinite "
        f"({shown}{', ...' if len(counts) > limit else ''})."
    )
