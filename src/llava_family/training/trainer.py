"""`Trainer` for vision-language models: order of samples, learning rates, and micro-batches without images."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer

from .arguments import LlavaTrainingArguments
from .balance_loss import BalanceLossCallback
from .freezing import is_connector
from .sampling import EpochCallback, ModalityLengthSampler, ShuffledSampler


class LlavaTrainer(Trainer):
    """`Trainer` with the options of [`LlavaTrainingArguments`], which logs the balance loss of models that have one.

    In a micro-batch without images, a blank one is encoded and counts nothing, as in the originals: otherwise the
    processes of a distributed training would wait for each other at the vision tower and the projector.

    Checkpoints have the model's own names of weights, not an original release's, which `model.save_pretrained` writes.

    Source: LLaVA's `LLaVATrainer`, as the original codes have it; transformers' `Trainer`, whose arguments it takes.

    Raises:
        ValueError: if `args` are no [`LlavaTrainingArguments`].
    """

    args: LlavaTrainingArguments
    _has_projector_groups = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, LlavaTrainingArguments):
            raise ValueError(f"`args` must be `LlavaTrainingArguments`, but is a {type(self.args).__name__}.")
        if not any(isinstance(callback, BalanceLossCallback) for callback in self.callback_handler.callbacks):
            BalanceLossCallback().add_to(self)
        self._epochs = EpochCallback()
        self.add_callback(self._epochs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "random" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.args.group_by_modality_length:
            self._epochs.sampler = ModalityLengthSampler(modality_lengths_of(dataset), self._step_size, seed)
        else:
            self._epochs.sampler = ShuffledSampler(len(dataset), seed)
        return self._epochs.sampler

    @property
    def _step_size(self) -> int:
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As `Trainer`'s, with parameters between vision tower and text model in groups of their own.

        Raises:
            ValueError: if `projector_learning_rate` is set, but the optimizer was given to the trainer or is
                DeepSpeed's.
        """
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        rate = self.args.projector_learning_rate
        if rate is None:
            return optimizer
        if is_new:
            set_projector_learning_rate(self.model if model is None else model, optimizer, rate)
            self._has_projector_groups = True
        elif not self._has_projector_groups:
            raise ValueError(
                "`projector_learning_rate` needs the optimizer that this trainer creates, but another one was given. "
                "Leave it, or the `optimizer` of DeepSpeed's configuration, out."
            )
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # A model that came from an original checkpoint is written as one, but Trainer cannot read that back when it
        # resumes: it would go on with the weights at hand, https://github.com/huggingface/transformers/issues/48805
        model = self.accelerator.unwrap_model(self.model)
        conversions = getattr(model, "_weight_conversions", None)
        model._weight_conversions = []
        try:
            super()._save(output_dir, state_dict)
        finally:
            model._weight_conversions = conversions

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "pixel_values" in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with encode_blank_image(self.accelerator.unwrap_model(model)):
            return super().compute_loss(model, inputs, *args, **kwargs)


def modality_lengths_of(dataset: Any) -> list[int]:
    lengths = getattr(dataset, "modality_lengths", None)
    if lengths is None:
        raise ValueError(
            "With `group_by_modality_length` the data set must have `modality_lengths`, as a `ConversationDataset` "
            f"has, but it is a {type(dataset).__name__}."
        )
    return lengths


def set_projector_learning_rate(model: nn.Module, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Puts what lies between vision tower and text model into groups of its own, behind those of the rest."""
    connectors = {id(parameter) for name, parameter in model.named_parameters() if is_connector(name)}
    groups = []
    for own in ({}, {"lr": rate}):
        for group in optimizer.param_groups:
            parameters = [parameter for parameter in group["params"] if (id(parameter) in connectors) == bool(own)]
            if parameters:
                groups.append({**group, "params": parameters, **own})
    optimizer.param_groups[:] = groups


@contextlib.contextmanager
def encode_blank_image(model: nn.Module) -> Iterator[None]:
    """Lets a model encode a blank image in every forward, without any influence on the result."""
    part: Any = next((part for part in model.modules() if hasattr(part, "vision_tower")), None)
    if part is None:  # a text model
        yield
        return

    def add_nothing(language_model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        features = part.get_image_features(**blank_image(part), return_dict=True).pooler_output
        embeddings = kwargs["inputs_embeds"]
        # Where the features of an image enter, for sharded layers must reduce their gradients in the same order.
        nothing = 0 * sum(one.sum() for one in features)
        return args, {**kwargs, "inputs_embeds": embeddings + nothing.to(embeddings)}

    handle = part.language_model.register_forward_pre_hook(add_nothing, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def blank_image(model: Any) -> dict[str, torch.Tensor]:
    """The smallest inputs of an image."""
    config, parameter = model.config.vision_config, next(model.vision_tower.parameters())
    options = {"dtype": parameter.dtype, "device": parameter.device}
    if hasattr(model, "resampler"):
        patches = torch.zeros(1, config.num_channels * config.patch_size**2, **options)
        return {"pixel_values": patches, "image_grids": torch.tensor([[[0, 0], [0, 0], [1, 1]]])}
    return {"pixel_values": torch.zeros(1, config.num_channels, config.image_size, config.image_size, **options)}


__all__ = ["LlavaTrainer"]
