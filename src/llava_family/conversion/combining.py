"""Brings tensors of several checkpoints together under the names of one.

Source: no counterpart: transformers loads the files of one checkpoint alone.
"""

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
        """Adds a tensor.

        Args:
            name (`str`): Its name, which must be new.
            info (`TensorInfo`): Its shape and dtype.
            read (`Callable[[], torch.Tensor]`): Returns it.
            files (`tuple[Path, ...]`, *optional*): The files that it is made of.

        Raises:
            ValueError: if there is one of this name already.
        """
        if name in self.tensors:
            raise ValueError(f"There are two tensors called {name!r}. Convert a checkpoint that has it once.")
        self.tensors[name] = info
        self._reads[name] = read
        self._files[name] = files

    def add_checkpoint(self, reader: CheckpointReader, names: Mapping[str, str] | None = None) -> None:
        """Adds tensors of a checkpoint.

        Args:
            reader (`CheckpointReader`): The checkpoint, which must stay open.
            names (`Mapping[str, str]`, *optional*): New names of those that are wanted; by default all are, under
                their own.

        Raises:
            ValueError: if there is one of such a name already.
        """
        for original, name in (names or {name: name for name in reader.tensors}).items():
            self.add(name, reader.tensors[original], partial(reader.read, original), (reader.path_of(original),))

    def remove(self, names: Iterable[str]) -> None:
        """Takes tensors out again.

        Args:
            names (`Iterable[str]`): Their names, all of which must be there.
        """
        for name in list(names):
            del self.tensors[name], self._reads[name], self._files[name]

    def rename(self, old: str, new: str) -> None:
        """Gives a tensor another name.

        Args:
            old (`str`): Its name, which must be there.
            new (`str`): Its new name, which must be free.

        Raises:
            ValueError: if the new name is taken.
        """
        info, read, files = self.tensors[old], self._reads[old], self._files[old]
        self.remove([old])
        self.add(new, info, read, files)

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor, or computes it.

        Args:
            name (`str`): Its name, which must be there.

        Returns:
            `torch.Tensor` of any shape, in the dtype that `tensors` tells, on the CPU.
        """
        return self._reads[name]()

    def files_of(self, name: str) -> tuple[Path, ...]:
        """Finds the files that a tensor is made of.

        Args:
            name (`str`): Its name, which must be there.

        Returns:
            `tuple[Path, ...]`: The files.
        """
        return self._files[name]

    def replace(
        self,
        name: str,
        others: Iterable[str],
        compute: Callable[..., torch.Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes a tensor out of itself and others, which are used up. It keeps its shape.

        Args:
            name (`str`): The tensor, which is passed to `compute` first.
            others (`Iterable[str]`): The others, in the order in which they are passed.
            compute (`Callable[..., torch.Tensor]`): Returns the new tensor.
            dtype (`torch.dtype`, *optional*): Of the new tensor; its own by default.
        """
        parts = (name, *others)
        info, reads = self.tensors[name], [self._reads[part] for part in parts]
        files = tuple(dict.fromkeys(file for part in parts for file in self._files[part]))
        info = TensorInfo(info.shape, dtype or info.dtype)
        self.remove(parts)
        self.add(name, info, lambda: compute(*(read() for read in reads)), files)

    def replace_vision_tower(self, tower: CheckpointReader, prefix: str) -> None:
        """Puts the vision tower of a CLIP or SigLIP checkpoint in the place of another one.

        Args:
            tower (`CheckpointReader`): The checkpoint, which must stay open.
            prefix (`str`): What the names of all that is replaced begin with.
        """
        self.remove([name for name in self.tensors if name.startswith(prefix)])
        self.add_checkpoint(tower, vision_tower_names(tower, prefix))

    def common_dtype(self, folder: Path) -> torch.dtype:
        """The dtype that all floating point tensors have.

        Args:
            folder (`Path`): Whose tensors they are, for the message.

        Returns:
            `torch.dtype`: The one that they share.

        Raises:
            ValueError: if there are several.
        """
        dtypes = {info.dtype for info in self.tensors.values() if info.dtype.is_floating_point}
        if len(dtypes) != 1:
            raise ValueError(
                f"The checkpoint {folder} has floating point tensors of {len(dtypes)} dtypes "
                f"({', '.join(sorted(map(str, dtypes)))}), expected one. Choose the output's by `dtype` (`--dtype`)."
            )
        return dtypes.pop()


def vision_tower_names(tower: CheckpointReader, prefix: str) -> dict[str, str]:
    """New names for the vision tower's tensors in a CLIP or SigLIP checkpoint.

    Args:
        tower (`CheckpointReader`): The checkpoint, of the whole model or of the tower alone.
        prefix (`str`): What to put before `vision_model.`.

    Returns:
        `dict[str, str]`: New name by old name.
    """
    names = {name: name for name in tower.tensors if name.startswith("vision_model.")}
    # A vision model that transformers 5 saved has no prefix.
    names = names or {name: f"vision_model.{name}" for name in tower.tensors}
    return {name: prefix + full_name for name, full_name in names.items()}
