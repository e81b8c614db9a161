"""Opens one file of weights, safetensors or a torch pickle, and trusts nothing that it says about itself.

Source: `safe_open` of safetensors, and `torch.load` with `weights_only`, both with stricter checks.
"""

import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.modeling_utils import str_to_torch_dtype

from .checking import check_tensor_name, parse_json


# A header of 100,000 tensors has 15 MB.
MAX_HEADER_BYTES = 50_000_000
# The part of a torch file that names its tensors: 100 bytes for each.
MAX_PICKLE_BYTES = 50_000_000


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without its values.

    Attributes:
        shape (`tuple[int, ...]`): Its shape.
        dtype (`torch.dtype`): Its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_parameters(self) -> int:
        """Values that the tensor has."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of all values."""
        return self.num_parameters * self.dtype.itemsize


class SafetensorsShard:
    """A safetensors file.

    Args:
        path (`Path`): The file.

    Raises:
        ValueError: if it is damaged, or names or sizes in it are impossible.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            _check_header(path)
            self.file = safe_open(path, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{path} must be a complete safetensors file, but cannot be opened: {error}. Download it again."
            ) from error

    def infos(self) -> dict[str, TensorInfo]:
        """Reads what the header says of all tensors.

        Returns:
            `dict[str, TensorInfo]`: Shape and dtype by name.

        Raises:
            ValueError: if a name or a dtype is none.
        """
        infos = {}
        for name in self.file.keys():  # noqa: SIM118 -- no dict, and cannot be iterated
            check_tensor_name(name, self.path)
            header = self.file.get_slice(name)
            if header.get_dtype() not in str_to_torch_dtype:
                raise ValueError(
                    f"Tensor {name!r} of {self.path} has dtype {header.get_dtype()}, expected one of "
                    f"{', '.join(str_to_torch_dtype)}."
                )
            infos[name] = TensorInfo(tuple(header.get_shape()), str_to_torch_dtype[header.get_dtype()])
        return infos

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor.

        Args:
            name (`str`): Its name, which must be there.

        Returns:
            `torch.Tensor` of any shape, in the file's dtype, on the CPU.
        """
        return self.file.get_tensor(name)


def _check_header(path: Path) -> None:
    """What safetensors leaves open: of two tensors with one name it takes one, and a header may have 100 MB."""
    with path.open("rb") as file:
        length, rest = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size - 8
        if not 0 < length <= min(rest, MAX_HEADER_BYTES):
            raise ValueError(
                f"its header should have {length} bytes, but {max(rest, 0)} follow, and at most {MAX_HEADER_BYTES} "
                "are read"
            )
        parse_json(file.read(length))


class PickleShard:
    """A torch file. It runs no code: torch's restricted unpickler makes tensors and plain containers only.

    Args:
        path (`Path`): The file.
        entry (`str`, *optional*): Key of the tensors, where it holds a dictionary of other things too.

    Raises:
        ValueError: if it is damaged, holds anything else, or tensors that are not plain ones.
    """

    def __init__(self, path: Path, entry: str | None = None):
        try:
            # Files older than torch 1.6 are no archives and cannot be mapped, only read as a whole.
            if mmap := zipfile.is_zipfile(path):
                _check_archive(path)
            state_dict = torch.load(path, weights_only=True, mmap=mmap, map_location="cpu")
        except Exception as error:  # a damaged or malicious pickle can raise anything
            raise ValueError(
                f"{path} must be a complete torch file of plain tensors, but was refused: {_reason(error)}. If it is "
                "damaged, download it again. If it holds other Python objects, it may run code when loaded: convert "
                "it to safetensors where you trust it."
            ) from error
        if entry is not None:
            if not isinstance(state_dict, dict) or entry not in state_dict:
                found = list(state_dict)[:5] if isinstance(state_dict, dict) else _kinds(state_dict)
                raise ValueError(f"{path} must hold a dictionary with tensors under {entry!r}, but holds {found}.")
            state_dict = state_dict[entry]
        entries = state_dict.items() if isinstance(state_dict, dict) else ()
        if not entries or not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in entries):
            raise ValueError(f"{path} must hold a dictionary of tensors by name, but holds {_kinds(state_dict)}.")
        for name, tensor in entries:
            check_tensor_name(name, path)
            _check_plain(path, name, tensor)
        self.state_dict = state_dict

    def infos(self) -> dict[str, TensorInfo]:
        """Tells shape and dtype of all tensors.

        Returns:
            `dict[str, TensorInfo]`: Shape and dtype by name.
        """
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self.state_dict.items()}

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor.

        Args:
            name (`str`): Its name, which must be there.

        Returns:
            `torch.Tensor` of any shape, in the file's dtype, on the CPU.
        """
        return self.state_dict[name].detach()


def _reason(error: Exception) -> str:
    """What torch says, without its advice to load the file anyway and without what would steer a terminal."""
    text = str(error).partition("\n\nCheck the documentation")[0].rpartition("WeightsUnpickler error:")[2]
    text = text.partition(" Please use `torch.serialization")[0]
    text = " ".join(text.split()).rstrip(".")[:300] or type(error).__name__
    return text if text.isprintable() else ascii(text)


def _check_archive(path: Path) -> None:
    """torch never compresses. What is compressed, or overlaps, can unfold to more than the memory holds."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    compressed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise ValueError(f"its part {compressed[0][:80]!a} is compressed, which torch never does")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its parts claim more bytes than it has")
    if len({entry.filename for entry in entries}) != len(entries):
        raise ValueError("two of its parts have one name")
    for entry in entries:
        if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"its pickle has {entry.file_size} bytes, expected at most {MAX_PICKLE_BYTES}")


def _check_plain(path: Path, name: str, tensor: torch.Tensor) -> None:
    found = None
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        found = f"a {type(tensor).__name__}"
    elif tensor.is_quantized:
        found = "quantized"
    elif tensor.layout != torch.strided or tensor.is_nested:
        found = f"of layout {tensor.layout}"
    elif tensor.device.type != "cpu":
        found = f"without values, on the device {tensor.device.type!r}"
    elif tensor.is_conj() or tensor.is_neg():
        found = "a lazy conjugate or negative"
    elif tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        claimed, held = tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes()
        found = f"expanded: it has {claimed:,} bytes of values, of which the file holds {held:,}"
    if found is not None:
        raise ValueError(
            f"Tensor {name!r} of {path} must be a plain dense tensor, but is {found}. Save plain tensors, contiguous "
            "and dequantized."
        )


def _kinds(value: Any) -> str:
    if not isinstance(value, dict):
        return f"a {type(value).__name__}"
    return f"a dictionary of {', '.join(sorted({type(entry).__name__ for entry in value.values()})) or 'nothing'}"


def open_shard(path: Path, entry: str | None = None) -> SafetensorsShard | PickleShard:
    """Opens a file of weights by its name's ending.

    Args:
        path (`Path`): The file.
        entry (`str`, *optional*): Key of the tensors, where a pickle holds other things too.

    Returns:
        `SafetensorsShard` or `PickleShard`: The file.

    Raises:
        ValueError: if it is damaged or unsafe.
    """
    return SafetensorsShard(path) if path.suffix == ".safetensors" else PickleShard(path, entry)
