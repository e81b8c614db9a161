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
"""Configurations of MoE-LLaVA: the composite one, five sparse text models, and the translation of the original's."""

import os
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.phi.configuration_phi import PhiConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.stablelm.configuration_stablelm import StableLmConfig
from transformers.utils import auto_docstring
from transformers.utils.hub import cached_file

from ..llava_uhd.configuration_llava_uhd import CLIP_LARGE_336, SLICES_DOCSTRING, SquareOrSlicesConfig
from ..llava_uhd.loading_llava_uhd import loading, read_json_object


SIGLIP_SO400M_384 = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}

# For transformers' `DistributedConfig`. Tensor parallelism splits every expert, expert parallelism deals them out.
EXPERTS_TP_PLAN = {
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
}
EXPERTS_EP_PLAN = {
    "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "layers.*.mlp.experts.down_proj": "grouped_gemm",
    "layers.*.mlp.experts": "ep_dispatch_experts",
}

MoeLayers = Literal["sparse", "dense", "first_half", "second_half"]


def select_moe_layers(placement: MoeLayers | list[int], num_hidden_layers: int) -> list[int]:
    """Indices of the layers with experts, by the paper's names (section 4.3, "the position of MoE layers").

    Args:
        placement (`str` or `list[int]`): `"sparse"` is every second layer from the first one, as in all releases;
            `"dense"` every layer; `"first_half"` and `"second_half"` what they say. Indices are kept.
        num_hidden_layers (`int`): Layers of the text model.

    Raises:
        ValueError: if the name is unknown or an index is out of range or occurs twice.
    """
    half = num_hidden_layers // 2
    named = {
        "sparse": range(0, num_hidden_layers, 2),
        "dense": range(num_hidden_layers),
        "first_half": range(half),
        "second_half": range(half, num_hidden_layers),
    }
    if isinstance(placement, str):
        if placement not in named:
            raise ValueError(f"`moe_layers` must be a list of layers or one of {list(named)}, but is {placement!r}.")
        return list(named[placement])
    layers = sorted(placement)
    if len(set(layers)) != len(layers) or any(not 0 <= layer < num_hidden_layers for layer in layers):
        raise ValueError(
            f"`moe_layers` must name layers of 0..{num_hidden_layers - 1}, each once, but is {list(placement)}."
        )
    return layers


SPARSE_DOCSTRING = """
    num_experts (`int`, *optional*, defaults to 4):
        Experts of every sparse layer.
    num_experts_per_tok (`int`, *optional*, defaults to 2):
        Experts that every token is sent to, 1 or 2.
    moe_layers (`str` or `list[int]`, *optional*, defaults to `"sparse"`):
        Layers with experts: indices, or `"sparse"`, `"dense"`, `"first_half"`, `"second_half"`.
    second_expert_policy (`"top"` or `"sampling"`, *optional*, defaults to `"top"`):
        `"top"` takes the two most probable experts, as the paper says. `"sampling"` draws the second one by the
        router's probabilities, in training and evaluation alike, as the released code does.
    capacity_factor (`float`, *optional*):
        Limits each expert to `num_experts_per_tok * capacity_factor / num_experts` of the tokens in training; what is
        beyond is dropped. None, the default, drops nothing. The releases were trained with 1.5.
    eval_capacity_factor (`float`, *optional*):
        The same limit of tokens in evaluation. The releases have 2.0, which drops nothing with up to four experts.
    min_capacity (`int`, *optional*, defaults to 0):
        Least number of tokens that an expert takes, where there is a capacity.
    use_residual (`bool`, *optional*, defaults to `False`):
        Adds the dense feed-forward network to the experts, weighted by a learned coefficient.
    output_router_logits (`bool`, *optional*, defaults to `False`):
        Whether to return the router's logits and the balance loss also where no labels are given.
    router_aux_loss_coef (`float`, *optional*, defaults to 0.01):
        Weight of the balance loss (paper, equation 6).
    aux_loss_includes_padding (`bool`, *optional*, defaults to `False`):
        Whether padding counts in the balance loss, as in the released code.
"""


