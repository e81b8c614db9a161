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

One list serves all backbones: Qwen-1's names are first brought to those of the others, and on a native checkpoint none
of the patterns matches but those of the vocabulary, which then stays as it is.

Source: names and layouts of the original code's checkpoints; the transforms are those of transformers'
`core_model_loading`.
"""

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from ..llava_uhd.weight_mapping_llava_uhd import OriginalLayout
from .configuration_moe_llava import ORIGINAL_BACKBONES


class KeepVocabulary(ConversionOps):
    """Keeps the rows of the text model's vocabulary.

    Releases have rows for more tokens than their tokenizers, never trained, and the original cuts them off when it
    loads. There is no way back from a model alone, and models are always saved natively.
    """

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, config=None, **kwargs):
        """Cuts one tensor off behind the vocabulary; transformers calls it.

        Args:
            input_dict (`dict[str, torch.Tensor | list[torch.Tensor]]`): The one tensor, of shape `(rows, hidden_size)`
                in any dtype, by its pattern.
            source_patterns (`list[str]`): Patterns of the originals' names.
            target_patterns (`list[str]`): The new name.
            config (`PreTrainedConfig`): The model, whose text model has `vocab_size`.

        Returns:
            `dict[str, torch.Tensor]`: A view of shape `(vocab_size, hidden_size)` by its new name.
        """
        tensors = next(iter(input_dict.values()))
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        return {target_patterns[0]: tensor[: config.get_text_config().vocab_size]}


EXPERTS = "mlp.deepspeed_moe.experts.deepspeed_experts.*."

# Reasons by pattern
UNUSED_ORIGINAL_WEIGHTS = {
    r"embeddings\.position_ids$": "a constant that older checkpoints store",
    r"rotary_emb\.inv_freq$": "a constant that older checkpoints store",
}


def original_weight_mapping() -> list[WeightConverter | WeightRenaming]:
    """The transforms from an original checkpoint, sparse or dense, to a native one.

    Returns:
        `list[WeightConverter | WeightRenaming]`: In the order in which they are tried.
    """
    return [
        *_renamings(),
        # Without the prefix that a model without a head does not have.
        WeightConverter(
            "language_model.embed_tokens.weight", "language_model.embed_tokens.weight", [KeepVocabulary()]
        ),
        WeightConverter("lm_head.weight", "lm_head.weight", [KeepVocabulary()]),
        *_packed_attention("self_attn"),
        *_packed_experts("gate_proj", "up_proj", "down_proj"),
        *_packed_phi_experts(),
    ]


def _packed_attention(attention: str) -> list[WeightConverter]:
    """Qwen-1's one projection to the three of `attention`."""
    return [
        WeightConverter(
            f"{attention}.c_attn.{kind}", [f"{attention}.{name}_proj.{kind}" for name in "qkv"], [Chunk(dim=0)]
        )
        for kind in ("weight", "bias")
    ]


