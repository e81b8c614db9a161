"""Reads checkpoint folders lazily: safetensors or torch pickles, in one file or in shards with an index.

Design choices:
- A checkpoint is untrusted input. Names in an index never lead out of the folder, pickles may hold tensors only, and
  index and shards must agree exactly: a tensor that is silently absent would become a randomly initialised parameter.
- Names, shapes and dtypes come from the files' headers. Values are read one tensor at a time, with one shard open.
"""

import json
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import dot_natural_key
from transformers.modeling_utils import str_to_torch_dtype


# In the order of preference: transformers' own.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_parameters * self.dtype.itemsize


class CheckpointReader:
    """The tensors of a checkpoint folder. At most one of its shards is open at a time.

    Attributes:
        tensors (`dict[str, TensorInfo]`): Every tensor's shape and dtype, shard by shard.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint.
        file (`str`, *optional*): The one file to read, instead of the weights that are found by transformers' names.
        entry (`str`, *optional*): Where a pickle holds a dictionary of other things too, such as a training's state:
            the key of its tensors. Safetensors are tensors alone.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds no weights, or weights that are damaged, unsafe or unlike their index.
    """

    def __init__(self, folder: str | os.PathLike, file: str | None = None, entry: str | None = None):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            kind = "a file" if self.folder.exists() else "missing"
            raise FileNotFoundError(f"The checkpoint must be a folder, but {self.folder} is {kind}.")
        self.tensors: dict[str, TensorInfo] = {}
        self._entry = entry
        self._file_of: dict[str, str] = {}
        self._open_file: str | None = None
        self._shard: _SafetensorsShard | _PickleShard | None = None
        found = [file] if file else [name for name in WEIGHT_FILES if os.path.lexists(self.folder / name)]
        if not found:
            raise ValueError(
                f"The checkpoint {self.folder} has no weights: expected one of {', '.join(WEIGHT_FILES)}, found "
                f"{', '.join(sorted(os.listdir(self.folder))[:10]) or 'an empty folder'}."
            )
        try:
            if found[0].endswith(".index.json"):
                self._scan_index(found[0])
            else:
                self._scan_shard(found[0])
        finally:
            self.close()

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`, on the CPU. ValueError if there is none."""
        if name not in self._file_of:
            raise ValueError(f"The checkpoint {self.folder} has no tensor {name!r}.")
        return self._open(self._file_of[name]).read(name)

    def close(self):
        """Closes the open shard, if one is open. Reading opens it again."""
        self._shard = self._open_file = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _open(self, file: str) -> "_SafetensorsShard | _PickleShard":
        if self._shard is None or file != self._open_file:
            self.close()  # before the next one opens, not after
            self._shard = _open_shard(_checked_path(self.folder, file), self._entry)
            self._open_file = file
        return self._shard

    def _scan_shard(self, file: str):
        infos = self._open(file).infos()
        for name in sorted(infos, key=dot_natural_key):
            self.tensors[name] = infos[name]
            self._file_of[name] = file

    def _scan_index(self, index_name: str):
        index_path = _checked_path(self.folder, index_name)
        weight_map = _read_weight_map(index_path)
        files = sorted(set(weight_map.values()))
        for file in files:
            _checked_path(self.folder, file, named_in=index_path)
        for file in files:
            promised = {name for name, place in weight_map.items() if place == file}
            held = set(self._open(file).infos())
            if promised != held:
                raise ValueError(
                    f"{index_path} and {self.folder / file} do not belong together: {_some(promised - held)} named in "
                    f"the index but not in the shard, {_some(held - promised)} in the shard but not named there. "
                    "Download both again."
                )
            self._scan_shard(file)


class _SafetensorsShard:
    def __init__(self, path: Path):
        self.path = path
        try:
            self.file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} must be a complete safetensors file, but cannot be opened: {error}. Download it again."
            ) from error

    def infos(self) -> dict[str, TensorInfo]:
        infos = {}
        for name in self.file.keys():  # noqa: SIM118 -- no dict, and cannot be iterated
            header = self.file.get_slice(name)
            if header.get_dtype() not in str_to_torch_dtype:
                raise ValueError(
                    f"Tensor {name!r} of {self.path} has dtype {header.get_dtype()}, expected one of "
                    f"{', '.join(str_to_torch_dtype)}."
                )
            infos[name] = TensorInfo(tuple(header.get_shape()), str_to_torch_dtype[header.get_dtype()])
        return infos

    def read(self, name: str) -> torch.Tensor:
        return self.file.get_tensor(name)


class _PickleShard:
    def __init__(self, path: Path, entry: str | None = None):
        # Files older than torch 1.6 are no archives and cannot be mapped, only read as a whole.
        mmap = zipfile.is_zipfile(path)
        try:
            state_dict = torch.load(path, weights_only=True, mmap=mmap, map_location="cpu")
        except Exception as error:  # a damaged or malicious pickle can raise anything
            raise ValueError(
                f"{path} must be a complete torch file of plain tensors, but was refused: {error}. If it is damaged, "
                "download it again. If it holds other Python objects, it may run code when loaded: convert it to "
                "safetensors where you trust it."
            ) from error
        if entry is not None:
            if not isinstance(state_dict, dict) or entry not in state_dict:
                found = list(state_dict)[:5] if isinstance(state_dict, dict) else _kinds(state_dict)
                raise ValueError(f"{path} must hold a dictionary with tensors under {entry!r}, but holds {found}.")
            state_dict = state_dict[entry]
        entries = state_dict.items() if isinstance(state_dict, dict) else ()
        if not entries or not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in entries):
            raise ValueError(f"{path} must hold a dictionary of tensors by name, but holds {_kinds(state_dict)}.")
        self.state_dict = state_dict

    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self.state_dict.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.state_dict[name].detach()


def _open_shard(path: Path, entry: str | None = None) -> _SafetensorsShard | _PickleShard:
    return _SafetensorsShard(path) if path.suffix == ".safetensors" else _PickleShard(path, entry)


def _checked_path(folder: Path, file: str, named_in: Path | None = None) -> Path:
    """The path of a file inside `folder`; ValueError if `file` is no plain name, missing or leads elsewhere."""
    source = f"{named_in} names the file {file!r}" if named_in else f"The checkpoint {folder} has the file {file!r}"
    if file != os.path.basename(file) or "\\" in file or file in ("", ".", ".."):
        raise ValueError(f"{source}, expected a plain file name inside the folder. Do not trust this checkpoint.")
    path = folder / file
    if not path.is_file():
        raise ValueError(f"{source}, but there is no such file. Download the checkpoint again, completely.")
    root = folder.resolve()
    # The Hub's cache keeps files as `blobs/<hash>` and links to them from `snapshots/<revision>`.
    allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{source}, but it is a link to {path.resolve()}, outside the folder. If you trust that file, move or "
            "copy it here."
        )
    return path


def _read_weight_map(path: Path) -> dict[str, str]:
    def unique(pairs):
        if len(dict(pairs)) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{_some({name for name in names if names.count(name) > 1})} named more than once")
        return dict(pairs)

    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must be a checkpoint's JSON index, but is not: {error}. Download it again."
        ) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{path} must have a `weight_map` from tensor names to file names. Download it again.")
    return weight_map


def _some(names: set[str], limit: int = 5) -> str:
    shown = sorted(names)[:limit]
    return f"{len(names)} tensors" + (f" ({', '.join(shown)}{', ...' if len(names) > limit else ''})" if shown else "")


def _kinds(value) -> str:
    if not isinstance(value, dict):
        return f"a {type(value).__name__}"
    return f"a dictionary of {', '.join(sorted({type(entry).__name__ for entry in value.values()})) or 'nothing'}"


def resolve_checkpoint(name_or_path: str | os.PathLike, patterns: list[str]) -> Path:
    """The folder of a checkpoint, downloaded from the Hub where it is not a folder already.

    Args:
        name_or_path (`str` or `os.PathLike`): A folder, or the id of a Hub repository.
        patterns (`list[str]`): Files to download, such as `"*.json"`.

    Raises:
        FileNotFoundError: if it looks like a path, but there is no such folder.
        ValueError: if the Hub does not give it.
    """
    name = os.fspath(name_or_path)
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name) or name.startswith((".", "~", os.sep)) or name.count("/") != 1 or name.endswith("/"):
        raise FileNotFoundError(
            f"The checkpoint {name!r} is neither a folder nor the id of a Hub repository (`owner/name`)."
        )
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # all of the Hub's errors are one or the other
        raise ValueError(
            f"The checkpoint {name!r} is not a folder, and could not be downloaded from the Hub: "
            f"{' '.join(str(error).split())} Check the name, the connection, and for a gated or private repository "
            "`hf auth login`."
        ) from error
