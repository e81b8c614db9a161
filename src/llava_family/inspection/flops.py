"""FLOPs of encoding one image and prefilling a text model with it, counted on models that have no weights.

`count_flops` builds the real model on the meta device and runs it under torch's `FlopCounterMode`, so it counts the
operations of the implementation and not those of a formula. It counts as the LLaVA-UHD paper's comparison seems to:

- One multiply-add is 2 FLOPs. Matrix products and convolutions count, among them the products that RoI-align the
  released resampler's regions. Norms, activations, softmax and the interpolation of position tables do not.
- The sequence holds the image's positions alone, with LLaVA-UHD's separators and LLaVA-NeXT's newlines: no text.
- Prefill only, batch size 1, with logits for every position. Generation needs those of the last position alone, so
  `lm_head` is a part of its own.
- Attention counts as two full products, `4 * length**2 * hidden_size` FLOPs per layer. It is not halved for causality.
- Every implementation is charged what it runs: in-tree CLIP runs all 24 layers although LLaVA uses the output of the
  23rd, LLaVA-UHD's vision tower ends with the layer that it uses.

Source: the comparison of FLOPs in the LLaVA-UHD paper; torch's `FlopCounterMode`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ..llava_uhd.configuration_llava_uhd import LlavaUhdConfig
from ..llava_uhd.image_processing_pil_llava_uhd import image_grid
from ..llava_uhd.modeling_llava_uhd import LlavaUhdForConditionalGeneration
from ..llava_uhd.slicing_llava_uhd import SlicePlan, plan_slices


# Configurations of Vicuna 1.5, with the vocabulary that it has without the ports' padding
VICUNA: dict[str, dict[str, Any]] = {
    name: {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "intermediate_size": intermediate_size,
    }
    for name, hidden_size, num_layers, num_heads, intermediate_size in (
        ("7B", 4096, 32, 32, 11008),
        ("13B", 5120, 40, 40, 13824),
    )
}

MODEL_CLASSES = {
    LlavaUhdConfig: LlavaUhdForConditionalGeneration,
    LlavaConfig: LlavaForConditionalGeneration,
    LlavaNextConfig: LlavaNextForConditionalGeneration,
}


@dataclass(frozen=True)
class FlopReport:
    """Cost of one image in FLOPs, see the module's docstring for what counts.

    Attributes:
        num_views (`int`): Images that the vision tower sees: slices and overview, tiles and base image, or 1.
        num_tokens (`int`): Positions that the image takes in the text model's sequence.
        vision_tower (`int`): FLOPs of the vision tower over all views.
        projector (`int`): FLOPs between vision tower and text model: resampler or multi-modal projector.
        language_model (`int`): FLOPs of the text model's layers over `num_tokens` positions.
        lm_head (`int`): FLOPs of the logits of `num_tokens` positions.
    """

    num_views: int
    num_tokens: int
    vision_tower: int
    projector: int
    language_model: int
    lm_head: int

    @property
    def total(self) -> int:
        """FLOPs of all parts together."""
        return self.vision_tower + self.projector + self.language_model + self.lm_head


def count_flops(config: PreTrainedConfig, width: int, height: int) -> FlopReport:
    """Counts the FLOPs of one `width` x `height` image, from the vision tower to the logits of its last position.

    The image is given to the vision tower and its positions to the text model in two steps, because merging features
    into a sequence looks at values, which meta tensors have not. No FLOPs are lost between them. For the same reason
    text models whose computation depends on values, such as loops over experts, cannot be counted.

    Args:
        config (`LlavaUhdConfig`, `LlavaConfig` or `LlavaNextConfig`): The model. It is left unchanged.
        width (`int`): Width of the image in pixels, before any resizing by the image processor.
        height (`int`): Height of the image in pixels.

    Returns:
        `FlopReport`: FLOPs by part, and the number of views and tokens.

    Raises:
        TypeError: if `config` is of another family.
        ValueError: if the size is no image size.
        RuntimeError: if FLOPs lie outside of the parts, which would be missing in the report.
    """
    if width < 1 or height < 1:
        raise ValueError(f"`width` and `height` must be positive, but are {width} and {height}.")
    return _count(config, image_inputs(config, width, height))


def count_layerwise(config: PreTrainedConfig, image: "ImageInputs") -> FlopReport:
    """Counts as `count_flops` does, in a tenth of the time, on a model of few layers, of which the first counts often.

    It is exact where all layers of the vision tower are alike, and all of the text model, as those of CLIP, SigLIP and
    Llama are.

    Args:
        config (`LlavaUhdConfig`, `LlavaConfig` or `LlavaNextConfig`): The model. It is left unchanged. Its features
            must be those of the vision tower's last layer but one.
        image ([`ImageInputs`]): Shapes of what an image is for this model.

    Returns:
        `FlopReport`: FLOPs by part, and the number of views and tokens.

    Raises:
        TypeError: if `config` is of another family.
    """
    shallow = copy.deepcopy(config)
    shallow.vision_config.num_hidden_layers, shallow.text_config.num_hidden_layers = 2, 1
    repeats = {
        "vision_tower": config.vision_config.num_hidden_layers - 2,
        "language_model": config.text_config.num_hidden_layers - 1,
    }
    return _count(shallow, image, repeats)


def _count(config: PreTrainedConfig, image: "ImageInputs", repeats: dict[str, int] | None = None) -> FlopReport:
    """The count, with the first layer of some parts as often again as `repeats` says."""
    model = _build_on_meta(config)
    num_tokens = 0

    def prefill():
        nonlocal num_tokens
        image_outputs = model.get_image_features(**image.arguments, return_dict=True)
        num_tokens = len(image_outputs.pooler_output[0]) + image.num_separators
        inputs_embeds = torch.empty(1, num_tokens, config.text_config.hidden_size, device="meta", dtype=model.dtype)
        # Without a cache transformers searches `position_ids` for packed sequences, which meta tensors cannot answer.
        model(inputs_embeds=inputs_embeds, use_cache=True)

    projector = model.model.resampler if isinstance(config, LlavaUhdConfig) else model.model.multi_modal_projector
    parts = {
        "vision_tower": model.model.vision_tower,
        "projector": projector,
        "language_model": model.model.language_model,
        "lm_head": model.lm_head,
    }
    counts = _count_by_part(parts, prefill, repeats or {})
    return FlopReport(num_views=image.num_views, num_tokens=num_tokens, **counts)


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    model_class = MODEL_CLASSES.get(type(config))
    if model_class is None:
        supported = ", ".join(config_class.__name__ for config_class in MODEL_CLASSES)
        raise TypeError(f"FLOPs can be counted for {supported}, but the configuration is a {type(config).__name__}.")
    return model_class


def _build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    model_class = _model_class(config)
    with torch.device("meta"):
        # SDPA falls apart into two counted matrix products on meta. Other kernels may have no FLOP formula: torch has
        # none for SDPA on the CPU. The model writes its choice into the configuration, hence the copy.
        return model_class._from_config(copy.deepcopy(config), attn_implementation="sdpa").eval()


class ImageInputs(NamedTuple):
    """What an image is for a model.

    Attributes:
        arguments (`dict[str, torch.Tensor]`): Of `get_image_features`: `pixel_values` on meta in float32, of shape
            `(num_patches, channels * patch_size**2)` or, of in-tree models, `(1, [num_views,] channels, size, size)`;
            and int64 grids of shape `(1, 3, 2)` or sizes of shape `(1, 2)` on the CPU, since models read them.
        num_views (`int`): Images that the vision tower sees.
        num_separators (`int`): Positions of the image in the text model's sequence that are no features.
    """

    arguments: dict[str, torch.Tensor]
    num_views: int
    num_separators: int = 0


def image_inputs(config: PreTrainedConfig, width: int, height: int) -> ImageInputs:
    """What an image of `width` x `height` pixels is for a model.

    Args:
        config (`LlavaUhdConfig`, `LlavaConfig` or `LlavaNextConfig`): The model.
        width (`int`): Width of the image in pixels.
        height (`int`): Height of the image in pixels.

    Returns:
        `ImageInputs`: Shapes, without an image.

    Raises:
        TypeError: if `config` is of another family.
    """
    _model_class(config)
    vision_config = config.vision_config
    if isinstance(config, LlavaUhdConfig):
        base_size, patch_size = vision_config.image_size, vision_config.patch_size
        return sliced_inputs(config, plan_slices(width, height, base_size=base_size, patch_size=patch_size))
    view_shape = (vision_config.num_channels, vision_config.image_size, vision_config.image_size)
    if isinstance(config, LlavaConfig):
        return ImageInputs({"pixel_values": torch.empty(1, *view_shape, device="meta")}, num_views=1)
    num_views = image_size_to_num_patches((height, width), config.image_grid_pinpoints, vision_config.image_size)
    arguments = {
        "pixel_values": torch.empty(1, num_views, *view_shape, device="meta"),
        "image_sizes": torch.tensor([[height, width]]),
    }
    return ImageInputs(arguments, num_views)


def sliced_inputs(config: Any, plan: SlicePlan) -> ImageInputs:
    """What an image that is cut as `plan` says is for a LLaVA-UHD model.

    Args:
        config (`LlavaUhdConfig`): The model.
        plan (`SlicePlan`): The views of the image.

    Returns:
        `ImageInputs`: Shapes, without an image.
    """
    pixels = config.vision_config.num_channels * plan.patch_size**2
    arguments = {
        "pixel_values": torch.empty(plan.num_patches, pixels, device="meta"),
        "image_grids": torch.tensor([image_grid(plan)]),
    }
    return ImageInputs(arguments, plan.num_views, num_separators=plan.num_slices)


def _count_by_part(parts: dict[str, nn.Module], run: Callable[[], Any], repeats: dict[str, int]) -> dict[str, int]:
    """FLOPs of every part while `run` runs, and those of the first layer of some parts as often again as asked.

    Raises:
        RuntimeError: if `run` spends FLOPs outside of the parts, which would be missing in the report.
    """
    counter = FlopCounterMode(display=False)
    counts, layer_counts = dict.fromkeys(parts, 0), dict.fromkeys(repeats, 0)

    def watch(module: nn.Module, counts: dict[str, int], name: str) -> None:
        def add(sign: int) -> None:
            counts[name] += sign * counter.get_total_flops()

        module.register_forward_pre_hook(lambda *_: add(-1))
        module.register_forward_hook(lambda *_: add(1))

    for name, part in parts.items():
        watch(part, counts, name)
    for name in layer_counts:
        layers = next(module for module in parts[name].modules() if isinstance(module, nn.ModuleList))
        watch(layers[0], layer_counts, name)
    with torch.no_grad(), counter:
        run()
    if sum(counts.values()) != counter.get_total_flops():
        raise RuntimeError(f"{counter.get_total_flops() - sum(counts.values())} FLOPs lie outside of {list(parts)}.")
    for name, times in repeats.items():
        counts[name] += times * layer_counts[name]
    return counts


__all__ = ["VICUNA", "FlopReport", "ImageInputs", "count_flops", "count_layerwise", "image_inputs", "sliced_inputs"]
