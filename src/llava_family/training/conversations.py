"""Conversations about images, as LLaVA's data sets and transformers' chats hold them.

Source: LLaVA's `LazySupervisedDataset`, as the original codes have it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers.utils import logging

from .samples import BadConversationError, check_image, id_of, open_image, parse_sample, read_samples


logger = logging.get_logger(__name__)

NUM_NAMED = 10


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be trained on.

    Attributes:
        index (`int`): Its place in the source.
        id (`str`): Its `id` there, or its index.
        reason (`str`): What is wrong.
    """

    index: int
    id: str
    reason: str


class ConversationDataset(Dataset):
    """Conversations with any number of images, also none, for [`ConversationCollator`].

    Every sample is checked before training begins: its structure, that as many images are there as its text asks for,
    and that the files of images exist and begin as images do.

    Args:
        source (`str`, `os.PathLike`, `list[dict]` or `datasets.Dataset`):
            A `.json` file with a list of samples, a `.jsonl` file with one a line, or the samples themselves. A sample
            is `{"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
            {"from": "gpt", "value": "A tree."}]}`, LLaVA's format, or has in place of `conversations` the `messages`
            of transformers' chat format, with `{"type": "image"}` where an image belongs. `image` or `images` is the
            file or PIL image, or a list of them; a conversation about text has none. A `datasets.Dataset` decodes all
            of its images when they are checked.
        image_folder (`str` or `os.PathLike`, *optional*):
            Where the files of images lie. Paths that lead out of it are refused. Without it, paths are used as they
            are.
        skip_bad_samples (`bool`, *optional*, defaults to `False`):
            Leaves samples out that cannot be trained on, lists them in `bad_samples`, and warns.

    An item is `{"id": str, "messages": list[dict], "images": list[PIL.Image.Image]}`: messages in transformers' chat
    format with the images in front of their message's text, as the originals put them, and RGB images in the order of
    the messages.

    Raises:
        ValueError: if `source` is no such file or has no samples, or if samples are bad and `skip_bad_samples` is not
            set; of these the first ten are named.
    """

    def __init__(
        self,
        source: str | os.PathLike | Sequence[dict[str, Any]],
        image_folder: str | os.PathLike | None = None,
        *,
        skip_bad_samples: bool = False,
    ):
        self._samples = read_samples(source) if isinstance(source, (str, os.PathLike)) else source
        self._image_folder = None if image_folder is None else Path(image_folder)
        if self._image_folder is not None and not self._image_folder.is_dir():
            raise ValueError(f"`image_folder` must be a folder, but {str(image_folder)!r} is none.")
        self.bad_samples: list[BadSample] = []
        self.modality_lengths: list[int] = []
        self._indices: list[int] = []
        self._check_all()
        if self.bad_samples and not skip_bad_samples:
            raise ValueError(f"{self._name_bad_samples()}\nMend them, or leave them out with `skip_bad_samples=True`.")
        if not self._indices:
            raise ValueError(f"There is nothing to train on: all of the {len(self._samples)} samples are bad.")
        if self.bad_samples:
            logger.warning(f"{self._name_bad_samples()}\nThey are left out.")

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        conversation = parse_sample(self._samples[self._indices[index]], self._indices[index], self._image_folder)
        try:
            images = [open_image(image) for image in conversation.images]
        except BadConversationError as error:
            raise ValueError(f"Sample {self._indices[index]} ({conversation.id!r}): {error}") from error
        return {"id": conversation.id, "messages": conversation.messages, "images": images}

    def _check_all(self) -> None:
        if not hasattr(self._samples, "__len__") or not hasattr(self._samples, "__getitem__"):
            raise ValueError(
                "`source` must be a path, a list of samples or a `datasets.Dataset`, but is a "
                f"{type(self._samples).__name__}."
            )
        if len(self._samples) == 0:
            raise ValueError("`source` has no samples.")
        # Of many processes, one shows its progress.
        hidden = int(os.environ.get("RANK", "0")) > 0
        for index in logging.tqdm(range(len(self._samples)), desc="Checking samples", unit="sample", disable=hidden):
            sample = self._samples[index]
            try:
                conversation = parse_sample(sample, index, self._image_folder)
                for image in conversation.images:
                    check_image(image)
            except BadConversationError as error:
                self.bad_samples.append(BadSample(index, id_of(sample, index), str(error)))
                continue
            self._indices.append(index)
            self.modality_lengths.append(conversation.modality_length)

    def _name_bad_samples(self) -> str:
        named = [f"  sample {bad.index} ({bad.id!r}): {bad.reason}" for bad in self.bad_samples[:NUM_NAMED]]
        others = len(self.bad_samples) - len(named)
        lines = [f"{len(self.bad_samples)} of {len(self._samples)} samples are bad:", *named]
        return "\n".join(lines + ([f"  and {others} others"] if others else []))


__all__ = ["BadSample", "ConversationDataset"]
