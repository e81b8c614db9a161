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
"""Configuration of LLaVA-UHD, in the transformers layout and translated from the original release's flat one."""

import math
import os
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.utils import auto_docstring

from .loading_llava_uhd import loading, read_json_object


# What the original's flat configuration says about its language model
ORIGINAL_TEXT_KEYS = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)

DEFAULT_NUM_QUERIES = {"spatial": 144, "perceiver": 64}

CLIP_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}

# Of a part of a model. A layer is a module, which takes time to build even without its weights, and the deepest models
# have less than 200. Other sizes are of tensors, which do not fit the checkpoint's if they are wrong.
MAX_SIZES = {
    "num_hidden_layers": 1000,
    **dict.fromkeys(
        (
            "head_dim",
            "hidden_size",
            "image_size",
            "intermediate_size",
            "max_position_embeddings",
            "num_attention_heads",
            "num_channels",
            "num_experts",
            "num_key_value_heads",
            "patch_size",
            "vocab_size",
        ),
        2**31 - 1,
    ),
}

SLICES_DOCSTRING = """
    projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
        Activation between the projector's two layers.
    resampler_type (`"spatial"` or `"perceiver"`, *optional*, defaults to `"spatial"`):
        Resampler of `"slices"`, see [`LlavaUhdConfig`].
    num_queries (`int`, *optional*):
        Features per view of `"slices"`. Defaults to 144 for `"spatial"` and 64 for `"perceiver"`.
    resampler_num_attention_heads (`int`, *optional*):
        Defaults to the text model's hidden size divided by 128.
    resampler_layer_norm_eps (`float`, *optional*, defaults to 1e-6):
        Epsilon of the resampler's layer norms.
    image_token_id (`int`, *optional*):
        Id of the `<image>` placeholder. Defaults to the text vocabulary's size: it is never embedded.
    image_mean (`float` or `list[float]`, *optional*):
        Mean of each channel in 0..1, by which the model normalises uint8 `pixel_values` itself. Defaults to the vision
        tower's: CLIP's, or SigLIP's 0.5.
    image_std (`float` or `list[float]`, *optional*):
        Standard deviation of each channel, likewise.
"""


