"""Layers that a mixture of LoRA experts puts into a model, around the layers of `llava_mole`.

Source: PEFT's `BaseTunerLayer` and `lora.Linear`.
"""

from collections.abc import Sequence
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..llava_mole.layers_llava_mole import (
    MoleExperts,
    MoleRouter,
    Routing,
    TokenGroups,
    group_tokens,
    route_tokens,
)
from ..llava_mole.modeling_llava_mole import init_mole_weights
from .balance import STATE
from .config import MoleConfig


# Children of a feed-forward network: its linear layers, and its activation.
GATED_PROJECTIONS, GATED_ACTIVATION = ("gate_proj", "up_proj", "down_proj"), "act_fn"
PLAIN_PROJECTIONS, PLAIN_ACTIVATION = ("fc1", "fc2"), "activation_fn"


class MoleTunerLayer(BaseTunerLayer):
    """What holds the parts of several adapters, of which one at most is active."""

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter the active one, as in PEFT.

        Raises:
            ValueError: if several are given: a mixture of LoRA experts routes by the router of one adapter.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(
                f"One adapter can be active, but {list(adapter_names)} were given: a mixture of LoRA experts routes "
                "by the router of one adapter."
            )
        super().set_adapter(adapter_names, inference_mode=inference_mode)


class MoleTunerLinear(nn.Module, MoleTunerLayer):
    """A linear layer with the experts of every adapter: one expert is an ordinary LoRA adapter.

    Args:
        base_layer (`nn.Linear`): The layer that it stands for.
    """

    adapter_layer_names = ("mole_experts",)

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.mole_experts = nn.ModuleDict()
        self.merged_adapters: list[str] = []

    def add_adapter(self, adapter_name: str, config: MoleConfig, num_experts: int) -> None:
        """Adds new experts, which at first change nothing.

        Args:
            adapter_name (`str`): Name of their adapter.
            config (`MoleConfig`): Rank, scale and dropout.
            num_experts (`int`): How many; 1 in the attention.
        """
        experts = MoleExperts(
            self.in_features, self.out_features, num_experts, config.r, config.lora_alpha, config.lora_dropout
        )
        init_mole_weights(experts)
        self.mole_experts[adapter_name] = experts
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def active_name(self) -> str | None:
        """Name of the adapter that computes here.

        Returns:
            `str`: Of the adapter that is active and has experts here; None if there is none, or adapters are disabled.
        """
        active = self.active_adapters
        if self.disable_adapters or self.merged or not active or active[0] not in self.mole_experts:
            return None
        return active[0]

    def forward(
        self, hidden_states: torch.Tensor, weights: torch.Tensor | None = None, groups: TokenGroups | None = None
    ) -> torch.Tensor:
        """Computes the linear layer and adds what the active adapter's experts do; arguments are as in
        [`MoleExperts.forward`].

        Returns:
            `torch.FloatTensor` of shape `(..., out_features)`.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self.base_layer(hidden_states)
        name = self.active_name()
        return output if name is None else output + self.mole_experts[name](hidden_states, weights, groups)

    def delta_weight(self, adapter_name: str) -> torch.Tensor:
        """What the adapter's one expert adds to the weight.

        Args:
            adapter_name (`str`): Name of the adapter.

        Returns:
            `torch.FloatTensor` of shape `(out_features, in_features)`, float32.
        """
        experts = cast(MoleExperts, self.mole_experts[adapter_name])
        return experts.scaling * (experts.weight_B[0].float().T @ experts.weight_A[0].float())

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds one-expert adapters to the weight; the sum is computed in float32 and rounded once.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`): Whether to refuse a weight that is not finite.
            adapter_names (`list[str]`, *optional*): Which adapters; the active one by default.

        Raises:
            ValueError: if an adapter has several experts or, with `safe_merge`, makes a weight that is not finite; or
                if the weight is quantized.
        """
        weight = self.base_layer.weight
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.mole_experts:
                continue
            refuse_to_merge(name, cast(MoleExperts, self.mole_experts[name]).num_experts)
            if not weight.is_floating_point():
                raise ValueError(
                    f"Adapter {name!r} cannot be merged into a weight of dtype {weight.dtype}: load the base model "
                    "without quantization."
                )
            merged = (weight.float() + self.delta_weight(name).to(weight.device)).to(weight.dtype)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"Adapter {name!r} is broken: merged weights would not be finite.")
            weight.data = merged
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes merged adapters out of the weight again, up to rounding."""
        weight = self.base_layer.weight
        while self.merged_adapters:
            delta = self.delta_weight(self.merged_adapters.pop())
            weight.data = (weight.float() - delta.to(weight.device)).to(weight.dtype)


class MoleTunerRouter(nn.ModuleDict, MoleTunerLayer):
    """The routers of a feed-forward network, one for every adapter that has several experts.

    Args:
        base_layer (`nn.Linear`): The network's first linear layer, which tells device, dtype and width.
    """

    adapter_layer_names = ("routers",)
    other_param_names = ("routing", "scale_by_gate")

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        # PEFT asks every layer of a tuner for a base layer, to know device and dtype. This one is another's child.
        self.__dict__["base_layer"] = base_layer
        self.routing: dict[str, Routing] = {}
        self.scale_by_gate: dict[str, bool] = {}

    @property
    def routers(self) -> nn.ModuleDict:
        """This module itself, under the name by which PEFT looks for adapters' parts."""
        return self

    def add_adapter(self, adapter_name: str, config: MoleConfig) -> None:
        """Adds a new router.

        Args:
            adapter_name (`str`): Name of its adapter.
            config (`MoleConfig`): Number of experts, and how it routes.
        """
        router = MoleRouter(cast(nn.Linear, self.get_base_layer()).in_features, config.num_experts)
        init_mole_weights(router)
        self[adapter_name] = router
        self.routing[adapter_name], self.scale_by_gate[adapter_name] = config.routing, config.scale_by_gate
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, hidden_states: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """Routes every token.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(..., in_features)`): Input of the network.
            adapter_name (`str`): Whose router.

        Returns:
            `torch.FloatTensor` of shape `(..., num_experts)`, float32: Weights of the adapter's experts.
        """
        router = cast(MoleRouter, self[adapter_name])
        logits = router(hidden_states)
        if STATE.recording is not None:
            STATE.recording.append(adapter_name, logits, router.weight.requires_grad)
        return route_tokens(logits, self.routing[adapter_name], self.scale_by_gate[adapter_name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses to merge several experts; a router itself has nothing to merge.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`): Not looked at.
            adapter_names (`list[str]`, *optional*): Which adapters; the active one by default.

        Raises:
            ValueError: if an adapter has several experts.
        """
        for name in adapter_names or self.active_adapters:
            if name in self:
                refuse_to_merge(name, cast(MoleRouter, self[name]).out_features)

    def unmerge(self) -> None:
        """Does nothing, since nothing was merged."""
        pass  # nothing was merged


class MoleTunerMLP(nn.Module):
    """Stands for a feed-forward network, whose children it has under their names, and routes by its input.

    Args:
        mlp (`nn.Module`): The network: gated as Llama's, or plain as Phi's.

    Raises:
        TypeError: if it is of another shape.
    """

    act_fn: nn.Module
    activation_fn: nn.Module
    replaced: nn.Module

    def __init__(self, mlp: nn.Module):
        super().__init__()
        projections = mlp_projections(mlp)
        if projections is None:
            raise TypeError(f"{type(mlp).__name__} is no feed-forward network of a known shape.")
        self.is_gated = projections == GATED_PROJECTIONS
        # Not a child: what it has is here, and it comes back as it was when the tuner is unloaded.
        self.__dict__["replaced"] = mlp
        self.mole_router = MoleTunerRouter(getattr(mlp, projections[0]))
        for name in (*projections, GATED_ACTIVATION if self.is_gated else PLAIN_ACTIVATION):
            setattr(self, name, getattr(mlp, name))
        self.train(mlp.training)

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the network's linear layers."""
        return GATED_PROJECTIONS if self.is_gated else PLAIN_PROJECTIONS

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Routes every token by the active adapter's router and computes the network.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`): Input of the
                network.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`.
        """
        # The experts tell what is active, for PEFT may leave the router of a deleted adapter, see model.py.
        active = self._active()
        weights = groups = None
        if active is not None and active[0] in self.mole_router:
            name, experts = active
            weights = self.mole_router(hidden_states, name)
            if self.mole_router.routing[name] == "top1" and experts.can_group(hidden_states):
                groups = group_tokens(weights)
        if self.is_gated:
            gate = self.act_fn(self._project("gate_proj", hidden_states, weights, groups))
            inner = gate * self._project("up_proj", hidden_states, weights, groups)
            return self._project("down_proj", inner, weights, groups)
        inner = self.activation_fn(self._project("fc1", hidden_states, weights, groups))
        return self._project("fc2", inner, weights, groups)

    def _project(
        self, name: str, hidden_states: torch.Tensor, weights: torch.Tensor | None, groups: TokenGroups | None
    ) -> torch.Tensor:
        projection = getattr(self, name)
        if isinstance(projection, MoleTunerLinear):
            return projection(hidden_states, weights, groups)
        return projection(hidden_states)

    def _active(self) -> tuple[str, MoleExperts] | None:
        """The adapter that is active, and the first of its experts."""
        for layer in self.children():
            if isinstance(layer, MoleTunerLinear):
                name = layer.active_name()
                if name is not None:
                    return name, cast(MoleExperts, layer.mole_experts[name])
        return None

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Gives the network back that this one stands for; PEFT calls it.

        Args:
            merge (`bool`): Whether to merge adapters into its weights before.
            safe_merge (`bool`): As of [`MoleTunerLinear.merge`].
            adapter_names (`list[str]`, *optional*): As of [`MoleTunerLinear.merge`].

        Returns:
            `nn.Module`: The network, without adapters.

        Raises:
            ValueError: if an adapter cannot be merged.
        """
        for name in self.projections:
            projection = getattr(self, name)
            if isinstance(projection, MoleTunerLinear):
                if merge:
                    projection.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                projection = projection.get_base_layer()
            setattr(self.replaced, name, projection)
        self.replaced.training = self.training
        return self.replaced


def mlp_projections(mlp: nn.Module) -> tuple[str, ...] | None:
    """Names of a feed-forward network's linear layers; None if it is of another shape."""
    shapes = ((GATED_PROJECTIONS, GATED_ACTIVATION), (PLAIN_PROJECTIONS, PLAIN_ACTIVATION))
    for projections, activation in shapes:
        if has_linear_layers(mlp, projections) and hasattr(mlp, activation):
            return projections
    return None


def has_linear_layers(module: nn.Module, names: Sequence[str]) -> bool:
    return all(isinstance(getattr(module, name, None), (nn.Linear, MoleTunerLinear)) for name in names)


def refuse_to_merge(adapter_name: str, num_experts: int) -> None:
    """ValueError if an adapter has several experts."""
    if num_experts > 1:
        raise ValueError(
            f"Adapter {adapter_name!r} cannot be merged: which of its {num_experts} experts add to a token depends on "
            "the token, and one weight serves all. Use `unload()` to remove the adapter; only `num_experts=1` merges."
        )


__all__ = ["MoleTunerLayer", "MoleTunerLinear", "MoleTunerMLP", "MoleTunerRouter"]
