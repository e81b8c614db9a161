"""Brings tensors of several checkpoints together under the names of one."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch

from .reading import CheckpointReader
from .shards import TensorInfo


class CheckpointTensors:
    """Tensors by the names that a conversion knows them by, wherever they lie. None is read before it is needed.

    Attributes:
        tensors (`dict[str, TensorInfo]`): Every tensor's shape and dtype.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self._reads: dict[str, Callable[[], torch.Tensor]] = {}
        self._files: dict[str, tuple[Path, ...]] = {}

    def add(self, name: str, info: TensorInfo, read: Callable[[], torch.Tensor], files: tuple[Path, ...] = ()) -> None:
        """Adds the tensor that `read()` returns, of `files`. ValueError if there is one called `name` already."""
        if name in self.tensors:
            raise ValueError(f"There are two tensors called {name!r}. Convert a checkpoint that has it once.")
        self.tensors[name] = info
        self._reads[name] = read
        self._files[name] = files

    def add_checkpoint(self, reader: CheckpointReader, names: Mapping[str, str] | None = None) -> None:
        """Adds tensors of a checkpoint; `names` maps those that are wanted to their new names, by default all stay."""
        for original, name in (names or {name: name for name in reader.tensors}).items():
            self.add(name, reader.tensors[original], partial(reader.read, original), (reader.path_of(original),))

    def remove(self, names: Iterable[str]) -> None:
        """Removes tensors, all of which must be there."""
        for name in list(names):
            del self.tensors[name], self._reads[name], self._files[name]

    def rename(self, old: str, new: str) -> None:
        """Gives a tensor another name, which must be free."""
        info, read, files = self.tensors[old], self._reads[old], self._files[old]
        self.remove([old])
        self.add(new, info, read, files)

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`, which must be there, on the CPU."""
        return self._reads[name]()

    def files_of(self, name: str) -> tuple[Path, ...]:
        """The files that the tensor called `name` is made of."""
        return self._files[name]

    def replace(
        self,
        name: str,
        others: Iterable[str],
        compute: Callable[..., torch.Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes the tensor `name` into `compute(name, *others)`, of its own shape and, unless given, its own dtype.

        The `others` are used up.
        """
        parts = (name, *others)
        info, reads = self.tensors[name], [self._reads[part] for part in parts]
        files = tuple(dict.fromkeys(file for part in parts for file in self._files[part]))
        info = TensorInfo(info.shape, dtype or info.dtype)
        self.remove(parts)
        self.add(name, info, lambda: compute(*(read() for read in reads)), files)

    def replace_vision_tower(self, tower: CheckpointReader, prefix: str) -> None:
        """Puts the tower of a CLIP or SigLIP checkpoint, `vision_model.*`, in the place of all that begins so."""
        self.remove([name for name in self.tensors if name.startswith(prefix)])
        self.add_checkpoint(tower, vision_tower_names(tower, prefix))

    def common_dtype(self, folder: Path) -> torch.dtype:
        """Of all floating point tensors, which are those of `folder`; ValueError if there are several."""
        dtypes = {info.dtype for info in self.tensors.values() if info.dtype.is_floating_point}
        if len(dtypes) != 1:
            raise ValueError(
                f"The checkpoint {folder} has floating point tensors of {len(dtypes)} dtypes "
                f"({', '.join(sorted(map(str, dtypes)))}), expected one. Choose the output's by `dtype` (`--dtype`)."
            )
        return dtypes.pop()


def vision_tower_names(tower: CheckpointReader, prefix: str) -> dict[str, str]:
    """New names for the vision tower's tensors in a CLIP or SigLIP checkpoint: `vision_model.*` behind `prefix`."""
    names = {name: name for name in tower.tensors if name.startswith("vision_model.")}
    # A vision model that transformers 5 saved has no prefix.
    names = names or {name: f"vision_model.{name}" for name in tower.tensors}
    return {name: prefix + full_name for name, full_name in names.items()}
