# Copyright 2026 The llava-family authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Layers of a mixture of LoRA experts (MoLE, arXiv 2401.16160), as the model family and the tuner use them.

Design choices:
- The ranks of all experts stand side by side. One matrix product goes down to them, the routing weights each expert's
  ranks, one product goes up: exact for every routing, without a loop, a gather or a look at any value.
- That costs as much as one LoRA of `num_experts * r` ranks. Under top-1 routing, where this is much and tokens are
  many, they are sorted by expert and grouped matrix products compute the chosen ranks alone.
- The router scores in float32, as transformers' routers do. The original scores in the model's dtype.

Source: LLaVA-MoLE's section 3 and the original code; PEFT's `lora.Linear` for one expert.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional
from transformers.utils import is_torch_distributed_available
from transformers.utils.import_utils import is_torchdynamo_compiling


if is_torch_distributed_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer


Routing = Literal["top1", "dense"]
BalanceLoss = Literal["pooled", "per_layer"]

# Ranks beyond those of one expert, and tokens, from which on grouped products pay; see benchmarks/mole_step.py.
GROUPED_EXTRA_RANKS = 32
GROUPED_TOKENS = 256


@dataclass(frozen=True)
class TokenGroups:
    """Tokens sorted by expert: `order` sorts them, `inverse` undoes it, `offsets` are the groups' ends (int32)."""

    order: torch.Tensor
    inverse: torch.Tensor
    offsets: torch.Tensor


def route_tokens(router_logits: torch.Tensor, routing: Routing, scale_by_gate: bool = False) -> torch.Tensor:
    """The weight of every expert for every token.

    Args:
        router_logits (`torch.FloatTensor` of shape `(..., num_experts)`, float32): Scores of the router.
        routing (`"top1"` or `"dense"`): `"top1"` gives the most probable expert the weight 1 and the others 0 (the
            paper), `"dense"` gives every expert its probability (the released inference).
        scale_by_gate (`bool`, *optional*, defaults to `False`): Under `"top1"`, weights the chosen expert by its
            probability, so that the router learns from the task too.

    Returns:
        `torch.FloatTensor` of the shape of `router_logits`, float32.
    """
    probabilities = router_logits.softmax(dim=-1)
    if routing == "dense":
        return probabilities
    # Of the probabilities, not of the logits: those that round to equal ones go to the first, as in the original.
    chosen = functional.one_hot(probabilities.argmax(dim=-1), router_logits.shape[-1])
    return chosen * probabilities if scale_by_gate else chosen.to(probabilities.dtype)


def group_tokens(weights: torch.Tensor) -> TokenGroups:
    """Sorts tokens by their one expert.

    Args:
        weights (`torch.FloatTensor` of shape `(..., num_experts)`): Those of [`route_tokens`] under `"top1"`, which
            are zero for all experts but one.

    Returns:
        `TokenGroups`: The order, its inverse, and where the groups end.
    """
    weights = weights.detach().flatten(0, -2)
    experts = weights.argmax(dim=-1)
    order = experts.argsort()
    num_tokens = functional.one_hot(experts, weights.shape[-1]).sum(dim=0)
    return TokenGroups(order, order.argsort(), num_tokens.cumsum(dim=0).to(torch.int32))


