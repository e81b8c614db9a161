"""Makes the model that a first stage begins with: a language model, CLIP or SigLIP, and something new between them.

The parts keep their weights. What is between them is initialised at random, so set the seed before.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel, SiglipVisionModel
from transformers.generation import GenerationConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from llava_family import (
    LlavaMoleConfig,
    LlavaMoleForCausalLM,
    LlavaMoleImageProcessorPil,
    LlavaMoleProcessor,
    LlavaUhdConfig,
    LlavaUhdForConditionalGeneration,
    LlavaUhdImageProcessorPil,
    LlavaUhdProcessor,
    LlavaUhdVisionConfig,
    MoeLlavaConfig,
    MoeLlavaForCausalLM,
    MoeLlavaImageProcessorPil,
    MoeLlavaProcessor,
)
from llava_family.llava_uhd.modeling_llava_uhd import LlavaUhdVisionModel
from llava_family.training.upcycling import SPARSE_TEXT_CONFIGS


TOWERS = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}


@dataclass
class PartsArguments:
    """What a first stage starts from."""

    language_model: str | None = field(default=None, metadata={"help": "causal language model, with its tokenizer"})
    vision_tower: str | None = field(default=None, metadata={"help": "CLIP, or SigLIP for MoE-LLaVA"})


def compose_llava_uhd(
    parts: PartsArguments, num_queries: int = 144, num_heads: int | None = None, **options: Any
) -> tuple[Any, Any]:
    """LLaVA-UHD with a new resampler, and its processor.

    Args:
        parts (`PartsArguments`): Any causal language model, and CLIP.
        num_queries (`int`, *optional*, defaults to 144): Features of a view.
        num_heads (`int`, *optional*): Of the resampler; by default the text model's width divided by 128.
        options (*optional*): `dtype` and `attn_implementation`.

    Raises:
        ValueError: if a part is of a kind that does not fit.
    """
    text, tokenizer = load_text(parts, options)
    clip = read_vision_config(parts, ("clip_vision_model",))
    known = {name: getattr(clip, name) for name in LlavaUhdVisionConfig.__annotations__ if hasattr(clip, name)}
    vision_config = LlavaUhdVisionConfig(**known)
    tower = LlavaUhdVisionModel.from_pretrained(parts.vision_tower, config=vision_config, dtype=options.get("dtype"))
    image_processor = LlavaUhdImageProcessorPil(base_size=clip.image_size, patch_size=clip.patch_size)
    processor = LlavaUhdProcessor(image_processor, tokenizer, num_queries=num_queries)
    config = LlavaUhdConfig(
        text_config=text.config,
        vision_config=vision_config,
        num_queries=num_queries,
        resampler_num_attention_heads=num_heads,
        image_token_id=processor.image_token_id,
    )
    return compose(LlavaUhdForConditionalGeneration, config, text, tower, options), processor


def compose_moe_llava(parts: PartsArguments, **options: Any) -> tuple[Any, Any]:
    """MoE-LLaVA before it has experts, with a new projector, and its processor. See [`compose_llava_uhd`]."""
    text, tokenizer = load_text(parts, options)
    if text.config.model_type not in SPARSE_TEXT_CONFIGS:
        raise ValueError(
            f"The third stage makes experts of {', '.join(SPARSE_TEXT_CONFIGS)}, but {parts.language_model} is a "
            f"{text.config.model_type!r}."
        )
    vision_config = read_vision_config(parts, tuple(TOWERS))
    side = {"height": vision_config.image_size, "width": vision_config.image_size}
    num_patches = (vision_config.image_size // vision_config.patch_size) ** 2
    if vision_config.model_type == "siglip_vision_model":
        # The releases drop one patch of SigLIP, as if it were CLIP's class embedding. A new model need not.
        selection = "full"
        settings = {"size": side, "do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    else:
        selection = "default"
        settings = {"size": {"shortest_edge": vision_config.image_size}, "crop_size": side}
    image_processor = MoeLlavaImageProcessorPil(**settings)
    processor = MoeLlavaProcessor(image_processor, tokenizer, num_image_tokens=num_patches)
    config = MoeLlavaConfig(
        text_config=text.config,
        vision_config=vision_config,
        vision_feature_select_strategy=selection,
        image_token_id=processor.image_token_id,
    )
    return compose(MoeLlavaForCausalLM, config, text, load_tower(parts, vision_config, options), options), processor


def compose_llava_mole(parts: PartsArguments, **options: Any) -> tuple[Any, Any]:
    """LLaVA-MoLE before it has experts, with a new projector, and its processor. See [`compose_llava_uhd`]."""
    text, tokenizer = load_text(parts, options)
    if text.config.model_type != "llama":
        raise ValueError(
            f"The language model must be a 'llama', but {parts.language_model} is a {text.config.model_type!r}."
        )
    vision_config = read_vision_config(parts, ("clip_vision_model",))
    side = {"height": vision_config.image_size, "width": vision_config.image_size}
    image_processor = LlavaMoleImageProcessorPil(size={"shortest_edge": vision_config.image_size}, crop_size=side)
    # The learned start and end embeddings count.
    num_image_tokens = (vision_config.image_size // vision_config.patch_size) ** 2 + 2
    processor = LlavaMoleProcessor(image_processor, tokenizer, num_image_tokens=num_image_tokens)
    config = LlavaMoleConfig(
        text_config=text.config, vision_config=vision_config, image_token_id=processor.image_token_id
    )
    return compose(LlavaMoleForCausalLM, config, text, load_tower(parts, vision_config, options), options), processor


def load_text(parts: PartsArguments, options: dict[str, Any]) -> tuple[Any, Any]:
    """The language model, and its tokenizer, padding on the left for generation."""
    refuse_sharded_loading()
    text = AutoModelForCausalLM.from_pretrained(parts.language_model, dtype=options.get("dtype"))
    tokenizer = AutoTokenizer.from_pretrained(parts.language_model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return text, tokenizer


def read_vision_config(parts: PartsArguments, allowed: tuple[str, ...]) -> Any:
    """The configuration of the tower, also where the checkpoint has CLIP's or SigLIP's text model too."""
    config = AutoConfig.from_pretrained(parts.vision_tower)
    config = getattr(config, "vision_config", config)
    if config.model_type not in allowed:
        raise ValueError(
            f"The vision tower must be of {', '.join(allowed)}, but {parts.vision_tower} is a {config.model_type!r}."
        )
    return config


def load_tower(parts: PartsArguments, config: Any, options: dict[str, Any]) -> Any:
    """The vision tower alone."""
    return TOWERS[config.model_type].from_pretrained(parts.vision_tower, config=config, dtype=options.get("dtype"))


def compose(model_class: type, config: Any, text: Any, tower: Any, options: dict[str, Any]) -> Any:
    """The model of `config` with the weights of its parts.

    Raises:
        ValueError: if the parts have other weights than the model, beside what is between them.
    """
    tensors = {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    tensors |= {f"model.language_model.{name}": tensor for name, tensor in text.base_model.state_dict().items()}
    tensors["lm_head.weight"] = text.get_output_embeddings().weight.detach()
    model, loading = model_class.from_pretrained(
        None, config=config, state_dict=tensors, output_loading_info=True, **options
    )
    between = ("model.multi_modal_projector.", "model.resampler.", "model.image_boundaries.")
    wrong = [name for name in loading["missing_keys"] if not name.startswith(between)]
    wrong += [*loading["unexpected_keys"], *(name for name, *_ in loading["mismatched_keys"])]
    if wrong:
        raise ValueError(
            f"{type(text).__name__} and {type(tower).__name__} do not make a {model_class.__name__}: {len(wrong)} "
            f"weights differ, such as {sorted(wrong)[0]}."
        )
    # Of the rest, Vicuna's sampling settings are such that transformers refuses to save them.
    settings = {
        name: getattr(text.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    model.generation_config = GenerationConfig(**settings)
    return model


def refuse_sharded_loading() -> None:
    """ValueError under DeepSpeed's ZeRO-3: it splits every weight that is read, so parts have none to hand over."""
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "This stage makes its model of other models' weights, which DeepSpeed's ZeRO-3 splits as it reads them. "
            "Use ZeRO-2 or FSDP2."
        )


__all__ = [
    "PartsArguments",
    "compose_llava_mole",
    "compose_llava_uhd",
    "compose_moe_llava",
    "refuse_sharded_loading",
]
