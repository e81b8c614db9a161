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
"""Processor of MoE-LLaVA: prompts with image placeholders to token ids, images to square views or to slices."""

import json
import os
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.processing_utils import MultiModalData
from transformers.utils import auto_docstring

from ..llava_uhd.image_processing_pil_llava_uhd import check_setting
from ..llava_uhd.loading_llava_uhd import read_json_object
from ..llava_uhd.processing_llava_uhd import CHAT_TEMPLATE, MAX_VIEW_TOKENS, LlavaUhdProcessor
from .configuration_moe_llava import is_original_config, translate_original_config
from .image_processing_pil_moe_llava import MoeLlavaImageProcessorPil
from .tokenization_moe_llava import HUB_ARGUMENTS, load_original_tokenizer


# OpenChat ends answers with a token of its own, all other backbones with their end of sequence.
OPENCHAT_END_OF_TURN = "<|end_of_turn|>"

# What a vision tower's preprocessor_config.json may say
TOWER_SETTINGS = (
    "crop_size",
    "do_center_crop",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "resample",
    "rescale_factor",
    "size",
)


def chat_template(end_of_turn: str) -> str:
    """The prompts that all releases were trained with, Vicuna's up to `end_of_turn`, which closes an answer.

    The original calls it `phi`, `stablelm` and `qwen` with `"<|endoftext|>"`, `openchat` with `"<|end_of_turn|>"`,
    `mistral`, `minicpm` and `v1` with `"</s>"`.
    """
    return CHAT_TEMPLATE.replace("'</s>'", json.dumps(end_of_turn))


@auto_docstring(
    custom_intro="""
    Makes a model's inputs of prompts and images: an image processor and a tokenizer in one.

    Source: the original code's prompts; transformers' `LlavaProcessor`.

    Raises a `ValueError` if a number or `image_token` is impossible, or the tokenizer does not tell how an answer ends
    or does not encode the separators of slices as one token each.
    """
)
class MoeLlavaProcessor(LlavaUhdProcessor):
    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens=576,
        num_queries=144,
        image_token="<image>",
        chat_template=None,
        **kwargs,
    ):
        r"""
        image_processor ([`MoeLlavaImageProcessorPil`] or [`MoeLlavaImageProcessor`], *optional*):
            Makes pixel values of images.
        tokenizer ([`PreTrainedTokenizerFast`], *optional*):
            Makes ids of prompts: that of the model's language model.
        num_image_tokens (`int`, *optional*, defaults to 576):
            Features of an image under the vision encoding `"square"`: 576 for the released CLIP, 728 for the released
            SigLIP.
        num_queries (`int`, *optional*, defaults to 144):
            Features of every view under the vision encoding `"slices"`, as in the model's configuration.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            Placeholder of an image in a prompt. It is added to a tokenizer that does not have it.
        chat_template (`str`, *optional*):
            Template of prompts, in Jinja. Defaults to Vicuna's with the token by which the tokenizer's language model
            ends an answer.
        """
        check_setting("`num_image_tokens`", num_image_tokens, MAX_VIEW_TOKENS)
        self.num_image_tokens = num_image_tokens
        super().__init__(
            image_processor,
            tokenizer,
            num_queries=num_queries,
            image_token=image_token,
            chat_template=chat_template or default_chat_template(tokenizer),
        )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Makes what stands in the prompt for one image: a placeholder for every feature, and the separators of
        slices.

        Args:
            image_inputs (`dict`): What the image processor returned for all images.
            image_idx (`int`): Which of them it is.

        Returns:
            `str`: The text.
        """
        if "image_grids" in image_inputs:
            return super().replace_image_token(image_inputs, image_idx, **kwargs)
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """
        Computes the number of placeholder tokens needed for images of the given sizes.

        Args:
            image_sizes (`list[list[int]]`, *optional*):
                The input sizes formatted as (height, width) per each image.

        Returns:
            `MultiModalData`: with `num_image_tokens`, placeholders that features replace, and `num_image_patches`,
            rows of `pixel_values`, per image.
        """
        if image_sizes is None:
            return MultiModalData()
        images_kwargs = self._merge_kwargs(**kwargs)["images_kwargs"]
        if images_kwargs.get("vision_encoding", self.image_processor.vision_encoding) == "slices":
            return super()._get_num_multimodal_tokens(image_sizes, **kwargs)
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    # Both take `mm_image_tower`, the folder of the vision tower, as the model's configuration does: of a processor's
    # files, a release has the tokenizer's alone.
    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, mm_image_tower=None, **kwargs):
        """As [`ProcessorMixin.get_processor_dict`], also of an original release, which has a tokenizer's files alone.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or Hub repository.
            mm_image_tower (`str` or `os.PathLike`, *optional*): Folder of the vision tower of an original release, as
                the model's configuration takes it.

        Returns:
            `tuple[dict[str, Any], dict[str, Any]]`: The processor's settings, and the arguments that were not used.

        Raises:
            ValueError: if the release's vision tower is unknown.
        """
        original = _read_original_config(pretrained_model_name_or_path, kwargs)
        processor_dict, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if original and "image_processor" not in processor_dict:
            processor_dict["num_image_tokens"] = count_image_tokens(
                translate_original_config(original, str(pretrained_model_name_or_path), mm_image_tower)
            )
        return processor_dict, kwargs

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path, processor_dict=None, mm_image_tower=None, **kwargs
    ):
        original = _read_original_config(pretrained_model_name_or_path, kwargs)
        if original and "image_processor" not in (processor_dict or {}):
            # Releases pad on the right as in training. Generation needs it on the left.
            tokenizer = load_original_tokenizer(pretrained_model_name_or_path, **kwargs)
            tokenizer.padding_side = "left"
            folder = str(pretrained_model_name_or_path)
            return [load_original_image_processor(original, folder, mm_image_tower), tokenizer]
        return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)


def default_chat_template(tokenizer) -> str:
    """`chat_template` with the token that the tokenizer's language model ends its answers with."""
    if OPENCHAT_END_OF_TURN in tokenizer.get_vocab():
        return chat_template(OPENCHAT_END_OF_TURN)
    if tokenizer.eos_token is None:
        raise ValueError(
            f"A {type(tokenizer).__name__} without `eos_token` does not tell how an answer ends. Set it, or pass a "
            "`chat_template`."
        )
    return chat_template(tokenizer.eos_token)