@dataclass(kw_only=True, repr=False)
class SparseTextConfigMixin:
    """What a text configuration needs to have experts; the backbone's own fields are those of its in-tree class."""

    attribute_map: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}
    base_model_ep_plan = EXPERTS_EP_PLAN

    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_layers: str | list[int] = "sparse"
    second_expert_policy: Literal["top", "sampling"] = "top"
    capacity_factor: float | int | None = None
    eval_capacity_factor: float | int | None = None
    min_capacity: int = 0
    use_residual: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.01
    aux_loss_includes_padding: bool = False

    def __post_init__(self, **kwargs):
        self.moe_layers = select_moe_layers(self.moe_layers, self.num_hidden_layers)
        if self.use_residual:
            dense = {name: style for name, style in self.base_model_tp_plan.items() if "experts" not in name}
            self.base_model_tp_plan = self.base_model_tp_plan | {
                name.replace(".mlp.", ".mlp.residual_mlp."): style for name, style in dense.items() if ".mlp." in name
            }
        super().__post_init__(**kwargs)

    def validate_experts(self):
        """Refuses impossible settings of experts; called when a configuration is made.

        Raises:
            ValueError: if `num_experts_per_tok` or a capacity factor is impossible.
        """
        if not 1 <= self.num_experts_per_tok <= min(2, self.num_experts):
            raise ValueError(
                "`num_experts_per_tok` must be 1 or 2, as in the original, and at most `num_experts` "
                f"({self.num_experts}), but is {self.num_experts_per_tok}."
            )
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be positive, or None to drop no token, but is {value}.")


@auto_docstring(
    checkpoint="LanguageBind/MoE-LLaVA-Phi2-2.7B-4e",
    custom_intro="""
    Configuration of a [`MoeLlavaPhiModel`]: a Phi whose chosen layers have experts.

    Source: MoE-LLaVA's section 3.2 and the original code's `moe` settings; transformers' `PhiConfig`.

    Raises a `ValueError` if the settings of experts are impossible, or `moe_layers` names layers that there are
    not.
    """,
)
@strict
class MoeLlavaPhiConfig(SparseTextConfigMixin, PhiConfig):
    __doc__ = SPARSE_DOCSTRING

    model_type = "moe_llava_phi_text"
    base_config_key = "text_config"
    # As for in-tree GPT-OSS, tensor parallelism leaves experts whole: every rank would add their second bias.
    base_model_ep_plan = {
        "layers.*.mlp.experts.up_proj": "grouped_gemm",
        "layers.*.mlp.experts.up_proj_bias": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj_bias": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }


@auto_docstring(
    checkpoint="LanguageBind/MoE-LLaVA-Phi2-2.7B-4e",
    custom_intro="""
    Configuration of a [`MoeLlavaStableLmModel`]: a StableLM whose chosen layers have experts.

    Source: MoE-LLaVA's section 3.2 and the original code's `moe` settings; transformers' `StableLmConfig`.

    Raises a `ValueError` if the settings of experts are impossible, or `moe_layers` names layers that there are
    not.
    """,
)
@strict
class MoeLlavaStableLmConfig(SparseTextConfigMixin, StableLmConfig):
    __doc__ = f"""{SPARSE_DOCSTRING}
    use_parallel_residual (`bool`, *optional*, defaults to `False`):
        Whether attention and feed-forward network see the same input, as in larger StableLM models.
    """

    model_type = "moe_llava_stablelm_text"
    base_config_key = "text_config"
    # In-tree StableLM has no plans. Its attention is written for all heads, so these are gathered.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise_gather_output",
        "layers.*.self_attn.k_proj": "colwise_gather_output",
        "layers.*.self_attn.v_proj": "colwise_gather_output",
        "layers.*.self_attn.o_proj": "rowwise_split_input",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        **EXPERTS_TP_PLAN,
    }
    base_model_pp_plan = LlamaConfig.base_model_pp_plan


