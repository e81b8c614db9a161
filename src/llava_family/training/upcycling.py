"""Makes a sparse model of a dense one.

The experts begin as exact copies of the dense feed-forward network, so the sparse model begins where the dense one
ended (paper, section 3.3: "MoE-tuning"). The router begins at random, as in the released code.
"""

import copy
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from ..llava_uhd.modeling_llava_uhd import LlavaUhdForConditionalGeneration
from ..moe_llava.configuration_moe_llava import (
    MoeLlavaConfig,
    MoeLlavaLlamaConfig,
    MoeLlavaMistralConfig,
    MoeLlavaPhiConfig,
    MoeLlavaQwen2Config,
    MoeLlavaStableLmConfig,
)
from ..moe_llava.modeling_moe_llava import TEXT_MODELS, MoeLlavaForCausalLM


# Model type of a dense text model -> configuration of the sparse one with the same backbone
SPARSE_TEXT_CONFIGS = {
    "llama": MoeLlavaLlamaConfig,
    "mistral": MoeLlavaMistralConfig,
    "phi": MoeLlavaPhiConfig,
    "qwen2": MoeLlavaQwen2Config,
    "stablelm": MoeLlavaStableLmConfig,
}
VISION_TOWERS = ("clip_vision_model", "siglip_vision_model")

# Packed tensor of the experts -> tensors of the dense network that stand in it one behind the other
GATED_EXPERTS = {"gate_up_proj": ("gate_proj.weight", "up_proj.weight"), "down_proj": ("down_proj.weight",)}
PHI_EXPERTS = {
    "up_proj": ("fc1.weight",),
    "up_proj_bias": ("fc1.bias",),
    "down_proj": ("fc2.weight",),
    "down_proj_bias": ("fc2.bias",),
}


def upcycle(
    model: PreTrainedModel,
    num_experts: int = 4,
    top_k: int = 2,
    moe_layers: str | list[int] = "sparse",
    **sparse_config: Any,
) -> MoeLlavaForCausalLM:
    """A MoE-LLaVA model whose experts are copies of a dense model's feed-forward networks.

    The new model computes what the dense one does until it is trained: the weights of two equal experts add up to 1.
    With `top_k=1` the original does not normalise the weight of the one expert, so there the outputs change at once;
    they also do where a `capacity_factor` drops tokens.

    The new model takes over all tensors of the dense one but the experts' without copying them. Do not use `model`
    afterwards: training either model changes both. To keep the dense model, upcycle `copy.deepcopy(model)`. Beyond the
    dense model, memory holds `num_experts` copies of the feed-forward networks of the sparse layers, on the device and
    in the dtype of these.

    Source: MoE-LLaVA's section 3.3; `initialize_moe_modules` of the original code.

    Args:
        model (`MoeLlavaForCausalLM`, `LlavaForConditionalGeneration` or `LlavaUhdForConditionalGeneration`):
            The dense model: MoE-LLaVA's second stage (`moe_layers=[]`), in-tree LLaVA with a CLIP or SigLIP tower, or
            LLaVA-UHD, which becomes `vision_encoding="slices"`. The text model must be Llama, Mistral, Phi, Qwen2 or
            StableLM.
        num_experts (`int`, *optional*, defaults to 4): Experts of every sparse layer.
        top_k (`int`, *optional*, defaults to 2): Experts that every token is sent to, 1 or 2.
        moe_layers (`str` or `list[int]`, *optional*, defaults to `"sparse"`): See [`select_moe_layers`].
        sparse_config (*optional*): More of the sparse text configuration, such as `capacity_factor=1.5`.

    Returns:
        `MoeLlavaForCausalLM`: The sparse model.

    Raises:
        TypeError: if `model` is of another class, or `sparse_config` names nothing that the configuration has.
        ValueError: if the model has no sparse counterpart.
        RuntimeError: if the dense model lacks a buffer, which only a bug can do.
    """
    if sum(isinstance(model, known) for known in _CONFIG_BUILDERS) != 1:
        raise TypeError(
            f"`model` must be one of {[known.__name__ for known in _CONFIG_BUILDERS]}, but is a "
            f"{type(model).__name__}."
        )
    _check_weights(model)
    fields = {"num_experts": num_experts, "num_experts_per_tok": top_k, "moe_layers": moe_layers, **sparse_config}
    build_config = next(build for known, build in _CONFIG_BUILDERS.items() if isinstance(model, known))
    config = build_config(model.config, fields)

    implementations = {
        name: getattr(model.config, name)._attn_implementation for name in ("text_config", "vision_config")
    }
    with torch.device("meta"):
        sparse = MoeLlavaForCausalLM._from_config(config, attn_implementation=implementations)
    tensors = dict(model.state_dict())
    _pack_experts(tensors, sparse)
    _add_missing_projector_biases(tensors, sparse)
    sparse.load_state_dict(tensors, strict=True, assign=True)
    _take_buffers(sparse, model)
    sparse.tie_weights()

    config.dtype = model.dtype
    if getattr(model, "generation_config", None) is not None:
        sparse.generation_config = copy.deepcopy(model.generation_config)
    return sparse.train(model.training)


def _check_weights(model: PreTrainedModel) -> None:
    if getattr(model, "is_quantized", False):
        raise ValueError("A quantized model cannot be upcycled: load it in full precision and quantize afterwards.")
    offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if offloaded:
        raise ValueError(
            f"All weights must be in memory, but {len(offloaded)} are not, such as {offloaded[0]}. Load the model "
            "without offloading."
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"All weights must be on one device, but are on {devices}. Upcycle on the CPU, save, and load in parts."
        )


