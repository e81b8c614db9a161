"""Logs the balance loss beside the loss that contains it.

Source: no counterpart in the original codes; transformers' `TrainerCallback`.
"""

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class BalanceLossCallback(TrainerCallback):
    """Logs as `balance_loss` the mean of the model's unweighted balance loss since the last log, over all processes.

    For models that were adapted by [`get_mole_model`], and for [`LlavaMoleForCausalLM`] and [`MoeLlavaForCausalLM`].
    Where an adapted model has experts of its own, it is the adapter's.
    It is the mean over forward passes of training; those of evaluation do not count.

    Trainer calls its reporting integrations, such as TensorBoard's, before the callbacks that it is given: with
    `Trainer(callbacks=[BalanceLossCallback()])` the value is printed and stands in `trainer.state.log_history`. Use
    `BalanceLossCallback().add_to(trainer)` to have it reported as well.
    """

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None
        self._count = 0
        self._handle: Any = None

    def add_to(self, trainer: Trainer) -> "BalanceLossCallback":
        """Adds this callback before all others of a trainer.

        Args:
            trainer (`Trainer`): Changed in place.

        Returns:
            `BalanceLossCallback`: Itself.
        """
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove()
        self._total, self._count = None, 0
        model = kwargs["model"]
        # The base model's own outputs: what wraps it may hand on copies.
        base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._handle = base_model.register_forward_hook(self._record)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds `balance_loss` to the log of a training step.

        Args:
            args (`TrainingArguments`): Tells the device.
            state (`TrainerState`): Whose `log_history` gets it too.
            control (`TrainerControl`): Left as it is.
            logs (`dict[str, float]`, *optional*): The log; others than a training step's are left as they are.
        """
        # The log of a training step, which all processes write at once; not that of an evaluation.
        if logs is None or "loss" not in logs:
            return
        mean = self._mean(args.device)
        if mean is None:
            return
        logs["balance_loss"] = mean
        # Trainer keeps a copy of `logs`.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1]["balance_loss"] = mean

    def _record(self, model: nn.Module, args: tuple, outputs: Any) -> None:
        if not model.training:
            return
        loss = getattr(outputs, "balance_loss", None)
        if loss is None:
            loss = getattr(outputs, "aux_loss", None)
        if loss is not None and getattr(outputs, "loss", None) is not None:
            loss = loss.detach().float()
            self._total = loss if self._total is None else self._total + loss
            self._count += 1

    def _mean(self, device: torch.device) -> float | None:
        total = torch.zeros((), device=device) if self._total is None else self._total.to(device)
        sums = torch.stack([total, total.new_tensor(float(self._count))])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        self._total, self._count = None, 0
        total_loss, count = sums.tolist()
        return total_loss / count if count else None

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


__all__ = ["BalanceLossCallback"]