@auto_docstring(
    checkpoint="LanguageBind/MoE-LLaVA-Phi2-2.7B-4e",
    custom_intro="""
    Configuration of a [`MoeLlavaQwen2Model`]: a Qwen2, as which Qwen-1 is converted, whose chosen layers have experts.

    Source: MoE-LLaVA's section 3.2 and the original code's `moe` settings; transformers' `Qwen2Config`.

    Raises a `ValueError` if the settings of experts are impossible, or `moe_layers` names layers that there are
    not.
    """,
)
@strict
class MoeLlavaQwen2Config(SparseTextConfigMixin, Qwen2Config):
    __doc__ = SPARSE_DOCSTRING

    model_type = "moe_llava_qwen2_text"
    base_config_key = "text_config"
    base_model_tp_plan = Qwen2Config.base_model_tp_plan | EXPERTS_TP_PLAN


@auto_docstring(
    checkpoint="LanguageBind/MoE-LLaVA-Phi2-2.7B-4e",
    custom_intro="""
    Configuration of a [`MoeLlavaLlamaModel`]: a Llama whose chosen layers have experts.

    Source: MoE-LLaVA's section 3.2 and the original code's `moe` settings; transformers' `LlamaConfig`.

    Raises a `ValueError` if the settings of experts are impossible, or `moe_layers` names layers that there are
    not.
    """,
)
@strict
class MoeLlavaLlamaConfig(SparseTextConfigMixin, LlamaConfig):
    __doc__ = SPARSE_DOCSTRING

    model_type = "moe_llava_llama_text"
    base_config_key = "text_config"
    base_model_tp_plan = LlamaConfig.base_model_tp_plan | EXPERTS_TP_PLAN


@auto_docstring(
    checkpoint="LanguageBind/MoE-LLaVA-Phi2-2.7B-4e",
    custom_intro="""
    Configuration of a [`MoeLlavaMistralModel`]: a Mistral whose chosen layers have experts.

    Source: MoE-LLaVA's section 3.2 and the original code's `moe` settings; transformers' `MistralConfig`.

    Raises a `ValueError` if the settings of experts are impossible, or `moe_layers` names layers that there are
    not.
    """,
)
@strict
class MoeLlavaMistralConfig(SparseTextConfigMixin, MistralConfig):
    __doc__ = SPARSE_DOCSTRING

    model_type = "moe_llava_mistral_text"
    base_config_key = "text_config"
    base_model_tp_plan = MistralConfig.base_model_tp_plan | EXPERTS_TP_PLAN


@auto_docstring(
    checkpoint="LanguageBind/MoE-LLaVA-Phi2-2.7B-4e",
    custom_intro="""
    Configuration of a [`MoeLlavaModel`]. The defaults, but for the sizes of the text model, are those of
    [LanguageBind/MoE-LLaVA-Phi2-2.7B-4e](https://huggingface.co/LanguageBind/MoE-LLaVA-Phi2-2.7B-4e).

    Source: MoE-LLaVA's section 3 and the releases' `config.json`; transformers' `LlavaConfig`.

    Raises a `ValueError` if `vision_feature_layer` is none of the tower's, or a size is impossible.
    """,
)
@strict
class MoeLlavaConfig(SquareOrSlicesConfig):
    __doc__ = f"""
    vision_encoding (`"square"` or `"slices"`, *optional*, defaults to `"square"`):
        `"square"` is the paper's: one square view, whose patches a two-layer projector maps to the text model.
        `"slices"` is LLaVA-UHD's: adaptively cut views, compressed by its resampler.
    vision_feature_layer (`int`, *optional*, defaults to -2):
        Hidden state of the vision tower that is taken as image features.
    vision_feature_select_strategy (`"default"` or `"full"`, *optional*, defaults to `"default"`):
        `"default"` drops the first feature: CLIP's class embedding. SigLIP has none and loses its top left patch, with
        which its releases were trained: 728 tokens. `"full"` keeps all, 729 for SigLIP.
    {SLICES_DOCSTRING}
    Example:

    ```python
    >>> from llava_family import MoeLlavaConfig

    >>> configuration = MoeLlavaConfig(text_config={{"model_type": "moe_llava_phi_text", "num_hidden_layers": 4}})
    >>> configuration.text_config.moe_layers
    [0, 2]
    ```"""

    model_type = "moe_llava"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_vision_model",
            init_kwargs=CLIP_LARGE_336,
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="moe_llava_phi_text"),
    }

    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    tie_word_embeddings: bool = False

    @PreTrainedConfig._experts_implementation.setter
    def _experts_implementation(self, value: str | dict | None):
        # For the text model only: a vision tower without experts refuses to be built with "grouped_mm".
        if isinstance(value, str):
            value = {"": value, "text_config": value}
        PreTrainedConfig._experts_implementation.fset(self, value)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        image_tower = kwargs.pop("mm_image_tower", None)
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if is_original_config(config_dict):
            folder = str(pretrained_model_name_or_path)
            with loading(f"The configuration in {folder}"):
                config_dict = translate_original_config(config_dict, folder, image_tower)
        return config_dict, kwargs