def balance_loss(
    router_logits: tuple[torch.Tensor, ...],
    attention_mask: torch.Tensor | None = None,
    kind: BalanceLoss = "pooled",
) -> torch.Tensor:
    """Loss that is least where all experts get equally many tokens. Gradients flow through the probabilities alone.

    With `P` the mean probability of an expert and `F` its share of tokens:

    - `"pooled"`, the released code's: `P` and `F` are means over all tokens *and layers* of a sample; the sum over
      experts of `P * F`, averaged over samples. `1 / num_experts` if balanced, about 1 if collapsed.
    - `"per_layer"`: `P` and `F` are means over all tokens of the batch; `num_experts` times the sum of `P * F`,
      averaged over layers. 1 if balanced, and no layer can make up for another.

    Args:
        router_logits (`tuple[torch.FloatTensor, ...]`): For every layer one of shape `(batch_size, sequence_length,
            num_experts)`.
        attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): 0 where a token is
            padding and does not count.
        kind (`"pooled"` or `"per_layer"`, *optional*, defaults to `"pooled"`): Which of the two.

    Returns:
        `torch.FloatTensor`: A float32 scalar.
    """
    device, num_experts = router_logits[0].device, router_logits[0].shape[-1]
    probabilities = torch.stack([logits.to(device).float() for logits in router_logits]).softmax(dim=-1)
    chosen = functional.one_hot(probabilities.argmax(dim=-1), num_experts).float()  # (layers, batch, length, experts)
    counted = torch.ones_like(probabilities[0, :, :, 0])
    if attention_mask is not None:
        counted = attention_mask.to(device, torch.float32)
    over = (0, 2) if kind == "pooled" else (1, 2)
    # Shares, not sums: nothing grows with the number of tokens.
    weights = counted[None, :, :, None].expand(len(router_logits), -1, -1, 1)
    weights = weights / weights.sum(dim=over, keepdim=True).clamp(min=1.0)
    products = ((weights * probabilities).sum(dim=over) * (weights * chosen).sum(dim=over)).sum(dim=-1)
    return products.mean() * (1 if kind == "pooled" else num_experts)


class MoleRouter(nn.Linear):
    """Scores the experts of one layer in float32, under autocast too: `(..., in_features)` to `(..., num_experts)`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scores the experts for every token.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(..., in_features)`): Input of the layer.

        Returns:
            `torch.FloatTensor` of shape `(..., num_experts)`, float32: The logits.
        """
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(hidden_states.device.type, enabled=False):
            return functional.linear(hidden_states.float(), self.weight.float(), bias)


def check_routers_learn(router_logits: Iterable[torch.Tensor], are_trained: Iterable[bool]) -> None:
    """Refuses training that would leave routers as they are.

    Args:
        router_logits (`Iterable[torch.FloatTensor]`): Of every router, of any shape.
        are_trained (`Iterable[bool]`): Whether each router's parameters are trained.

    Raises:
        ValueError: if a router that is trained gets no gradient from a balance loss of its logits.
    """
    if not torch.is_grad_enabled():
        return
    if any(trained and not logits.requires_grad for logits, trained in zip(router_logits, are_trained, strict=True)):
        raise ValueError(
            "The routers would not learn from the balance loss: reentrant gradient checkpointing keeps no graph of "
            "what a layer computes beside its output. Enable it with "
            '`gradient_checkpointing_kwargs={"use_reentrant": False}`, or freeze the routers.'
        )


