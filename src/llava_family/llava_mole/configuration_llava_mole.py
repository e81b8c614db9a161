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
"""Configuration of LLaVA-MoLE: the composite one, and a Llama with a mixture of LoRA experts."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.utils import auto_docstring

from ..llava_uhd.configuration_llava_uhd import CLIP_LARGE_336, SLICES_DOCSTRING, SquareOrSlicesConfig


ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# For transformers' `DistributedConfig`: the experts of a linear layer are sharded as it is itself.
EXPERTS_TP_PLAN = {
    f"{name}.mole_experts": f"mole_{style}"
    for name, style in LlamaConfig.base_model_tp_plan.items()
    if style in ("colwise", "rowwise")
}


@auto_docstring(
    checkpoint="lmsys/vicuna-7b-v1.5",
    custom_intro="""
    Configuration of a [`LlavaMoleTextModel`]. The defaults of the base model are those of Llama 2 7B, as of
    [lmsys/vicuna-7b-v1.5](https://huggingface.co/lmsys/vicuna-7b-v1.5).

    Source: LLaVA-MoLE's section 3 and the original code; transformers' `LlamaConfig`, PEFT's `LoraConfig`.

    Raises a `ValueError` if the settings of experts are impossible.
    """,
)
@strict
class LlavaMoleTextConfig(LlamaConfig):
    r"""
    num_experts (`int`, *optional*, defaults to 3):
        LoRA experts of the feed-forward network of every layer.
    r (`int`, *optional*, defaults to 16):
        Rank of every expert, and of the attention's adapters.
    lora_alpha (`float`, *optional*, defaults to 32):
        What an expert adds is scaled by `lora_alpha / r`.
    lora_dropout (`float`, *optional*, defaults to 0.05):
        Dropout of the experts' input in training.
    routing (`"top1"` or `"dense"`, *optional*, defaults to `"top1"`):
        `"top1"` is the paper's: a token sees its most probable expert. `"dense"` is that of the released inference
        code: it sees all experts, weighted by their probabilities. Weights are trained for one of them.
    scale_by_gate (`bool`, *optional*, defaults to `False`):
        Whether `"top1"` weights the chosen expert by its probability. Without, as in the original, the router learns
        from the balance loss alone; with it, from the task too. `"dense"` always weights.
    attention_target_modules (`list[str]`, *optional*, defaults to all four projections):
        Attention projections with an ordinary LoRA adapter each. Empty where adapters are merged into the weights.
    output_router_logits (`bool`, *optional*, defaults to `False`):
        Whether to return the router's logits and the balance loss also where no labels are given.
    router_aux_loss_coef (`float`, *optional*, defaults to 0.01):
        Weight of the balance loss.
    balance_loss (`"pooled"` or `"per_layer"`, *optional*, defaults to `"pooled"`):
        `"pooled"` is the released code's, over all layers of a sample; `"per_layer"` balances every layer by itself.
    """

    model_type = "llava_mole_text"
    base_config_key = "text_config"
    base_model_tp_plan = LlamaConfig.base_model_tp_plan | EXPERTS_TP_PLAN

    num_experts: int = 3
    r: int = 16
    lora_alpha: float | int = 32
    lora_dropout: float | int = 0.05
    routing: Literal["top1", "dense"] = "top1"
    scale_by_gate: bool = False
    attention_target_modules: list[str] | tuple[str, ...] = ATTENTION_PROJECTIONS
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.01
    balance_loss: Literal["pooled", "per_layer"] = "pooled"

    def __post_init__(self, **kwargs):
        self.attention_target_modules = list(self.attention_target_modules)
        super().__post_init__(**kwargs)
        # A plan names nothing that the model does not have.
        absent = [name for name in ATTENTION_PROJECTIONS if name not in self.attention_target_modules]
        self.base_model_tp_plan = {
            name: style
            for name, style in self.base_model_tp_plan.items()
            if not any(name.endswith(f".{projection}.mole_experts") for projection in absent)
        }

    def validate_experts(self):
        """Refuses impossible settings of experts; called when a configuration is made.

        Raises:
            ValueError: if a number lies outside of its range, or an attention projection is unknown.
        """
        for name in ("num_experts", "r"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}.")
        if self.lora_alpha <= 0:
            raise ValueError(f"`lora_alpha` must be positive, but is {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must lie in [0, 1), but is {self.lora_dropout}.")
        unknown = [name for name in self.attention_target_modules if name not in ATTENTION_PROJECTIONS]
        if unknown:
            raise ValueError(
                f"`attention_target_modules` must be of {list(ATTENTION_PROJECTIONS)}, but has {unknown} in it."
            )


@auto_docstring(
    checkpoint="lmsys/vicuna-7b-v1.5",
    custom_intro="""
    Configuration of a [`LlavaMoleModel`]. The defaults are those of the original code's model on Vicuna 7B.

    Source: LLaVA-MoLE's section 3 and the original code; transformers' `LlavaConfig`.

    Raises a `ValueError` if `vision_feature_layer` is none of the tower's, or a size is impossible.
    """,
)
@strict
class LlavaMoleConfig(SquareOrSlicesConfig):
    __doc__ = f"""
    vision_encoding (`"square"` or `"slices"`, *optional*, defaults to `"square"`):
        `"square"` is the paper's: one square view, whose patches a two-layer projector maps to the text model.
        `"slices"` is LLaVA-UHD's: adaptively cut views, compressed by its resampler. A learned embedding stands
        before, and another one behind, the features of every image.
    vision_feature_layer (`int`, *optional*, defaults to -1):
        Hidden state of the vision tower that is taken as image features, without the tower's last norm: the last one,
        where LLaVA-1.5 takes the last but one. For `"slices"` it stands in the vision configuration.
    vision_feature_select_strategy (`"default"` or `"full"`, *optional*, defaults to `"default"`):
        `"default"` drops the first feature, CLIP's class embedding.
    {SLICES_DOCSTRING}
    Example:

    ```python
    >>> from llava_family import LlavaMoleConfig

    >>> configuration = LlavaMoleConfig(text_config={{"num_experts": 4, "num_hidden_layers": 2}})
    >>> configuration.text_config.routing
    'top1'
    ```"""

    model_type = "llava_mole"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_vision_model",
            init_kwargs=CLIP_LARGE_336,
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llava_mole_text"),
    }

    vision_feature_layer: int = -1
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    tie_word_embeddings: bool = False


def original_configs() -> list[type[PreTrainedConfig]]:
    """None: the original has a checkpoint, a language model and a vision tower, but no configuration of all of it."""
    return []


__all__ = ["LlavaMoleConfig", "LlavaMoleTextConfig"]