@strict
class OriginalMoeLlavaConfig(PreTrainedConfig):  # trf-ignore: TRF057
    """Reads the flat `config.json` of an original release as a [`MoeLlavaConfig`]; a subclass for every model type."""

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        folder = str(kwargs.get("name_or_path", "."))
        with loading(f"The configuration in {folder}"):
            translated = translate_original_config(config_dict, folder, kwargs.pop("mm_image_tower", None))
        return MoeLlavaConfig.from_dict(translated, **kwargs)


# The second stage's dense models are of the same classes, without experts.
ORIGINAL_BACKBONES = {
    "phi": "moe_llava_phi_text",
    "stablelm": "moe_llava_stablelm_text",
    "qwen": "moe_llava_qwen2_text",
    "llama": "moe_llava_llama_text",
    "mistral": "moe_llava_mistral_text",
}
ORIGINAL_MODEL_TYPES = {
    f"{prefix}llava_{backbone}": text_type
    for backbone, text_type in ORIGINAL_BACKBONES.items()
    for prefix in ("moe_", "")
    # LLaVA-1.5 and LLaVA-UHD are `llava_llama` too, and in-tree LLaVA reads `llava_mistral`'s relatives.
    if f"{prefix}llava_{backbone}" not in ("llava_llama", "llava_mistral")
}

# Special tokens behind the ranks of a tiktoken file; StableLM leaves one id between them unused.
TIKTOKEN_SPECIALS = {"arcade100k.tiktoken": 1 + 32, "qwen.tiktoken": 3 + 205}

# The original's names of what the in-tree text configurations call differently
RENAMED_TEXT_KEYS = {
    "norm_eps": "layer_norm_eps",
    "rope_pct": "partial_rotary_factor",
    "layer_norm_epsilon": "rms_norm_eps",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
}
TEXT_KEYS = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "embd_pdrop",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "partial_rotary_factor",
    "qk_layernorm",
    "resid_pdrop",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_cache",
    "use_qkv_bias",
    "vocab_size",
)

VISION_FEATURE_SELECTIONS = {"patch": "default", "cls_patch": "full"}


def original_configs() -> list[type[PreTrainedConfig]]:
    """Configuration classes for the model types of the original code."""
    bases = (OriginalMoeLlavaConfig,)
    return [type("OriginalMoeLlavaConfig", bases, {"model_type": name}) for name in ORIGINAL_MODEL_TYPES]


def is_original_config(config_dict: dict[str, Any]) -> bool:
    """Whether `config_dict` is the original's `config.json` of a MoE-LLaVA release or of its dense second stage."""
    return str(config_dict.get("model_type")) in ORIGINAL_MODEL_TYPES and "mm_image_tower" in config_dict


