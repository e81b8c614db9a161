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
"""Torchvision image processor of the families that take an image as one square view, or in slices.

Source: the original codes' `expand2square`; transformers' `LlavaImageProcessor`.
"""

import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ImageInput, PILImageResampling, SizeDict
from transformers.processing_utils import Unpack
from transformers.utils import TensorType, auto_docstring

from .image_processing_llava_uhd import LlavaUhdImageProcessor
from .image_processing_pil_square_llava_uhd import SquareOrSlicesImageProcessorKwargs, SquareOrSlicesMixin


@auto_docstring(custom_intro="Makes square views of images, or slices and an overview; the backend is torchvision.")
class SquareOrSlicesImageProcessor(SquareOrSlicesMixin, LlavaUhdImageProcessor):
    valid_kwargs = SquareOrSlicesImageProcessorKwargs

    vision_encoding = "square"
    do_pad = True
    background_color = None
    do_resize = True
    size = {"shortest_edge": 336}
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    do_center_crop = True
    crop_size = {"height": 336, "width": 336}
    do_rescale = True
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_convert_rgb = True

    def __init__(self, **kwargs: Unpack[SquareOrSlicesImageProcessorKwargs]):
        super().__init__(**kwargs)

    @auto_docstring(custom_intro="Makes square views of images, or patches of their slices.")
    def preprocess(self, images: ImageInput, **kwargs: Unpack[SquareOrSlicesImageProcessorKwargs]) -> BatchFeature:
        r"""
        Returns:
            [`BatchFeature`] with `pixel_values`, float32, of shape `(num_images, channels, height, width)` for
            `"square"`. For `"slices"` of shape `(total_patches, channels * patch_size**2)`, and with `image_grids` of
            shape `(num_images, 3, 2)`, as [`LlavaUhdImageProcessor`] makes them.
        """
        return super().preprocess(images, **kwargs)

    def _preprocess(self, images: list[torch.Tensor], *args, **kwargs) -> BatchFeature:
        if kwargs["vision_encoding"] == "slices":
            return super()._preprocess(images, *args, **kwargs)
        return self._preprocess_square(images, *args, **kwargs)

    def _preprocess_square(
        self,
        images: list[torch.Tensor],
        do_pad: bool,
        background_color: list[int] | tuple[int, ...] | None,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | None,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
        return_tensors: str | TensorType | None = None,
        **kwargs,
    ) -> BatchFeature:
        views = []
        for index, image in enumerate(images):
            if not image.numel():
                raise ValueError(
                    f"Image {index} of {len(images)} is of shape {tuple(image.shape)}, without any pixels."
                )
            if do_pad:
                side = max(image.shape[-2:])
                self.check_num_pixels(index, len(images), side, side)
                image = self.pad_to_square(image, self.square_background(background_color, image_mean, len(image)))
            if do_resize:
                resized = self.resized_size(image.shape[-1], image.shape[-2], size)
                self.check_num_pixels(index, len(images), *resized)
                image = self._resize_to(image, resized, resample)
            if do_center_crop:
                image = self.center_crop(image, crop_size)
            views.append(
                self.rescale_and_normalize(image, do_rescale, rescale_factor, do_normalize, image_mean, image_std)
            )
        self.check_equal_sizes([(view.shape[-1], view.shape[-2]) for view in views])
        return BatchFeature(data={"pixel_values": torch.stack(views)}, tensor_type=return_tensors)

    @staticmethod
    def pad_to_square(image: torch.Tensor, color: tuple[int, ...]) -> torch.Tensor:
        """Centres an image on a square of one color.

        Args:
            image (`torch.Tensor` of shape `(channels, height, width)`, uint8 or float32): The image.
            color (`tuple[int, ...]`): Grey level of each channel of the border, in 8 bits.

        Returns:
            `torch.Tensor` of shape `(channels, side, side)`, in the dtype and the range of `image`.
        """
        height, width = image.shape[-2:]
        if height == width:
            return image
        side = max(height, width)
        background = torch.tensor(color, device=image.device)
        if image.is_floating_point() and image.max() <= 1:
            background = background / 255
        canvas = background.to(image.dtype)[:, None, None].repeat(1, side, side)
        top, left = (side - height) // 2, (side - width) // 2
        canvas[:, top : top + height, left : left + width] = image
        return canvas


__all__ = ["SquareOrSlicesImageProcessor"]