class MoleExperts(nn.Module):
    """The LoRA experts of one linear layer: what they add to its output.

    Args:
        in_features, out_features (`int`): Those of the linear layer.
        num_experts (`int`): With 1, and without weights, this is plain LoRA.
        r (`int`): Rank of every expert.
        lora_alpha (`float`): The experts' output is scaled by `lora_alpha / r`.
        lora_dropout (`float`): Of their input. One mask for all experts: a token of top-1 routing sees one of them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.num_experts, self.r = num_experts, r
        self.scaling = lora_alpha / r
        # PEFT's `lora_B` is transposed here, so that the concatenation of all experts is a view.
        self.weight_A = nn.Parameter(torch.empty(num_experts, r, in_features))
        self.weight_B = nn.Parameter(torch.zeros(num_experts, r, out_features))
        self.dropout = nn.Dropout(lora_dropout)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_experts={self.num_experts}, "
            f"r={self.r}, scaling={self.scaling:g}"
        )

    def forward(
        self, hidden_states: torch.Tensor, weights: torch.Tensor | None = None, groups: TokenGroups | None = None
    ) -> torch.Tensor:
        """
        Computes what the experts add to the linear layer's output.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(..., in_features)`): Input of the linear layer.
            weights (`torch.FloatTensor` of shape `(..., num_experts)`, *optional*): Of every expert; 1 by default.
            groups (`TokenGroups`, *optional*): Of weights that choose one expert each.

        Returns:
            `torch.FloatTensor` of shape `(..., out_features)`, in the dtype of `hidden_states`.
        """
        inputs = self.dropout(hidden_states).to(self.weight_A.dtype)
        if groups is not None and weights is not None:
            return self._grouped(inputs, weights, groups).to(hidden_states.dtype)
        ranks = functional.linear(inputs, self.weight_A.flatten(0, 1))  # (..., num_experts * r)
        if weights is None:
            ranks = ranks * self.scaling
        else:
            scaled = (weights * self.scaling).to(ranks.dtype).unsqueeze(-1)
            # Filled, not multiplied away: what overflows in an expert that was not chosen times 0 would be NaN.
            ranks = ranks.unflatten(-1, (self.num_experts, self.r)).masked_fill(scaled == 0, 0.0)
            ranks = (ranks * scaled).flatten(-2)
        return (ranks @ self.weight_B.flatten(0, 1)).to(hidden_states.dtype)

    def _grouped(self, inputs: torch.Tensor, weights: torch.Tensor, groups: TokenGroups) -> torch.Tensor:
        rows = inputs.flatten(0, -2).index_select(0, groups.order)
        scale = (weights.flatten(0, -2).sum(dim=-1, keepdim=True) * self.scaling).index_select(0, groups.order)
        ranks = functional.grouped_mm(rows, self.weight_A.transpose(1, 2), offs=groups.offsets)
        ranks = ranks * scale.to(ranks.dtype)
        outputs = functional.grouped_mm(ranks, self.weight_B, offs=groups.offsets)
        return outputs.index_select(0, groups.inverse).unflatten(0, inputs.shape[:-1])

    def can_group(self, hidden_states: torch.Tensor) -> bool:
        """Whether grouped products can compute, and pay for, so many tokens.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(..., in_features)`): Input of the linear layer.
        """
        extra_ranks = (self.num_experts - 1) * self.r
        if extra_ranks < GROUPED_EXTRA_RANKS or hidden_states.shape[:-1].numel() < GROUPED_TOKENS:
            return False
        dtype, device = self.weight_A.dtype, self.weight_A.device
        # Rows of 16 bytes are what the kernel wants.
        aligned = all(size * dtype.itemsize % 16 == 0 for size in (self.in_features, self.out_features, self.r))
        if not aligned or not hasattr(functional, "grouped_mm") or torch.is_autocast_enabled(device.type):
            return False
        if is_torchdynamo_compiling() and dtype != torch.bfloat16:
            return False  # https://github.com/pytorch/pytorch/issues/172440
        return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


class MoleLinear(nn.Linear):
    """A linear layer with LoRA experts; its own weight has its usual name, so dense checkpoints load into it.

    Args:
        in_features, out_features (`int`): As of `nn.Linear`.
        bias (`bool`, *optional*, defaults to `True`): Whether the linear layer has one; experts have none.
        num_experts (`int`, *optional*, defaults to 1): With 1 this is plain LoRA, without a router.
        r (`int`, *optional*, defaults to 8): Rank of every expert.
        lora_alpha (`float`, *optional*, defaults to 8): The experts' output is scaled by `lora_alpha / r`.
        lora_dropout (`float`, *optional*, defaults to 0.0): Dropout of the experts' input in training.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        num_experts: int = 1,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
    ):
        super().__init__(in_features, out_features, bias=bias)
        self.mole_experts = MoleExperts(in_features, out_features, num_experts, r, lora_alpha, lora_dropout)

    def forward(  # type: ignore[override]  # routed where there is a router
        self, hidden_states: torch.Tensor, weights: torch.Tensor | None = None, groups: TokenGroups | None = None
    ) -> torch.Tensor:
        """Computes the linear layer and adds what its experts do; arguments are as in [`MoleExperts.forward`].

        Returns:
            `torch.FloatTensor` of shape `(..., out_features)`.
        """
        return super().forward(hidden_states) + self.mole_experts(hidden_states, weights, groups)


class MoleMLP(nn.Module):
    """A gated feed-forward network whose linear layers have experts, routed once, by its input, for all three.

    Args:
        config (`LlavaMoleTextConfig`): Sizes, and settings of the experts.
        act_fn (`nn.Module`): Activation of the gate.
    """

    def __init__(self, config, act_fn: nn.Module):
        super().__init__()
        self.routing, self.scale_by_gate = config.routing, config.scale_by_gate
        self.mole_router = MoleRouter(config.hidden_size, config.num_experts)
        self.gate_proj = self._linear(config, config.hidden_size, config.intermediate_size)
        self.up_proj = self._linear(config, config.hidden_size, config.intermediate_size)
        self.down_proj = self._linear(config, config.intermediate_size, config.hidden_size)
        self.act_fn = act_fn

    @staticmethod
    def _linear(config, in_features: int, out_features: int) -> MoleLinear:
        return MoleLinear(
            in_features,
            out_features,
            config.mlp_bias,
            config.num_experts,
            config.r,
            config.lora_alpha,
            config.lora_dropout,
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Routes every token and computes the network.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`): Input of the
                network.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`.
        """
        weights = route_tokens(self.mole_router(hidden_states), self.routing, self.scale_by_gate)
        groups = None
        if self.routing == "top1" and self.gate_proj.mole_experts.can_group(hidden_states):
            groups = group_tokens(weights)
        gate = self.act_fn(self.gate_proj(hidden_states, weights, groups))
        return self.down_proj(gate * self.up_proj(hidden_states, weights, groups), weights, groups)


if is_torch_distributed_available():

    class MoleExpertsParallel(TensorParallelLayer):
        """Shards the experts of a linear layer that is sharded itself, `"colwise"` or `"rowwise"`.

        Under `"colwise"` every rank has some of the outputs and all ranks; under `"rowwise"` every rank adds its part
        of the inputs to all outputs. Either way one of the two factors, and the routing's weights, are the same on all
        ranks, and every rank knows a part of their gradient.
        """

        def __init__(self, sharded: str, replicated: str):
            self.sharded, self.replicated = sharded, replicated

        def should_use_local_tensors(self, module):
            return True

        def shard_param(self, module, param, mesh):
            if param == self.sharded:
                parameter = module._parameters[param]
                sharded = distribute_tensor(parameter, mesh, [Shard(-1)], src_data_rank=None)
                module._parameters[param] = nn.Parameter(sharded, requires_grad=parameter.requires_grad)

        def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
            hidden_states, *routing = args
            if isinstance(hidden_states, DTensor):
                complete = self.sharded == "weight_A"
                hidden_states = hidden_states.to_local(grad_placements=None if complete else [Partial()])
            if routing and routing[0] is not None:
                routing[0] = self._known_in_part(routing[0], mesh)
            return (hidden_states, *routing), kwargs

        @contextmanager
        def context_around_forward(self, module, mesh):
            replicated = module._parameters[self.replicated]
            with super().context_around_forward(module, mesh):
                module._parameters[self.replicated] = self._known_in_part(replicated, mesh)
                try:
                    yield
                finally:
                    module._parameters[self.replicated] = replicated

        def transform_output_post_forward(self, module, output, mesh):
            # What the linear layer's own output is: transformers takes the local path without gradients.
            if not torch.is_grad_enabled():
                return output
            if self.sharded == "weight_A":
                return DTensor.from_local(output, mesh, [Partial()], run_check=False)
            return self._from_local_last_dim_shard(output, mesh, module.out_features)

        @staticmethod
        def _known_in_part(tensor: torch.Tensor, mesh) -> torch.Tensor:
            """`tensor`, equal on all ranks, whose gradient is the sum of theirs."""
            if not (torch.is_grad_enabled() and tensor.requires_grad):
                return tensor
            replicated = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
            return replicated.to_local(grad_placements=[Partial()])

    ALL_PARALLEL_STYLES.register("mole_colwise", MoleExpertsParallel(sharded="weight_B", replicated="weight_A"))
    ALL_PARALLEL_STYLES.register("mole_rowwise", MoleExpertsParallel(sharded="weight_A", replicated="weight_B"))


__all__ = [
    "MoleExperts",
    "MoleLinear",
    "MoleMLP",
    "MoleRouter",
    "balance_loss",
    "check_routers_learn",
    "group_tokens",
    "route_tokens",
]