def translate_original_config(
    config_dict: dict[str, Any], folder: str = ".", image_tower: str | os.PathLike | None = None
) -> dict[str, Any]:
    """Translates the original's flat configuration.

    Routing becomes drop-free and deterministic, whatever the release's `moe` entry says about capacities: evaluated,
    the releases drop nothing either. Set `second_expert_policy` and the capacity factors for the original's behaviour.

    Args:
        config_dict (`dict`): The original's `config.json`.
        folder (`str`, *optional*, defaults to the working directory): Where it was read from.
        image_tower (`str` or `os.PathLike`, *optional*): Folder of the vision tower, instead of `mm_image_tower`.

    Raises:
        ValueError: if the configuration is not MoE-LLaVA's, or the vision tower's is unknown.
    """
    if not is_original_config(config_dict):
        raise ValueError(
            f"The configuration in {folder} must be MoE-LLaVA's, with `mm_image_tower` and a `model_type` of "
            f"{list(ORIGINAL_MODEL_TYPES)}, but is of type {config_dict.get('model_type')!r}."
        )
    selection = config_dict.get("mm_vision_select_feature", "patch")
    if selection not in VISION_FEATURE_SELECTIONS:
        raise ValueError(
            f"`mm_vision_select_feature` in {folder} must be one of {list(VISION_FEATURE_SELECTIONS)}, but is "
            f"{selection!r}."
        )
    translated = {
        "model_type": MoeLlavaConfig.model_type,
        "architectures": ["MoeLlavaForCausalLM"],
        "text_config": _translate_text_config(config_dict, folder),
        "vision_config": _read_tower_config(image_tower, config_dict, folder),
        "vision_feature_layer": config_dict.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": VISION_FEATURE_SELECTIONS[selection],
        "tie_word_embeddings": config_dict.get("tie_word_embeddings", False),
    }
    dtype = config_dict.get("dtype", config_dict.get("torch_dtype"))
    return translated if dtype is None else {**translated, "dtype": dtype}


def _translate_text_config(config_dict: dict[str, Any], folder: str) -> dict[str, Any]:
    renamed = {RENAMED_TEXT_KEYS.get(key, key): value for key, value in config_dict.items()}
    text_config = {key: renamed[key] for key in TEXT_KEYS if renamed.get(key) is not None}
    text_config["model_type"] = ORIGINAL_MODEL_TYPES[config_dict["model_type"]]
    text_config["vocab_size"] = original_vocabulary_size(folder, text_config["vocab_size"])
    # Phi has none in its configuration, and the in-tree defaults are of another tokenizer.
    text_config |= {name: config_dict.get(name) for name in ("bos_token_id", "eos_token_id")}
    if text_config["eos_token_id"] is None:
        text_config["eos_token_id"] = _end_of_sequence(folder)
    if text_config["model_type"] == "moe_llava_qwen2_text":
        # Qwen-1 counts both halves of its gated network, and has as many key as query heads.
        text_config["intermediate_size"] //= 2
        text_config["num_key_value_heads"] = text_config["num_attention_heads"]
        text_config.setdefault("hidden_act", "silu")
    moe = config_dict.get("moe") or {}
    num_experts = set(moe.get("num_experts") or [4])
    if len(num_experts) > 1:
        raise ValueError(f"All layers must have as many experts, but `moe.num_experts` is {moe['num_experts']}.")
    text_config["moe_layers"] = list(moe.get("moe_layers_idx") or [])
    text_config["num_experts"] = num_experts.pop()
    text_config["num_experts_per_tok"] = moe.get("top_k_experts", 2)
    text_config["use_residual"] = bool(moe.get("use_residual", False))
    text_config["router_aux_loss_coef"] = moe.get("router_aux_loss_coef", 0.01)
    return text_config