def count_image_tokens(config_dict: dict[str, Any]) -> int:
    """Features of a square view by the vision tower of a translated configuration.

    The `"default"` selection drops the first hidden state: CLIP's class embedding, but a patch of SigLIP, which has no
    such embedding.
    """
    tower = AutoConfig.for_model(**config_dict["vision_config"])
    num_features = (tower.image_size // tower.patch_size) ** 2 + (tower.model_type == "clip_vision_model")
    return num_features - (config_dict["vision_feature_select_strategy"] == "default")


def load_original_image_processor(
    config_dict: dict[str, Any], folder: str, image_tower: str | os.PathLike | None = None
) -> MoeLlavaImageProcessorPil:
    """The image processor of the vision tower of an original release, with the release's padding.

    Args:
        config_dict (`dict`): The release's `config.json`.
        folder (`str`): Where it was read from.
        image_tower (`str` or `os.PathLike`, *optional*): Folder of the vision tower, instead of `mm_image_tower`.

    Raises:
        ValueError: if the tower is unknown, or its `preprocessor_config.json` is malformed.
    """
    name = str(config_dict["mm_image_tower"])
    tower = AutoConfig.for_model(**translate_original_config(config_dict, folder, image_tower)["vision_config"])
    side = {"height": tower.image_size, "width": tower.image_size}
    if tower.model_type == "siglip_vision_model":
        settings = {
            "size": side,
            "do_center_crop": False,
            "image_mean": IMAGENET_STANDARD_MEAN,
            "image_std": IMAGENET_STANDARD_STD,
        }
    else:
        settings = {"size": {"shortest_edge": tower.image_size}, "crop_size": side}
    source = f"The vision tower {name!r}"
    places = (
        [str(image_tower)] if image_tower else [name, os.path.join(folder, name), os.path.join(folder, "..", name)]
    )
    for place in places:
        path = os.path.join(place, "preprocessor_config.json")
        if os.path.isfile(path):
            source, found = path, read_json_object(path)
            settings.update({key: found[key] for key in TOWER_SETTINGS if key in found})
            break
    try:
        return MoeLlavaImageProcessorPil(do_pad=config_dict.get("image_aspect_ratio") == "pad", **settings)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} has image processor settings that cannot be used: {error}") from error


def _read_original_config(pretrained_model_name_or_path, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The `config.json` of an original release, or `None` where it is anything else."""
    hub_arguments = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}
    config_dict, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub_arguments)
    return config_dict if is_original_config(config_dict) else None


__all__ = ["MoeLlavaProcessor"]
