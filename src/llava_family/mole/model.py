"""Mixture of LoRA experts (LLaVA-MoLE, arXiv 2401.16160) as a PEFT method for any text model of a known shape.

Where PEFT's extension points do not fit:
- `register_peft_method` takes members of the enumeration `PeftType` only, which cannot be extended from outside
  (https://github.com/huggingface/peft/pull/2282, https://github.com/huggingface/peft/issues/2273). The tables are
  keyed by strings, so an enumeration of our own stands in them.
- Tuners choose their targets by name alone, so a name would match the vision tower's layers too. Here the targets are
  found beforehand, in the text model.
- A tuner's layer wraps one base layer that has one weight. Routing belongs to a feed-forward network, which has
  several and keeps their names, so the router is the tuner's layer, and the network is replaced around it.
- `delete_adapter` recognises the parts of a tuner's layer by a prefix in their names, which the router, a layer, has.
- Tuners know no loss of their own: hooks of the base model add it, see `balance.py`.
"""

from typing import Any, cast

import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .balance import add_balance_loss, start_recording
from .config import MoleConfig, MolePeftType
from .layer import MoleTunerLayer, MoleTunerLinear, MoleTunerMLP, MoleTunerRouter, refuse_to_merge
from .targets import Targets, find_targets, wrap_mlps


class MoleModel(BaseTuner):
    """Puts a mixture of LoRA experts into a model; PEFT builds it, see [`get_mole_model`].

    Source: LLaVA-MoLE's section 3; PEFT's `LoraModel`.
    """

    prefix: str = "mole_"
    tuner_layer_cls = MoleTunerLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: MoleConfig, model_config: dict) -> MoleConfig:
        return peft_config  # None stays None: the same configuration serves models of several shapes

    def _prepare_model(self, peft_config: MoleConfig, model: nn.Module) -> None:
        targets = find_targets(model, peft_config)
        if not any(isinstance(module, MoleTunerLayer) for module in model.modules()):
            # PEFT freezes the base model at the first injection, which it tells by there being no tuner's layers yet.
            model.requires_grad_(False)
        wrap_mlps(model, targets.mlps)
        self._target_names = self._names(targets, peft_config)

    @staticmethod
    def _names(targets: Targets, config: MoleConfig) -> frozenset[str]:
        # With one expert there is nothing to route, and a router would have no gradient.
        routed = targets.mlps if config.num_experts > 1 else ()
        return frozenset((*routed, *targets.projections, *targets.attention))

    def _check_target_module_exists(self, peft_config: MoleConfig, key: str) -> bool:  # type: ignore[override]
        return key in self._target_names

    def _create_and_replace(
        self,
        peft_config: MoleConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, MoleTunerMLP):
            target.mole_router.add_adapter(adapter_name, peft_config)
            return
        if not isinstance(target, MoleTunerLinear):
            adapted = MoleTunerLinear(cast(nn.Linear, target))
            self._replace_module(parent, target_name, adapted, target)
            target = adapted
        num_experts = peft_config.num_experts if isinstance(parent, MoleTunerMLP) else 1
        target.add_adapter(adapter_name, peft_config, num_experts)

    def _post_injection_hook(self, model: nn.Module, config: MoleConfig, adapter_name: str) -> None:
        self._handles = []
        # transformers' own `add_adapter` builds a tuner for every adapter of a model.
        if add_balance_loss not in model._forward_hooks.values():
            self._handles = [
                model.register_forward_pre_hook(start_recording, with_kwargs=True),
                model.register_forward_hook(add_balance_loss, with_kwargs=True, always_call=True),
            ]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, MoleTunerMLP):
            setattr(parent, child_name, new_module)  # a network has no weight that PEFT could hand over
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        # PEFT passes over layers whose own name has the prefix in it.
        for module in self.model.modules():
            if isinstance(module, MoleTunerRouter):
                module.delete_adapter(adapter_name)
        if was_active:
            # Every layer chose among its own, and those without a router are no choice of a router.
            self.set_adapter(self.active_adapters)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: MoleConfig,  # type: ignore[override]
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # Routers of adapters that transformers' own `delete_adapter` deleted: it passes over them as well.
        return {name: value for name, value in selected.items() if f".{adapter_name}." in name}

    def _refuse_to_merge(self, adapter_names: list[str] | None) -> None:
        for name in adapter_names or self.active_adapters:
            refuse_to_merge(name, self.peft_config[name].num_experts)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Adds a one-expert adapter to the weights, until `unmerge_adapter`.

        Raises:
            ValueError: if an adapter has several experts; nothing is merged then.
        """
        self._refuse_to_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._refuse_to_merge(adapter_names)
        model = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        for handle in self._handles:
            handle.remove()
        return model


def get_mole_model(
    model: PreTrainedModel, config: MoleConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """Adapts the text model of a model by a mixture of LoRA experts, and freezes all else.

    The feed-forward networks' linear layers get `num_experts` LoRA experts and one router, attention projections an
    ordinary LoRA adapter. At first nothing is added to the model's outputs. With labels, the loss of the adapted model
    contains the balance loss, which is also in `outputs.balance_loss`, not yet weighted.

    Saved adapters have the names of [`LlavaMoleTextModel`]: `layers.0.mlp.gate_proj.mole_experts.weight_A`.

    Source: LLaVA-MoLE's section 3; PEFT's `get_peft_model`.

    Args:
        model (`PreTrainedModel`): A causal language model whose feed-forward networks are shaped like those of Llama,
            Mistral, Qwen2 and StableLM, or of Phi; or a vision-language model around one. Changed in place.
        config (`MoleConfig`): What to adapt, and how.
        adapter_name (`str`, *optional*, defaults to `"default"`): Under which PEFT knows the adapter.
        kwargs (*optional*): Further arguments of `peft.get_peft_model`, such as `autocast_adapter_dtype=False`.

    Returns:
        `PeftModel`: Around `model`.

    Raises:
        TypeError: if `model` is no transformers model, or `config` no [`MoleConfig`].
        ValueError: if the model has no such feed-forward networks, is adapted already, or lacks what `config` names.
    """
    if not isinstance(config, MoleConfig):
        raise TypeError(f"`config` must be a MoleConfig, but is a {type(config).__name__}.")
    return get_peft_model(model, config, adapter_name=adapter_name, **kwargs)


def register_with_peft() -> None:
    """Enters the method into PEFT's tables, under the name `"MOLE"`.

    Source: PEFT's `register_peft_method`, which takes PEFT's own types alone.

    Raises:
        RuntimeError: if PEFT has a method of this name that is not ours.
    """
    peft_type = cast(PeftType, MolePeftType.MOLE)
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if registered is not None and registered.__module__ != MoleConfig.__module__:
        raise RuntimeError(
            f"PEFT has a method called {MolePeftType.MOLE.value} already, {registered}: use a version of PEFT without "
            "it to load adapters of this package."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = MoleConfig
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = MoleModel
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = MoleModel.prefix


__all__ = ["MoleModel", "get_mole_model", "register_with_peft"]
