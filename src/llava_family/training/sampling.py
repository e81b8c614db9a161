"""The order in which samples are trained on.

Source: LLaVA's `LengthGroupedSampler` and its option `group_by_modality_length`; torch's `RandomSampler`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


# So many batches are sorted by length together; the more, the less padding, and the less chance.
BATCHES_SORTED_TOGETHER = 50


class ShuffledSampler(Sampler[int]):
    """Every epoch has an order of its own, which follows from seed and epoch alone: an interrupted one goes on in it.

    Args:
        num_samples (`int`): Of the data set.
        seed (`int`): Of the order.
    """

    def __init__(self, num_samples: int, seed: int):
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch.

        Args:
            epoch (`int`): Number of the epoch.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(torch.Generator().manual_seed(self.seed + self.epoch)))

    def order(self, generator: torch.Generator) -> list[int]:
        """Draws an order.

        Args:
            generator (`torch.Generator`): Of the epoch.

        Returns:
            `list[int]`: Every sample's index once.
        """
        return torch.randperm(self.num_samples, generator=generator).tolist()


class ModalityLengthSampler(ShuffledSampler):
    """Shuffles samples so that those of one optimizer step have images, or have none, and are of similar length.

    As LLaVA's option of the same purpose, it lets the last samples of both kinds, too few for a step of their own,
    come last and mixed.

    Args:
        modality_lengths (`list[int]`): Length of every sample, in words as [`Conversation`] counts them; negative
            without images.
        step_size (`int`): Samples of one optimizer step, over all processes and accumulated batches.
        seed (`int`): Of the order.
    """

    def __init__(self, modality_lengths: list[int], step_size: int, seed: int):
        super().__init__(len(modality_lengths), seed)
        self.lengths = torch.tensor(modality_lengths)
        self.step_size = step_size

    def order(self, generator: torch.Generator) -> list[int]:
        """Draws an order of whole steps, with the rest behind them.

        Args:
            generator (`torch.Generator`): Of the epoch.

        Returns:
            `list[int]`: Every sample's index once.
        """
        steps: list[torch.Tensor] = []
        rest: list[torch.Tensor] = []
        for is_kind in (self.lengths > 0, self.lengths <= 0):
            indices = is_kind.nonzero().flatten()
            indices = indices[torch.randperm(len(indices), generator=generator)]
            whole = len(indices) - len(indices) % self.step_size
            steps += self._steps(indices[:whole])
            rest.append(indices[whole:])
        shuffled = [steps[number] for number in torch.randperm(len(steps), generator=generator).tolist()]
        return torch.cat([*shuffled, *rest]).tolist()

    def _steps(self, indices: torch.Tensor) -> list[torch.Tensor]:
        """Parts of similar length; as many as there are whole ones."""
        pools = indices.split(self.step_size * BATCHES_SORTED_TOGETHER) if len(indices) else ()
        ordered = [pool[self.lengths[pool].abs().argsort(descending=True, stable=True)] for pool in pools]
        return [step for pool in ordered for step in pool.split(self.step_size)]


class EpochCallback(TrainerCallback):
    """Tells a sampler its epoch, also when training goes on within an epoch.

    accelerate does not reach the sampler of several processes then, and goes on in the order of the first epoch:
    https://github.com/huggingface/accelerate/issues/2016
    """

    def __init__(self) -> None:
        self.sampler: ShuffledSampler | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))


__all__ = ["EpochCallback", "ModalityLengthSampler", "ShuffledSampler"]