def _packed_experts(gate: str, up: str, down: str) -> list[WeightConverter]:
    return [
        WeightConverter(
            [f"{EXPERTS}{gate}.weight", f"{EXPERTS}{up}.weight"],
            "mlp.experts.gate_up_proj",
            [MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(f"{EXPERTS}{down}.weight", "mlp.experts.down_proj", [MergeModulelist(dim=0)]),
    ]


def _packed_phi_experts() -> list[WeightConverter]:
    """Phi's network has no gate, but biases."""
    return [
        WeightConverter(f"{EXPERTS}fc1.weight", "mlp.experts.up_proj", [MergeModulelist(dim=0)]),
        WeightConverter(f"{EXPERTS}fc1.bias", "mlp.experts.up_proj_bias", [MergeModulelist(dim=0)]),
        WeightConverter(f"{EXPERTS}fc2.weight", "mlp.experts.down_proj", [MergeModulelist(dim=0)]),
        WeightConverter(f"{EXPERTS}fc2.bias", "mlp.experts.down_proj_bias", [MergeModulelist(dim=0)]),
    ]


def _renamings() -> list[WeightRenaming]:
    """All that keeps a tensor as it is; those of Qwen-1 first, since later patterns build on its renamed keys."""
    layers = "model.language_model.layers."
    return [
        WeightRenaming(r"^transformer\.wte\.", "model.language_model.embed_tokens."),
        WeightRenaming(r"^model\.embed_tokens\.", "model.language_model.embed_tokens."),
        WeightRenaming(r"^transformer\.h\.", layers),
        WeightRenaming(r"\.ln_1\.", ".input_layernorm."),
        WeightRenaming(r"\.ln_2\.", ".post_attention_layernorm."),
        WeightRenaming(r"^transformer\.ln_f\.", "model.language_model.norm."),
        WeightRenaming(r"\.attn\.c_attn\.", ".self_attn.c_attn."),
        WeightRenaming(r"\.attn\.c_proj\.", ".self_attn.o_proj."),
        # c_proj(w1(x) * silu(w2(x))): the gate is w2.
        WeightRenaming(r"\.w2\.", ".gate_proj."),
        WeightRenaming(r"\.w1\.", ".up_proj."),
        WeightRenaming(r"\.c_proj\.", ".down_proj."),
        WeightRenaming(r"^model\.layers\.", layers),
        WeightRenaming(r"^model\.norm\.", "model.language_model.norm."),
        WeightRenaming(r"^model\.final_layernorm\.", "model.language_model.final_layernorm."),
        WeightRenaming(r"\.mlp\.deepspeed_moe\.gate\.wg\.", ".mlp.gate."),
        WeightRenaming(r"\.mlp\.mlp\.", ".mlp.residual_mlp."),
        *(
            renaming
            for prefix in ("model", "transformer")
            for renaming in (
                WeightRenaming(rf"^{prefix}\.image_tower\.image_tower\.vision_model\.", "model.vision_tower."),
                WeightRenaming(
                    rf"^{prefix}\.mm_projector\.image_spatial_proj\.0\.", "model.multi_modal_projector.linear_1."
                ),
                WeightRenaming(
                    rf"^{prefix}\.mm_projector\.image_spatial_proj\.2\.", "model.multi_modal_projector.linear_2."
                ),
            )
        ),
    ]


def original_layout(config: PreTrainedConfig) -> OriginalLayout:
    """The way back, from a native model to the layout of the original code.

    The way there serves all backbones at once, so it cannot be reversed: each has its own names to go back to.

    Args:
        config (`MoeLlavaConfig`): The model.

    Returns:
        `OriginalLayout`: The transforms, and what an original may hold beside the model's tensors.

    Raises:
        ValueError: if the original code has no such model.
    """
    text_type = config.text_config.model_type
    if text_type not in ORIGINAL_BACKBONES.values() or config.vision_encoding != "square":
        raise ValueError(
            f"The original MoE-LLaVA has text models as {', '.join(ORIGINAL_BACKBONES.values())} and square images, "
            f"but this model has {text_type!r} and {config.vision_encoding!r}: there is no layout to write it in."
        )
    qwen = text_type == ORIGINAL_BACKBONES["qwen"]
    base = "transformer." if qwen else "model."
    renamings = [
        WeightRenaming(r"^model\.vision_tower\.", f"{base}image_tower.image_tower.vision_model."),
        WeightRenaming(r"^model\.multi_modal_projector\.linear_1\.", f"{base}mm_projector.image_spatial_proj.0."),
        WeightRenaming(r"^model\.multi_modal_projector\.linear_2\.", f"{base}mm_projector.image_spatial_proj.2."),
        *(_qwen_names() if qwen else [WeightRenaming(r"^model\.language_model\.", base)]),
        WeightRenaming(r"\.mlp\.gate\.", ".mlp.deepspeed_moe.gate.wg."),
        WeightRenaming(r"\.mlp\.residual_mlp\.", ".mlp.mlp."),
    ]
    if qwen:
        # Not that of the vision tower, `self_attn`
        converters = [*_packed_attention(r"\.attn"), *_packed_experts("w2", "w1", "c_proj")]
    elif text_type == ORIGINAL_BACKBONES["phi"]:
        converters = _packed_phi_experts()
    else:
        converters = _packed_experts("gate_proj", "up_proj", "down_proj")
    transforms: list[WeightTransform] = [*renamings, *(converter.reverse_transform() for converter in converters)]
    return OriginalLayout(transforms, UNUSED_ORIGINAL_WEIGHTS)


def _qwen_names() -> list[WeightRenaming]:
    """From the names that Qwen-1's were brought to."""
    model, layer = r"^model\.language_model\.", r"\.h\.(\d+)\."
    return [
        WeightRenaming(rf"{model}embed_tokens\.", "transformer.wte."),
        WeightRenaming(rf"{model}norm\.", "transformer.ln_f."),
        WeightRenaming(rf"{model}layers\.", "transformer.h."),
        WeightRenaming(rf"{layer}input_layernorm\.", r".h.\1.ln_1."),
        WeightRenaming(rf"{layer}post_attention_layernorm\.", r".h.\1.ln_2."),
        WeightRenaming(rf"{layer}self_attn\.o_proj\.", r".h.\1.attn.c_proj."),
        WeightRenaming(rf"{layer}self_attn\.", r".h.\1.attn."),
        # Beside the experts, whose names end here
        WeightRenaming(r"\.gate_proj\.", ".w2."),
        WeightRenaming(r"\.up_proj\.", ".w1."),
        WeightRenaming(r"\.down_proj\.", ".c_proj."),
    ]


__all__ = ["KeepVocabulary", "original_layout", "original_weight_mapping"]
