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
"""What the families with experts share: square views or LLaVA-UHD's slices, and how a balance loss counts.

It lies here since families import LLaVA-UHD alone, and never each other.

Source: square views are transformers' `LlavaModel`'s, slices LLaVA-UHD's.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import AutoModel

from .modeling_llava_uhd import (
    ImagePlaceholderMixin,
    LlavaUhdResampler,
    LlavaUhdVisionModel,
    encode_views,
    normalize_grey_levels,
)


class SquareProjector(nn.Module):
    """LLaVA-1.5's: two linear layers around an activation, from the vision tower's width to the text model's.

    Source: the original codes' `mlp2x_gelu`; transformers' `LlavaMultiModalProjector`.

    Args:
        config (`SquareOrSlicesConfig`): With `vision_config`, `text_config` and `projector_hidden_act`.
    """

    def __init__(self, config):
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """Maps image features to the text model's width.

        Args:
            image_features (`torch.FloatTensor` of shape `(num_images, num_features, vision_hidden_size)`): Hidden
                states of the vision tower.

        Returns:
            `torch.FloatTensor` of shape `(num_images, num_features, hidden_size)`.
        """
        return self.linear_2(self.act(self.linear_1(image_features)))


class SquareOrSlicesMixin(ImagePlaceholderMixin):
    """A model whose configuration is a [`SquareOrSlicesConfig`]: how it sees images, and runs its text model."""

    if TYPE_CHECKING:  # transformers reads the annotations of a model's classes, and this one would hide its own
        config: Any
        language_model: Any

    def add_vision(self, config) -> None:
        """
        Adds the vision tower, and what is between it and the text model.

        Args:
            config (`SquareOrSlicesConfig`): The model; `vision_encoding` says which of the two it gets.
        """
        # CODEPATH: all releases are square; slices combine LLaVA-UHD's front end with experts
        if config.vision_encoding == "slices":
            self.vision_tower = LlavaUhdVisionModel._from_config(config.vision_config)
            self.resampler = LlavaUhdResampler(config)
        else:
            self.vision_tower = AutoModel.from_config(config.vision_config)
            self.multi_modal_projector = SquareProjector(config)

    def encode_images(
        self, pixel_values: torch.FloatTensor, image_grids: torch.LongTensor | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """
        Encodes images and maps their features to the text model's width.

        Args:
            pixel_values (`torch.FloatTensor`): Of shape `(num_images, num_channels, height, width)`, or
                `(total_patches, num_channels * patch_size**2)` for slices, as the image processor returns them.
            image_grids (`torch.LongTensor` of shape `(num_images, 3, 2)`, *optional*):
                For slices: `(rows, columns)` of slices, of the patches of one, of the overview's.

        Returns:
            `BaseModelOutputWithPooling`: The vision tower's outputs. `pooler_output` has for every image a tensor of
            shape `(num_features, hidden_size)`.
        """
        # CODEPATH: all releases are square
        if self.config.vision_encoding == "slices":
            grids: Any = image_grids  # which slices come with
            return encode_views(self.vision_tower, self.resampler, pixel_values, grids, **kwargs)
        # A layer's number captures this layer only; who asks for all of them gets them.
        layer = self.config.vision_feature_layer
        kwargs["output_hidden_states"] = kwargs.get("output_hidden_states") or layer
        outputs = self.vision_tower(normalize_grey_levels(pixel_values, self.config), return_dict=True, **kwargs)
        features = outputs.hidden_states[layer]
        # CODEPATH: "default" for all releases, those with SigLIP too
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        outputs.pooler_output = list(self.multi_modal_projector(features))
        return outputs

    def run_text_model(
        self,
        input_ids: torch.LongTensor | None,
        pixel_values: torch.FloatTensor | None,
        image_grids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        past_key_values: Cache | None,
        inputs_embeds: torch.FloatTensor | None,
        output_router_logits: bool | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """
        Merges images into the prompt and runs the text model; arguments are as in [`MoeLlavaModel.forward`].

        Returns:
            `dict[str, Any]`: The fields of a model's output.
        """
        image_inputs = {} if image_grids is None else {"image_grids": image_grids}
        inputs_embeds, image_features = self.merge_images(
            input_ids, inputs_embeds, pixel_values, mm_encoder_outputs, past_key_values, **image_inputs
        )
        if position_ids is None:
            position_ids = self.unpadded_positions(attention_mask, inputs_embeds.shape[1])
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        return {
            "last_hidden_state": outputs.last_hidden_state,
            "past_key_values": outputs.past_key_values,
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
            "router_logits": getattr(outputs, "router_logits", None) or None,
            "image_hidden_states": image_features,
        }


def counted_tokens(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Tells which tokens count in a balance loss.

    Args:
        attention_mask (`torch.LongTensor` of shape `(batch_size, total_length)`, *optional*): 0 where a token is
            padding. Masks of other shapes, which static caches have, tell nothing.
        length (`int`): Tokens of this call, the last ones of the mask.

    Returns:
        `torch.LongTensor` of shape `(batch_size, length)`; None where nothing tells which tokens are padding.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -length:]


def add_balance_loss(
    loss: torch.Tensor,
    balance_loss: torch.Tensor,
    coefficient: float,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
) -> torch.Tensor:
    """Adds the weighted balance loss, a mean over the tokens of one call, to the loss.

    Where `Trainer` passes `num_items_in_batch`, the labels of all calls of a step, it counts by this call's share of
    them: gradient accumulation averages it.

    Source: the original codes, which add the mean of every call; `num_items_in_batch` is transformers'.

    Args:
        loss (`torch.FloatTensor` of shape `()`): Of the labels.
        balance_loss (`torch.FloatTensor` of shape `()`): Not yet weighted.
        coefficient (`float`): Its weight.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Token ids; -100 where nothing is learned.
        num_items_in_batch (`torch.LongTensor` of shape `()` or `int`, *optional*): Labels of the step.

    Returns:
        `torch.FloatTensor` of shape `()`.
    """
    share: torch.Tensor | float = 1.0
    if num_items_in_batch is not None:
        share = (labels[..., 1:] != -100).sum().to(loss.device) / num_items_in_batch
    return loss + coefficient * share * balance_loss.to(loss.device)


__all__ = ["SquareOrSlicesMixin", "SquareProjector", "add_balance_loss", "counted_tokens"]
