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
"""Which tensor of the original's checkpoint becomes which parameter.

The original has no folder of its own that `from_pretrained` could read: a file of trained tensors, a language model
and a vision tower lie apart. So these transforms serve the conversion script, which names all tensors as the file
does.

Source: names and layouts of the original code's files; the transforms are those of transformers' `core_model_loading`.
"""

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import (
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from ..llava_uhd.weight_mapping_llava_uhd import OriginalLayout
from .configuration_llava_mole import ATTENTION_PROJECTIONS, LlavaMoleTextConfig


LANGUAGE_MODEL = "llm_model.base_model.model."
VISION_TOWER = "vit.vision_tower."
TEXT_EMBEDDINGS = "in_adaptor.text_embed.weight"
PROJECTIONS = {"moe_gate": "gate_proj", "moe_up": "up_proj", "moe_down": "down_proj"}

# Reasons by pattern
UNUSED_ORIGINAL_WEIGHTS = {
    r"^in_adaptor\.text_embed\.weight$": "a second name of the text model's embeddings",
    r"embeddings\.position_ids$": "a constant that older checkpoints store",
    r"rotary_emb\.inv_freq$": "a constant that older checkpoints store",
}


def original_weight_mapping() -> list[WeightConverter | WeightRenaming]:
    """The transforms from the original's names and layout to the native ones.

    Returns:
        `list[WeightConverter | WeightRenaming]`: In the order in which they are tried.
    """
    text_model = "model.language_model."
    renamings = [
        WeightRenaming(r"^llm_model\.base_model\.model\.lm_head\.", "lm_head."),
        WeightRenaming(r"^llm_model\.base_model\.model\.model\.", text_model),
        # PEFT before 0.7 has no such name.
        WeightRenaming(r"_proj\.base_layer\.", "_proj."),
        WeightRenaming(r"\.mlp\.original_module\.", ".mlp."),
        WeightRenaming(r"\.mlp\.router\.", ".mlp.mole_router."),
        WeightRenaming(r"^vit\.vision_tower\.vision_model\.", "model.vision_tower."),
        WeightRenaming(r"^in_adaptor\.visual_start_token$", "model.image_boundaries.start"),
        WeightRenaming(r"^in_adaptor\.visual_end_token$", "model.image_boundaries.end"),
        WeightRenaming(r"^in_adaptor\.projector\.0\.", "model.multi_modal_projector.linear_1."),
        WeightRenaming(r"^in_adaptor\.projector\.2\.", "model.multi_modal_projector.linear_2."),
    ]
    return [*renamings, *_packed_adapters()]


def _packed_adapters() -> list[WeightConverter]:
    """Experts and the attention's adapters, which are packed as mixtures of one."""
    converters = []
    for original, native in PROJECTIONS.items():
        target = f"mlp.{native}.mole_experts.weight_"
        converters.append(WeightConverter(f"mlp.{original}.*.lora_A", f"{target}A", [MergeModulelist(dim=0)]))
        converters.append(
            WeightConverter(f"mlp.{original}.*.lora_B", f"{target}B", [MergeModulelist(dim=0), Transpose(1, 2)])
        )
    for name in ATTENTION_PROJECTIONS:
        lora, target = f"self_attn.{name}.lora_", f"self_attn.{name}.mole_experts.weight_"
        converters.append(WeightConverter(f"{lora}A.default.weight", f"{target}A", [MergeModulelist(dim=0)]))
        converters.append(
            WeightConverter(f"{lora}B.default.weight", f"{target}B", [MergeModulelist(dim=0), Transpose(1, 2)])
        )
    return converters


class NameTwice(ConversionOps):
    """Gives a tensor two names."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        tensors = next(iter(input_dict.values()))
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        return dict.fromkeys(target_patterns, tensor)


def original_layout(config: PreTrainedConfig) -> OriginalLayout:
    """The way back, from a native model to the layout of the original code.

    Where the attention's adapters are merged, the names are as if there were some: the original would not know others,
    and without adapters in the file it makes ones that add nothing.

    Args:
        config (`LlavaMoleConfig`): The model.

    Returns:
        `OriginalLayout`: The transforms, and what an original may hold beside the model's tensors.

    Raises:
        ValueError: if the original code has no such model.
    """
    text_type = config.text_config.model_type
    if text_type != LlavaMoleTextConfig.model_type or config.vision_encoding != "square":
        raise ValueError(
            f"The original LLaVA-MoLE has a text model as {LlavaMoleTextConfig.model_type!r} and square images, but "
            f"this model has {text_type!r} and {config.vision_encoding!r}: there is no layout to write it in."
        )
    renamings = [
        WeightRenaming(r"^lm_head\.", f"{LANGUAGE_MODEL}lm_head."),
        WeightRenaming(r"^model\.language_model\.", f"{LANGUAGE_MODEL}model."),
        WeightRenaming(r"^model\.vision_tower\.", f"{VISION_TOWER}vision_model."),
        WeightRenaming(r"^model\.image_boundaries\.start", "in_adaptor.visual_start_token"),
        WeightRenaming(r"^model\.image_boundaries\.end", "in_adaptor.visual_end_token"),
        WeightRenaming(r"^model\.multi_modal_projector\.linear_1\.", "in_adaptor.projector.0."),
        WeightRenaming(r"^model\.multi_modal_projector\.linear_2\.", "in_adaptor.projector.2."),
        WeightRenaming(r"\.mlp\.mole_router\.", ".mlp.router."),
        *(
            WeightRenaming(rf"\.mlp\.{name}\.(weight|bias)$", rf".mlp.original_module.{name}.\1")
            for name in PROJECTIONS.values()
        ),
        # Not that of the vision tower, `encoder.layers`
        *(
            WeightRenaming(
                rf"model\.layers\.(\d+\.self_attn\.{name})\.(?!mole_experts)", r"model.layers.\1.base_layer."
            )
            for name in ATTENTION_PROJECTIONS
        ),
    ]
    embeddings = f"{LANGUAGE_MODEL}model.embed_tokens.weight"
    transforms: list[WeightTransform] = [
        *renamings,
        WeightConverter(embeddings, [embeddings, TEXT_EMBEDDINGS], [NameTwice()]),
        *(converter.reverse_transform() for converter in _packed_adapters()),
    ]
    unused = {pattern: reason for pattern, reason in UNUSED_ORIGINAL_WEIGHTS.items() if "text_embed" not in pattern}
    return OriginalLayout(transforms, unused, entry="state_dict")


__all__ = ["UNUSED_ORIGINAL_WEIGHTS", "original_layout", "original_weight_mapping"]