def _moe_llava_config(config: Any, fields: dict[str, Any]) -> MoeLlavaConfig:
    if getattr(config.text_config, "moe_layers", None):
        raise ValueError(f"`model` must be dense, but has experts in the layers {config.text_config.moe_layers}.")
    text_config = _sparse_text_config(config.text_config, fields)
    own = {key: value for key, value in _plain(config).items() if key != "text_config"}
    return MoeLlavaConfig(**{**own, "text_config": text_config, "vision_config": copy.deepcopy(config.vision_config)})


def _llava_config(config: Any, fields: dict[str, Any]) -> MoeLlavaConfig:
    if config.vision_config.model_type not in VISION_TOWERS:
        raise ValueError(
            f"The vision tower must be one of {list(VISION_TOWERS)}, but is {config.vision_config.model_type!r}."
        )
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            "Image features must be one hidden state of the vision tower, but `vision_feature_layer` is "
            f"{config.vision_feature_layer}."
        )
    return MoeLlavaConfig(
        text_config=_sparse_text_config(config.text_config, fields),
        vision_config=copy.deepcopy(config.vision_config),
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        projector_hidden_act=config.projector_hidden_act,
        # Often inside of the vocabulary, where LLaVA-1.5 has 32000 of 32064.
        image_token_id=config.image_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def _llava_uhd_config(config: Any, fields: dict[str, Any]) -> MoeLlavaConfig:
    kept = (
        "resampler_type",
        "num_queries",
        "resampler_num_attention_heads",
        "resampler_layer_norm_eps",
        "image_token_id",
        "tie_word_embeddings",
        "initializer_range",
    )
    return MoeLlavaConfig(
        text_config=_sparse_text_config(config.text_config, fields),
        vision_config=copy.deepcopy(config.vision_config),
        vision_encoding="slices",
        vision_feature_layer=config.vision_config.vision_feature_layer,
        **{name: getattr(config, name) for name in kept},
    )


_CONFIG_BUILDERS = {
    MoeLlavaForCausalLM: _moe_llava_config,
    LlavaForConditionalGeneration: _llava_config,
    LlavaUhdForConditionalGeneration: _llava_uhd_config,
}


def _sparse_text_config(text_config: PreTrainedConfig, fields: dict[str, Any]) -> PreTrainedConfig:
    model_type = text_config.model_type
    config_class = TEXT_MODELS[model_type].config_class if model_type in TEXT_MODELS else None
    config_class = config_class or SPARSE_TEXT_CONFIGS.get(model_type)
    if config_class is None:
        raise ValueError(f"The text model must be one of {list(SPARSE_TEXT_CONFIGS)}, but is {model_type!r}.")
    if getattr(text_config, "mlp_bias", False):
        raise ValueError("Experts have no biases, but this text model's feed-forward networks do (`mlp_bias`).")
    unknown = [name for name in fields if name not in config_class.__dataclass_fields__]
    if unknown:
        raise TypeError(f"A sparse text configuration has no {unknown}.")
    return config_class(**{**_plain(text_config), **fields})


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """The values that build an equal configuration of another class."""
    dropped = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map")
    return {key: value for key, value in config.to_dict().items() if key not in dropped}


@torch.no_grad()
def _pack_experts(tensors: dict[str, torch.Tensor], sparse: MoeLlavaForCausalLM) -> None:
    """Replaces the feed-forward networks of the sparse layers in `tensors` by experts and routers."""
    text_model = sparse.model.language_model
    config = text_model.config
    packing = PHI_EXPERTS if isinstance(config, MoeLlavaPhiConfig) else GATED_EXPERTS
    for layer in config.moe_layers:
        prefix = f"model.language_model.layers.{layer}.mlp."
        for packed_name, names in packing.items():
            parts = [tensors[prefix + name] for name in names]
            # The copies are written one by one into their place, for there may be no memory for a second set.
            packed = parts[0].new_empty(config.num_experts, sum(map(len, parts)), *parts[0].shape[1:])
            for expert in packed:
                torch.cat(parts, out=expert)
            tensors[f"{prefix}experts.{packed_name}"] = packed
        reference = tensors[prefix + next(iter(packing.values()))[0]]
        block = text_model.layers[layer].mlp
        for name, module in (("gate", block.gate), ("coefficient", getattr(block, "coefficient", None))):
            if module is not None:
                fresh = module.to_empty(device=reference.device).to(reference.dtype)
                text_model._init_weights(fresh)
                tensors.update({f"{prefix}{name}.{key}": value for key, value in fresh.state_dict().items()})
        for name in [name for names in packing.values() for name in names]:
            dense = tensors.pop(prefix + name)
            if config.use_residual:
                tensors[f"{prefix}residual_mlp.{name}"] = dense


def _add_missing_projector_biases(tensors: dict[str, torch.Tensor], sparse: MoeLlavaForCausalLM) -> None:
    """Zeros for a source with `multimodal_projector_bias=False`: MoE-LLaVA's projector always has biases."""
    for name, parameter in sparse.named_parameters():
        if ".multi_modal_projector." in name and name not in tensors:
            weight = tensors[name.removesuffix("bias") + "weight"]
            tensors[name] = weight.new_zeros(parameter.shape)


def _take_buffers(sparse: MoeLlavaForCausalLM, model: PreTrainedModel) -> None:
    """Buffers that no checkpoint has, such as rotary frequencies; computed ones, so they are on meta yet."""
    buffers = dict(model.named_buffers())
    for name, buffer in list(sparse.named_buffers()):
        if buffer.is_meta:
            parent, _, own_name = name.rpartition(".")
            if name not in buffers:
                raise RuntimeError(f"The dense model has no buffer {name!r}.")
            sparse.get_submodule(parent)._buffers[own_name] = buffers[name]


__all__ = ["upcycle"]
