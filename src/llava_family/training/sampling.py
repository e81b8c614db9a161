"""The order in which samples are trained on."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


# So many batches are sorted by length together; the more, the less padding, and the less chance.
BATCHES_SORTED_TOGETHER = 50


class ModalityLengthSampler(Sampler[int]):
    """Shuffles samples so that those of one optimizer step have images, or have none, and are of similar length.

    As LLaVA's option of the same purpose, it lets the last samples of both kinds, too few for a step of their own,
    come last and mixed. Every epoch has an order of its own, which follows from seed and epoch alone.

    Args:
        modality_lengths (`list[int]`): Length of every sample, negative without images.
        batch_size (`int`): Samples of one optimizer step, over all processes and accumulated batches.
        seed (`int`): Of the order.
    """

    def __init__(self, modality_lengths: list[int], batch_size: int, seed: int):
        self.lengths = torch.tensor(modality_lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        batches: list[torch.Tensor] = []
        rest: list[torch.Tensor] = []
        for is_kind in (self.lengths > 0, self.lengths <= 0):
            for batch in self._batches(is_kind.nonzero().flatten(), generator):
                (batches if len(batch) == self.batch_size else rest).append(batch)
        order = torch.randperm(len(batches), generator=generator).tolist()
        return iter([index for batch in [*(batches[i] for i in order), *rest] for index in batch.tolist()])

    def _batches(self, indices: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
        """Batches of similar length; only the last one may have fewer samples."""
        indices = indices[torch.randperm(len(indices), generator=generator)]
        whole = len(indices) - len(indices) % self.batch_size
        pools = indices[:whole].split(self.batch_size * BATCHES_SORTED_TOGETHER)
        ordered = [pool[self.lengths[pool].abs().argsort(descending=True, stable=True)] for pool in pools]
        batches = [batch for pool in ordered for batch in pool.split(self.batch_size)]
        return [batch for batch in [*batches, indices[whole:]] if len(batch)]


__all__ = ["ModalityLengthSampler"]
