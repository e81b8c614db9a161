"""LLaVA research models as first-class transformers families.

Importing this package registers the families with transformers' Auto classes; nothing heavy is imported before the
first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .auto import register_on_first_use


__version__ = "0.1.0"

_MODULES = {
    "inspection.routing": ("RoutingRecorder",),
    "llava_mole.configuration_llava_mole": ("LlavaMoleConfig", "LlavaMoleTextConfig"),
    "llava_mole.image_processing_llava_mole": ("LlavaMoleImageProcessor",),
    "llava_mole.image_processing_pil_llava_mole": ("LlavaMoleImageProcessorPil",),
    "llava_mole.layers_llava_mole": ("MoleLinear", "MoleMLP"),
    "llava_mole.modeling_llava_mole": (
        "LlavaMoleForCausalLM",
        "LlavaMoleModel",
        "LlavaMolePreTrainedModel",
        "LlavaMoleTextModel",
    ),
    "llava_mole.processing_llava_mole": ("LlavaMoleProcessor",),
    "llava_uhd.configuration_llava_uhd": ("LlavaUhdConfig", "LlavaUhdVisionConfig"),
    "llava_uhd.image_processing_llava_uhd": ("LlavaUhdImageProcessor",),
    "llava_uhd.image_processing_pil_llava_uhd": ("LlavaUhdImageProcessorPil",),
    "llava_uhd.modeling_llava_uhd": (
        "LlavaUhdForConditionalGeneration",
        "LlavaUhdModel",
        "LlavaUhdPreTrainedModel",
        "LlavaUhdVisionModel",
    ),
    "llava_uhd.processing_llava_uhd": ("LlavaUhdProcessor",),
    "llava_uhd.slicing_llava_uhd": ("SlicePlan", "plan_slices"),
    "mole": ("MoleConfig", "get_mole_model", "mole_from_lora_adapters"),
    "moe_llava.configuration_moe_llava": (
        "MoeLlavaConfig",
        "MoeLlavaLlamaConfig",
        "MoeLlavaMistralConfig",
        "MoeLlavaPhiConfig",
        "MoeLlavaQwen2Config",
        "MoeLlavaStableLmConfig",
    ),
    "moe_llava.image_processing_moe_llava": ("MoeLlavaImageProcessor",),
    "moe_llava.image_processing_pil_moe_llava": ("MoeLlavaImageProcessorPil",),
    "moe_llava.modeling_moe_llava": (
        "MoeLlavaForCausalLM",
        "MoeLlavaLlamaModel",
        "MoeLlavaMistralModel",
        "MoeLlavaModel",
        "MoeLlavaPhiModel",
        "MoeLlavaPreTrainedModel",
        "MoeLlavaQwen2Model",
        "MoeLlavaStableLmModel",
    ),
    "moe_llava.processing_moe_llava": ("MoeLlavaProcessor",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]

if TYPE_CHECKING:
    from .inspection.routing import RoutingRecorder
    from .llava_mole.configuration_llava_mole import LlavaMoleConfig, LlavaMoleTextConfig
    from .llava_mole.image_processing_llava_mole import LlavaMoleImageProcessor
    from .llava_mole.image_processing_pil_llava_mole import LlavaMoleImageProcessorPil
    from .llava_mole.layers_llava_mole import MoleLinear, MoleMLP
    from .llava_mole.modeling_llava_mole import (
        LlavaMoleForCausalLM,
        LlavaMoleModel,
        LlavaMolePreTrainedModel,
        LlavaMoleTextModel,
    )
    from .llava_mole.processing_llava_mole import LlavaMoleProcessor
    from .llava_uhd.configuration_llava_uhd import LlavaUhdConfig, LlavaUhdVisionConfig
    from .llava_uhd.image_processing_llava_uhd import LlavaUhdImageProcessor
    from .llava_uhd.image_processing_pil_llava_uhd import LlavaUhdImageProcessorPil
    from .llava_uhd.modeling_llava_uhd import (
        LlavaUhdForConditionalGeneration,
        LlavaUhdModel,
        LlavaUhdPreTrainedModel,
        LlavaUhdVisionModel,
    )
    from .llava_uhd.processing_llava_uhd import LlavaUhdProcessor
    from .llava_uhd.slicing_llava_uhd import SlicePlan, plan_slices
    from .moe_llava.configuration_moe_llava import (
        MoeLlavaConfig,
        MoeLlavaLlamaConfig,
        MoeLlavaMistralConfig,
        MoeLlavaPhiConfig,
        MoeLlavaQwen2Config,
        MoeLlavaStableLmConfig,
    )
    from .moe_llava.image_processing_moe_llava import MoeLlavaImageProcessor
    from .moe_llava.image_processing_pil_moe_llava import MoeLlavaImageProcessorPil
    from .moe_llava.modeling_moe_llava import (
        MoeLlavaForCausalLM,
        MoeLlavaLlamaModel,
        MoeLlavaMistralModel,
        MoeLlavaModel,
        MoeLlavaPhiModel,
        MoeLlavaPreTrainedModel,
        MoeLlavaQwen2Model,
        MoeLlavaStableLmModel,
    )
    from .moe_llava.processing_moe_llava import MoeLlavaProcessor
    from .mole import MoleConfig, get_mole_model, mole_from_lora_adapters


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_on_first_use()
