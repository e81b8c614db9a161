"""Reads checkpoint folders lazily: safetensors or torch pickles, in one file or in shards with an index.

Design choices:
- A checkpoint is untrusted input. Names in an index never lead out of the folder, pickles may hold tensors only, and
  index and shards must agree exactly: a tensor that is silently absent would become a randomly initialised parameter.
- Names, shapes and dtypes come from the files' headers. Values are read one tensor at a time, with one shard open.

Source: file names and indices of transformers' `save_pretrained`; `safe_open` of safetensors, `torch.load`.
"""

import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers.core_model_loading import dot_natural_key

from .checking import checked_path, read_json, some_names
from .shards import PickleShard, SafetensorsShard, TensorInfo, open_shard


# In the order of preference: transformers' own.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class CheckpointReader:
    """The tensors of a checkpoint folder. At most one of its shards is open at a time.

    Attributes:
        tensors (`dict[str, TensorInfo]`): Every tensor's shape and dtype, shard by shard.
        files (`list[str]`): The files that they are read from, and the index, if there is one.

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
        self.files: list[str] = []
        self._entry = entry
        self._file_of: dict[str, str] = {}
        self._open_file: str | None = None
        self._shard: SafetensorsShard | PickleShard | None = None
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
        """Reads one tensor.

        Args:
            name (`str`): Its name.

        Returns:
            `torch.Tensor` of any shape, in the file's dtype, on the CPU.

        Raises:
            ValueError: if there is none of this name, or its file is damaged.
        """
        if name not in self._file_of:
            raise ValueError(f"The checkpoint {self.folder} has no tensor {name!r}.")
        return self._open(self._file_of[name]).read(name)

    def path_of(self, name: str) -> Path:
        """Finds the file of a tensor.

        Args:
            name (`str`): Its name, which must be there.

        Returns:
            `Path`: The file.
        """
        return self.folder / self._file_of[name]

    def close(self):
        """Closes the open shard, if one is open. Reading opens it again."""
        self._shard = self._open_file = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _open(self, file: str) -> "SafetensorsShard | PickleShard":
        if self._shard is None or file != self._open_file:
            self.close()  # before the next one opens, not after
            self._shard = open_shard(checked_path(self.folder, file), self._entry)
            self._open_file = file
        return self._shard

    def _scan_shard(self, file: str):
        infos = self._open(file).infos()
        self.files.append(file)
        for name in sorted(infos, key=dot_natural_key):
            self.tensors[name] = infos[name]
            self._file_of[name] = file

    def _scan_index(self, index_name: str):
        index_path = checked_path(self.folder, index_name)
        weight_map = _read_weight_map(index_path)
        files = sorted(set(weight_map.values()))
        for file in files:
            checked_path(self.folder, file, named_in=index_path)
            # Of safetensors the user expects that nothing is unpickled, however safely.
            if index_name.startswith("model.safetensors") != file.endswith(".safetensors"):
                raise ValueError(
                    f"{index_path} names the file {file!r}, expected "
                    f"{'safetensors' if index_name.startswith('model.safetensors') else 'torch files'} alone. "
                    "Do not trust this checkpoint."
                )
        self.files.append(index_name)
        promised_by: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            promised_by.setdefault(file, set()).add(name)
        for file in files:
            promised = promised_by[file]
            held = set(self._open(file).infos())
            if promised != held:
                raise ValueError(
                    f"{index_path} and {self.folder / file} do not belong together: {some_names(promised - held)} "
                    f"named in the index but not in the shard, {some_names(held - promised)} in the shard but not "
                    "named there. Download both again."
                )
            self._scan_shard(file)


def _read_weight_map(path: Path) -> dict[str, str]:
    index = read_json(path, "a checkpoint's JSON index")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{path} must have a `weight_map` from tensor names to file names. Download it again.")
    return weight_map


def resolve_checkpoint(name_or_path: str | os.PathLike, patterns: list[str]) -> Path:
    """The folder of a checkpoint, downloaded from the Hub where it is not a folder already.

    Args:
        name_or_path (`str` or `os.PathLike`): A folder, or the id of a Hub repository.
        patterns (`list[str]`): Files to download, such as `"*.json"`.

    Returns:
        `Path`: The folder.

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
