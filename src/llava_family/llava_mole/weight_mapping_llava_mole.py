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
"""

from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter, WeightRenaming


LANGUAGE_MODEL = "llm_model.base_model.model."
VISION_TOWER = "vit.vision_tower."
PROJECTIONS = {"moe_gate": "gate_proj", "moe_up": "up_proj", "moe_down": "down_proj"}

# Reasons by pattern
UNUSED_ORIGINAL_WEIGHTS = {
    r"^in_adaptor\.text_embed\.weight$": "a second name of the text model's embeddings",
    r"embeddings\.position_ids$": "a constant that older checkpoints store",
    r"rotary_emb\.inv_freq$": "a constant that older checkpoints store",
}


def original_weight_mapping() -> list[WeightConverter | WeightRenaming]:
    """The transforms from the original's names and layout to the native ones."""
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
    converters = []
    for original, native in PROJECTIONS.items():
        target = f"mlp.{native}.mole_experts.weight_"
        converters.append(WeightConverter(f"mlp.{original}.*.lora_A", f"{target}A", [MergeModulelist(dim=0)]))
        converters.append(
            WeightConverter(f"mlp.{original}.*.lora_B", f"{target}B", [MergeModulelist(dim=0), Transpose(1, 2)])
        )
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        lora, target = f"self_attn.{name}.lora_", f"self_attn.{name}.mole_experts.weight_"
        converters.append(WeightConverter(f"{lora}A.default.weight", f"{target}A", [MergeModulelist(dim=0)]))
        converters.append(
            WeightConverter(f"{lora}B.default.weight", f"{target}B", [MergeModulelist(dim=0), Transpose(1, 2)])
        )
    return [*renamings, *converters]


__all__ = ["UNUSED_ORIGINAL_WEIGHTS", "original_weight_mapping"]
