"""Adds the balance loss to the loss of a model that [`get_mole_model`] adapted.

Design choices:
- The loss needs the logits of all routers, and a base model knows of none. So hooks of the base model itself open a
  recording before its forward and close it behind: they run under `PeftModel` with every task type, under
  transformers' own `add_adapter`, and under `generate`, where no labels are and nothing is recorded.
- The recording is the thread's own. Routing never is: it goes from the router to the experts as an argument.
"""

import inspect
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from ..llava_mole.layers_llava_mole import balance_loss, check_routers_learn
from ..llava_uhd.shared_llava_uhd import add_balance_loss as add_to_loss
from ..llava_uhd.shared_llava_uhd import counted_tokens


@dataclass
class MoleCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of an adapted model that was given labels.

    A class of its own because what wraps a model, such as DistributedDataParallel, takes outputs apart and builds them
    again, and keeps the declared fields only.

    Source: transformers' `CausalLMOutputWithPast`.

    Attributes:
        loss (`torch.FloatTensor` of shape `()`): That of the base model plus `balance_loss_coef * balance_loss`.
        balance_loss (`torch.FloatTensor` of shape `()`, float32): Of the tuner's experts, not yet weighted.
        aux_loss (`torch.FloatTensor` of shape `()`, *optional*): What the base model has under this name.
        router_logits (`tuple[torch.FloatTensor, ...]`, *optional*): What the base model has under this name, of shape
            `(tokens, num_experts)` for every sparse layer of MoE-LLaVA.
        image_hidden_states (`torch.FloatTensor` of shape `(num_features, hidden_size)`, *optional*): What the base
            model has under this name.
    """

    balance_loss: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: Any = None


class RouterRecording:
    """Logits of the routers of one forward pass, `(batch_size, sequence_length, num_experts)` each."""

    def __init__(self) -> None:
        self.adapter_name = ""
        self.logits: list[torch.Tensor] = []
        self.are_trained: list[bool] = []

    def append(self, adapter_name: str, logits: torch.Tensor, is_trained: bool) -> None:
        self.adapter_name = adapter_name
        self.logits.append(logits)
        self.are_trained.append(is_trained)


class _ThreadState(threading.local):
    recording: RouterRecording | None = None


# Not a ContextVar, which torch.compile cannot trace.
STATE = _ThreadState()


def start_recording(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook."""
    labels = _arguments(model, args, kwargs).get("labels")
    STATE.recording = None if labels is None else RouterRecording()


def add_balance_loss(model: Any, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
    """Forward hook. It is also called, without outputs, when the forward raised.

    Raises:
        ValueError: if gradients would not reach the routers.
    """
    recording, STATE.recording = STATE.recording, None
    if outputs is None or recording is None or not recording.logits:
        return None
    check_routers_learn(recording.logits, recording.are_trained)
    arguments = _arguments(model, args, kwargs)
    config = model.peft_config[recording.adapter_name]
    counted = counted_tokens(arguments.get("attention_mask"), recording.logits[0].shape[1])
    unweighted = balance_loss(tuple(recording.logits), counted, config.balance_loss)

    loss = outputs[0]
    unweighted = unweighted.to(loss.device)
    num_items = arguments.get("num_items_in_batch")
    loss = add_to_loss(loss, unweighted, config.balance_loss_coef, arguments["labels"], num_items)
    if isinstance(outputs, tuple):
        return (loss, *outputs[1:])
    return _with_balance_loss(outputs, loss, unweighted, model.training)


def _with_balance_loss(
    outputs: ModelOutput, loss: torch.Tensor, unweighted: torch.Tensor, training: bool
) -> ModelOutput:
    if all(name in MoleCausalLMOutputWithPast.__dataclass_fields__ for name in outputs):
        outputs = MoleCausalLMOutputWithPast(**outputs)
    outputs["loss"] = loss
    if training:
        outputs["balance_loss"] = unweighted
    else:
        # An attribute, not an entry: Trainer hands all entries to `compute_metrics`, where logits alone are expected.
        object.__setattr__(outputs, "balance_loss", unweighted)
    return outputs


def _arguments(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward by their names."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}


__all__ = ["MoleCausalLMOutputWithPast"]