@auto_docstring(
    checkpoint="guozonghao96/llava-uhd-144-13b",
    custom_intro="""
    Configuration of a [`LlavaUhdVisionModel`]. The defaults are those of openai/clip-vit-large-patch14-336.

    Source: transformers' `CLIPVisionConfig`; the layer of the features is `mm_vision_select_layer` of the original.

    Raises a `ValueError` if `vision_feature_layer` is none of the tower's, or `hidden_size` no multiple of
    `num_attention_heads`.
    """,
)
@strict
class LlavaUhdVisionConfig(PreTrainedConfig):
    r"""
    image_size (`int`, *optional*, defaults to 336):
        Side in pixels of the square images that the position table was trained on. Views of other sizes interpolate
        it.
    patch_size (`int`, *optional*, defaults to 14):
        Side of a patch in pixels.
    vision_feature_layer (`int`, *optional*, defaults to -2):
        The hidden state that is returned as image features, counted as in `hidden_states` (0 is the embeddings).
        Layers above it are not built: no feature would ever depend on them.
    """

    model_type = "llava_uhd_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 336
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    vision_feature_layer: int = -2

    @property
    def num_feature_layers(self) -> int:
        """Encoder layers below `vision_feature_layer`, the ones that are built and run."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.num_hidden_layers + 1 + layer

    def validate_vision_feature_layer(self):
        """Refuses a layer that the tower does not have; called when a configuration is made.

        Raises:
            ValueError: if it does not.
        """
        if not 0 <= self.num_feature_layers <= self.num_hidden_layers:
            raise ValueError(
                f"`vision_feature_layer` must lie in {-self.num_hidden_layers - 1}..{self.num_hidden_layers} for "
                f"{self.num_hidden_layers} layers, but is {self.vision_feature_layer}."
            )

    def validate_attention_heads(self):
        """Refuses heads of unequal size; called when a configuration is made.

        Raises:
            ValueError: if `hidden_size` is no multiple of `num_attention_heads`.
        """
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )


@strict
class SlicesConfig(PreTrainedConfig):  # trf-ignore: TRF057 (no user makes one)
    """What every configuration has whose model resamples slices, or may do so."""

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    resampler_type: Literal["spatial", "perceiver"] = "spatial"
    num_queries: int | None = None
    resampler_num_attention_heads: int | None = None
    resampler_layer_norm_eps: float = 1e-6
    image_token_id: int | None = None
    image_mean: float | list[float] | tuple[float, ...] | None = None
    image_std: float | list[float] | tuple[float, ...] | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.num_queries is None:
            self.num_queries = DEFAULT_NUM_QUERIES[self.resampler_type]
        if self.resampler_num_attention_heads is None:
            self.resampler_num_attention_heads = max(self.text_config.hidden_size // 128, 1)
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size
        is_siglip = "siglip" in self.vision_config.model_type
        if self.image_mean is None:
            self.image_mean = list(IMAGENET_STANDARD_MEAN if is_siglip else OPENAI_CLIP_MEAN)
        if self.image_std is None:
            self.image_std = list(IMAGENET_STANDARD_STD if is_siglip else OPENAI_CLIP_STD)
        # Text checkpoints such as Qwen1.5-1.8B carry the flag in their own configuration.
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings

    def validate_sizes(self):
        """Refuses sizes that no model can be built of, before anything is; called when a configuration is made.

        Raises:
            ValueError: if a size of a part lies outside of `MAX_SIZES`.
        """
        for part in ("vision_config", "text_config"):
            config = getattr(self, part)
            for name, limit in MAX_SIZES.items():
                size = getattr(config, name, None)
                if isinstance(size, int) and not 1 <= size <= limit:
                    raise ValueError(f"`{part}.{name}` must lie in 1..{limit}, but is {size}.")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As [`PreTrainedConfig.get_config_dict`], for files that nobody vouches for.

        Raises:
            ValueError: if the file holds no JSON object, or something that transformers stumbles over.
        """
        with loading(f"The configuration in {pretrained_model_name_or_path}"):
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not isinstance(config_dict, dict):
            raise ValueError(
                f"The configuration in {pretrained_model_name_or_path} must be a JSON object, but is a "
                f"{type(config_dict).__name__}."
            )
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        with loading(f"The configuration in {kwargs.get('name_or_path', 'this dictionary')}"):
            return super().from_dict(config_dict, **kwargs)


