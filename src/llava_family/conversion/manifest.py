"""What a conversion was made of and what it has written, so that a rerun can go on where another one stopped.

Design choices:
- No times and no folders' names: the same conversion writes the same manifest, interrupted or not, on any machine.
- Sources are told apart by their SHA-256, and so are finished files: neither is trusted by its name.

Source: no counterpart in the original codes or in transformers, whose conversions begin anew.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from .checking import read_json
from .writing import Shard, write_file


MANIFEST_FILE = "conversion_manifest.json"
FORMAT = "llava-family conversion, version 1"


@dataclass
class SourceFile:
    """A file that a conversion reads.

    Attributes:
        role (`str`): Which of the conversion's checkpoints has it, such as `"checkpoint"`.
        name (`str`): Its name.
        size (`int`): In bytes.
        sha256 (`str`, *optional*): Hexadecimal; None until it is known.
    """

    role: str
    name: str
    size: int
    sha256: str | None = None


@dataclass
class Manifest:
    """What one conversion reads and writes.

    Attributes:
        tool (`dict[str, str]`): Versions of all that the written bytes depend on.
        family (`str`): Whose checkpoint it is.
        options (`dict[str, Any]`): Of the conversion, as JSON has them.
        sources (`list[SourceFile]`): All that was read.
        shards (`dict[str, dict]`): For every planned file of weights its `tensors` and, once it is finished, its
            `sha256` and the `not_finite` values of its sources, by their names.
        files (`dict[str, str]`): SHA-256 of all other files; empty until the conversion is complete.
    """

    tool: dict[str, str]
    family: str
    options: dict[str, Any]
    sources: list[SourceFile]
    shards: dict[str, dict[str, Any]]
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def planned(
        cls, family: str, options: Mapping[str, Any], sources: Sequence[SourceFile], shards: Sequence[Shard]
    ) -> "Manifest":
        """Makes the manifest of a conversion that has written nothing yet.

        Args:
            family (`str`): Whose checkpoint it is.
            options (`Mapping[str, Any]`): Of the conversion.
            sources (`Sequence[SourceFile]`): All that is read.
            shards (`Sequence[Shard]`): All that is to be written.

        Returns:
            `Manifest`: Without hashes of what is to be written.
        """
        from .. import __version__

        tool = {
            "llava_family": __version__,
            "safetensors": safetensors.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        plans = {
            shard.file: {
                "sha256": None,
                "not_finite": {},
                "tensors": {name: f"{str(info.dtype)[6:]} {list(info.shape)}" for name, info in shard.tensors.items()},
            }
            for shard in shards
        }
        return cls(tool, family, dict(options), list(sources), plans)

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Reads a manifest.

        Args:
            path (`Path`): The file.

        Returns:
            `Manifest`: Checked for its structure.

        Raises:
            ValueError: if it is none of this version.
        """
        content = read_json(path, "the manifest of a conversion")
        try:
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            sources = [SourceFile(**source) for source in content.pop("sources")]
            manifest = cls(sources=sources, **content)
            kinds: list[tuple[dict, type]] = [(manifest.shards, dict), (manifest.files, str), (manifest.tool, str)]
            if not all(isinstance(value, kind) for values, kind in kinds for value in values.values()):
                raise ValueError("other types")
            for shard in manifest.shards.values():
                if set(shard) != {"sha256", "not_finite", "tensors"}:
                    raise ValueError("other shards")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} must be the manifest of a conversion by this tool: {error}") from error
        return manifest

    def save(self, folder: Path) -> None:
        """Writes the manifest, at once or not at all.

        Args:
            folder (`Path`): Where to.
        """
        content: dict[str, Any] = {"format": FORMAT, "tool": self.tool, "family": self.family, "options": self.options}
        content |= {"sources": [vars(source) for source in self.sources], "shards": self.shards, "files": self.files}
        write_file(folder / MANIFEST_FILE, (json.dumps(content, indent=2) + "\n").encode())

    def continues(self, other: "Manifest") -> bool:
        """Whether what `other` has finished is what this one would write, as far as can be told without hashing.

        Args:
            other (`Manifest`): Of an earlier run.
        """

        def settled(manifest: Manifest) -> Any:
            plans = {file: shard["tensors"] for file, shard in manifest.shards.items()}
            sources = [(source.role, source.name, source.size) for source in manifest.sources]
            # By way of JSON, which has lists alone
            options = json.loads(json.dumps(manifest.options))
            return manifest.tool, manifest.family, options, sources, list(plans.items())

        return settled(self) == settled(other)

    @property
    def finished(self) -> dict[str, str]:
        """SHA-256 of the finished files of weights, by their names."""
        return {file: shard["sha256"] for file, shard in self.shards.items() if shard["sha256"] is not None}
