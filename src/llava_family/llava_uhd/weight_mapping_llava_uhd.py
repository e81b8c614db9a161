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
"""Which tensor of an original checkpoint becomes which parameter; shared by direct loading and conversion.

Source: names and layouts of the original code's checkpoints; the transforms are those of transformers'
`core_model_loading`.
"""

from typing import NamedTuple

from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import Chunk, Transpose, WeightConverter, WeightRenaming, WeightTransform

from .configuration_llava_uhd import LlavaUhdVisionConfig


class OriginalLayout(NamedTuple):
    """How a family's original code keeps the weights of one model.

    Attributes:
        transforms (`list[WeightTransform]`): From native tensors to the original's.
        unused (`dict[str, str]`): Why an original may have tensors without a parameter, by regular expression.
        entry (`str`, *optional*): Where the original is one torch file, the key of its tensors. None for a folder.
    """

    transforms: list[WeightTransform]
    unused: dict[str, str]
    entry: str | None = None


def original_weight_mapping() -> list[WeightConverter | WeightRenaming]:
    """The transforms from an original checkpoint to a native one; on a native one none of them matches.

    Returns:
        `list[WeightConverter | WeightRenaming]`: In the order in which they are tried.
    """
    return [
        WeightRenaming(r"^model\.embed_tokens\.", "model.language_model.embed_tokens."),
        WeightRenaming(r"^model\.layers\.", "model.language_model.layers."),
        WeightRenaming(r"^model\.norm\.", "model.language_model.norm."),
        WeightRenaming(r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
        WeightRenaming(r"^model\.mm_projector\.attn\.out_proj\.", "model.resampler.attention.out_proj."),
        WeightRenaming(r"^model\.mm_projector\.kv_proj\.", "model.resampler.kv_proj."),
        WeightRenaming(r"^model\.mm_projector\.ln_", "model.resampler.ln_"),
        WeightRenaming(r"^model\.mm_projector\.pos_embed", "model.resampler.pos_embed"),
        WeightRenaming(r"^model\.mm_projector\.query", "model.resampler.query"),
        # The original multiplies by `proj` from the right; a Linear keeps the transpose.
        WeightConverter("mm_projector.proj", "resampler.output_proj.weight", [Transpose(0, 1)]),
        *(
            WeightConverter(
                f"mm_projector.attn.in_proj_{kind}",
                [f"resampler.attention.{name}_proj.{kind}" for name in "qkv"],
                [Chunk(dim=0)],
            )
            for kind in ("weight", "bias")
        ),
    ]


def unused_original_weights(config: LlavaUhdVisionConfig) -> dict[str, str]:
    """Why tensors of an original vision tower have no parameter.

    Args:
        config (`LlavaUhdVisionConfig`): The vision tower, which ends with its `vision_feature_layer`.

    Returns:
        `dict[str, str]`: Reason by regular expression, for names in either format.
    """
    unused_layers = range(config.num_feature_layers, config.num_hidden_layers)
    above = "the image features are taken below it"
    return {
        r"post_layernorm\.": above,
        **{rf"encoder\.layers\.{layer}\.": above for layer in unused_layers},
        r"embeddings\.position_ids$": "a constant that older CLIP checkpoints store",
    }


def original_layout(config: PreTrainedConfig) -> OriginalLayout:
    """The way back, from a native model to the layout of the original code.

    Args:
        config (`LlavaUhdConfig`): The model.

    Returns:
        `OriginalLayout`: The transforms, and what an original may hold beside the model's tensors.

    Raises:
        ValueError: if the original code has no such model.
    """
    if config.text_config.model_type != "llama" or config.resampler_type != "spatial":
        raise ValueError(
            "The original LLaVA-UHD has a `llama` text model and a `spatial` resampler, but this model has "
            f"{config.text_config.model_type!r} and {config.resampler_type!r}: there is no layout to write it in."
        )
    transforms = [transform.reverse_transform() for transform in original_weight_mapping()]
    return OriginalLayout(transforms, unused_original_weights(config.vision_config))


__all__ = ["OriginalLayout", "original_layout", "original_weight_mapping", "unused_original_weights"]