@auto_docstring(
    checkpoint="guozonghao96/llava-uhd-144-13b",
    custom_intro="""
    Configuration of a [`LlavaUhdModel`]. The defaults, but for the sizes of the text model, are those of
    [guozonghao96/llava-uhd-144-13b](https://huggingface.co/guozonghao96/llava-uhd-144-13b).

    Source: the paper's section 3.3 and the release's `config.json`; transformers' `LlavaConfig`.

    Raises a `ValueError` if `num_queries` is no square number, or a size is impossible.
    """,
)
@strict
class LlavaUhdConfig(SlicesConfig):
    r"""
    resampler_type (`"spatial"` or `"perceiver"`, *optional*, defaults to `"spatial"`):
        `"spatial"` is the released model's: every query attends to its own region of the view. `"perceiver"` is the
        arXiv paper's (section 3.3): every query attends to the whole view.
    num_queries (`int`, *optional*):
        Features per view, a square number. Defaults to 144 for `"spatial"` and 64 for `"perceiver"`.
    resampler_num_attention_heads (`int`, *optional*):
        Defaults to the text model's hidden size divided by 128.
    resampler_layer_norm_eps (`float`, *optional*, defaults to 1e-6):
        Epsilon of the resampler's layer norms.
    image_token_id (`int`, *optional*):
        Id of the `<image>` placeholder. Defaults to the text vocabulary's size, one behind its last embedding: the
        placeholder is never embedded, so the vocabulary and its logits stay those of the original.
    image_mean (`float` or `list[float]`, *optional*):
        Mean of each channel in 0..1, by which the model itself normalises uint8 `pixel_values`, as image processors
        return them with neither `do_rescale` nor `do_normalize`. Defaults to CLIP's.
    image_std (`float` or `list[float]`, *optional*):
        Standard deviation of each channel, likewise.

    Example:

    ```python
    >>> from llava_family import LlavaUhdConfig, LlavaUhdForConditionalGeneration

    >>> configuration = LlavaUhdConfig(text_config={"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2})
    >>> configuration.num_queries
    144
    ```"""

    model_type = "llava_uhd"
    sub_configs_defaults = {
        "vision_config": LlavaUhdVisionConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    tie_word_embeddings: bool = False

    def validate_num_queries(self):
        """Refuses queries that form no square grid; called when a configuration is made.

        Raises:
            ValueError: if `num_queries` is no positive square number.
        """
        queries = self.num_queries
        if queries is not None and (queries < 1 or math.isqrt(queries) ** 2 != queries):
            raise ValueError(f"`num_queries` must be a positive square number, but is {queries}.")

    def validate_resampler_heads(self):
        """Refuses heads of unequal size; called when a configuration is made.

        Raises:
            ValueError: if the text model's `hidden_size` is no multiple of `resampler_num_attention_heads`.
        """
        heads = self.resampler_num_attention_heads
        if isinstance(self.text_config, PreTrainedConfig) and heads is not None:
            if heads < 1 or self.text_config.hidden_size % heads:
                raise ValueError(
                    f"The text model's `hidden_size` ({self.text_config.hidden_size}) must be a multiple of "
                    f"`resampler_num_attention_heads` ({heads})."
                )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        vision_tower = kwargs.pop("mm_vision_tower", None)
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if is_original_config(config_dict):
            folder = str(pretrained_model_name_or_path)
            with loading(f"The configuration in {folder}"):
                config_dict = translate_original_config(config_dict, folder, vision_tower)
        return config_dict, kwargs


@strict
class SquareOrSlicesConfig(SlicesConfig):  # trf-ignore: TRF057 (no user makes one)
    """What the configurations of other families share: square views by default, LLaVA-UHD's slices as an option."""

    vision_encoding: Literal["square", "slices"] = "square"
    projector_hidden_act: str = "gelu"

    def validate_vision_feature_layer(self):
        """Refuses a layer that the vision tower of square views does not have; called when a configuration is made.

        Raises:
            ValueError: if it does not.
        """
        layer = getattr(self, "vision_feature_layer", None)
        num_layers = getattr(self.vision_config, "num_hidden_layers", None)
        if self.vision_encoding == "square" and isinstance(layer, int) and isinstance(num_layers, int):
            if not -num_layers - 1 <= layer <= num_layers:
                raise ValueError(
                    f"`vision_feature_layer` must lie in {-num_layers - 1}..{num_layers} for {num_layers} layers, but "
                    f"is {layer}."
                )

    # TRL reads both from the composite configuration: https://github.com/huggingface/trl/pull/6083
    @property
    def output_router_logits(self) -> bool:
        """Whether models return the router's logits; that of the text model's configuration."""
        return getattr(self.text_config, "output_router_logits", False)

    @output_router_logits.setter
    def output_router_logits(self, value: bool):
        self.text_config.output_router_logits = value  # type: ignore[union-attr]

    @property
    def router_aux_loss_coef(self) -> float:
        """Weight of the balance loss; that of the text model's configuration, 0.0 if it has none."""
        return getattr(self.text_config, "router_aux_loss_coef", 0.0)

    @router_aux_loss_coef.setter
    def router_aux_loss_coef(self, value: float):
        self.text_config.router_aux_loss_coef = value  # type: ignore[union-attr]


# Read but never written or built by hand: it has no parameters to document.
@strict
class LlavaLlamaConfig(PreTrainedConfig):  # trf-ignore: TRF057
    """The configuration of an original release, whose model type is LLaVA-1.5's; reads as a [`LlavaUhdConfig`]."""

    model_type = "llava_llama"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        folder = str(kwargs.get("name_or_path", "."))
        if not is_original_config(config_dict):
            raise ValueError(
                f"The `llava_llama` configuration in {folder} is not LLaVA-UHD's: its `mm_projector_type` is "
                f"{config_dict.get('mm_projector_type')!r}, not 'adapt_spatial_resampler'. LLaVA-1.5 checkpoints are "
                "on the Hub in transformers' own format under llava-hf."
            )
        with loading(f"The configuration in {folder}"):
            translated = translate_original_config(config_dict, folder, kwargs.pop("mm_vision_tower", None))
        return LlavaUhdConfig.from_dict(translated, **kwargs)


def original_configs() -> list[type[PreTrainedConfig]]:
    """Configuration classes for the model types of the original code."""
    return [LlavaLlamaConfig]


def is_original_config(config_dict: dict[str, Any]) -> bool:
    """Whether `config_dict` is the `config.json` of a LLaVA-UHD release by the original code."""
    return config_dict.get("mm_projector_type") == "adapt_spatial_resampler"


def translate_original_config(
    config_dict: dict[str, Any], folder: str = ".", vision_tower: str | os.PathLike | None = None
) -> dict[str, Any]:
    """Translates the original's flat `llava_llama` configuration.

    The original does not say how large its vision tower is, only where it lies (`mm_vision_tower`). A folder there, or
    the one given as `vision_tower`, is read; without one a `mm_hidden_size` of 1024 is CLIP ViT-L/14-336, which all
    releases use.

    Args:
        config_dict (`dict`): The original's `config.json`.
        folder (`str`, *optional*, defaults to the working directory): Where it was read from.
        vision_tower (`str` or `os.PathLike`, *optional*): Folder of the CLIP checkpoint, instead of `mm_vision_tower`.

    Raises:
        ValueError: if the vision tower's configuration cannot be found or does not fit.
    """
    text_config = {key: value for key, value in config_dict.items() if key in ORIGINAL_TEXT_KEYS and value is not None}
    vision_config = _read_vision_config(vision_tower, config_dict, folder)
    vision_config["vision_feature_layer"] = config_dict.get("mm_vision_select_layer", -2)
    translated = {
        "model_type": LlavaUhdConfig.model_type,
        "architectures": ["LlavaUhdForConditionalGeneration"],
        "text_config": {"model_type": "llama", **text_config},
        "vision_config": vision_config,
        "tie_word_embeddings": config_dict.get("tie_word_embeddings", False),
    }
    dtype = config_dict.get("dtype", config_dict.get("torch_dtype"))
    return translated if dtype is None else {**translated, "dtype": dtype}


def _read_vision_config(
    vision_tower: str | os.PathLike | None, config_dict: dict[str, Any], folder: str
) -> dict[str, Any]:
    name = str(config_dict.get("mm_vision_tower", config_dict.get("vision_tower", "")))
    # The release names a path relative to its authors' working directory.
    places = [str(vision_tower)] if vision_tower else []
    if name and not vision_tower:
        places = [name, os.path.join(folder, name), os.path.join(folder, "..", name)]
    vision_config = {name: getattr(LlavaUhdVisionConfig(), name) for name in LlavaUhdVisionConfig.__annotations__}
    for place in places:
        path = os.path.join(place, "config.json")
        if os.path.isfile(path):
            clip_config = read_json_object(path)
            clip_config = clip_config.get("vision_config", clip_config)
            vision_config.update({key: value for key, value in clip_config.items() if key in vision_config})
            break
    else:
        if vision_tower:
            raise ValueError(
                f"`mm_vision_tower` must be the folder of a CLIP checkpoint, but {vision_tower} has no config.json."
            )
    mm_hidden_size = config_dict.get("mm_hidden_size", vision_config["hidden_size"])
    if vision_config["hidden_size"] != mm_hidden_size:
        raise ValueError(
            f"The configuration in {folder} has a vision tower of width {mm_hidden_size} (`mm_hidden_size`) at "
            f"{name!r}, but the one found has width {vision_config['hidden_size']}. Pass `mm_vision_tower`, the "
            "folder of the CLIP checkpoint it was trained with."
        )
    return vision_config


__all__ = ["LlavaUhdConfig", "LlavaUhdVisionConfig"]