def original_vocabulary_size(folder: str, num_rows: int) -> int:
    """Tokens of the tokenizer in `folder`, to which the original cuts embeddings and head of `num_rows` when it loads.

    Raises:
        ValueError: if the tokenizer has more tokens than the model has rows.
    """
    vocabulary = _original_vocabulary(folder)
    size = max(vocabulary.values()) + 1 if vocabulary else num_rows
    for name, num_specials in TIKTOKEN_SPECIALS.items():
        path = _original_file(folder, name)
        if path is not None:
            with open(path, "rb") as ranks:
                size = sum(1 for line in ranks if line.strip()) + num_specials
    if size > num_rows:
        raise ValueError(f"The tokenizer in {folder} has {size} tokens, but the model has embeddings of {num_rows}.")
    return size


def _original_vocabulary(folder: str) -> dict[str, int]:
    """Ids of all tokens of a tokenizer with `vocab.json`; empty for others."""
    vocabulary: dict[str, int] = {}
    for name in ("vocab.json", "added_tokens.json"):
        path = _original_file(folder, name)
        vocabulary |= read_json_object(path) if path else {}
    if not all(isinstance(token_id, int) for token_id in vocabulary.values()):
        raise ValueError(f"The vocabulary in {folder} must have an integer for every token.")
    return vocabulary


def _end_of_sequence(folder: str) -> int | None:
    """Id of the tokenizer's `eos_token`, which the original sets at load time."""
    path = _original_file(folder, "tokenizer_config.json")
    token = read_json_object(path).get("eos_token") if path else None
    # Older files describe the token, newer ones name it.
    token = token.get("content") if isinstance(token, dict) else token
    return _original_vocabulary(folder).get(token) if isinstance(token, str) else None


def _original_file(folder: str, name: str) -> str | None:
    """Path of a file of the release."""
    return cached_file(
        folder,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )


def _read_tower_config(
    image_tower: str | os.PathLike | None, config_dict: dict[str, Any], folder: str
) -> dict[str, Any]:
    name = str(config_dict["mm_image_tower"])
    places = (
        [str(image_tower)] if image_tower else [name, os.path.join(folder, name), os.path.join(folder, "..", name)]
    )
    for place in places:
        path = os.path.join(place, "config.json")
        if os.path.isfile(path):
            tower = read_json_object(path)
            tower = {**tower.get("vision_config", tower)}
            kind = "siglip_vision_model" if "siglip" in str(tower.get("model_type")) else "clip_vision_model"
            tower["model_type"] = kind
            if not isinstance(tower.get("hidden_size"), int):
                raise ValueError(f"{path} must have an integer `hidden_size`, but has {tower.get('hidden_size')!r}.")
            break
    else:
        if image_tower:
            raise ValueError(
                f"`mm_image_tower` must be the folder of a vision tower, but {image_tower} has no config.json."
            )
        tower = _known_tower_config(name)
    mm_hidden_size = config_dict.get("mm_hidden_size", tower["hidden_size"])
    if tower["hidden_size"] != mm_hidden_size:
        raise ValueError(
            f"The configuration in {folder} has a vision tower of width {mm_hidden_size} (`mm_hidden_size`), "
            f"{name!r}, but the one found has width {tower['hidden_size']}. Pass `mm_image_tower`, the tower's folder."
        )
    keep = ("dtype", "torch_dtype", "architectures", "transformers_version", "_name_or_path")
    return {key: value for key, value in tower.items() if key not in keep}


def _known_tower_config(name: str) -> dict[str, Any]:
    """The towers of all releases, which the original tells apart by the owner of their repository."""
    if name.startswith(("openai", "laion")):
        return {"model_type": "clip_vision_model", **CLIP_LARGE_336}
    if name.startswith("google"):
        return {"model_type": "siglip_vision_model", **SIGLIP_SO400M_384}
    raise ValueError(
        f"The vision tower {name!r} is not of openai, laion or google. Pass `mm_image_tower`, its folder."
    )


__all__ = [
    "MoeLlavaConfig",
    "MoeLlavaLlamaConfig",
    "MoeLlavaMistralConfig",
    "MoeLlavaPhiConfig",
    "MoeLlavaQwen2Config",
    "MoeLlavaStableLmConfig",
]
