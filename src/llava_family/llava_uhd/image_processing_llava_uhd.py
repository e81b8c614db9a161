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
"""Torchvision image processor of LLaVA-UHD: on the device of its input, within a few grey levels of the PIL one."""

import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ImageInput, PILImageResampling, SizeDict
from transformers.processing_utils import Unpack
from transformers.utils import TensorType, auto_docstring

from .image_processing_pil_llava_uhd import (
    SLICING_SETTINGS,
    LlavaUhdImageProcessorKwargs,
    LlavaUhdSlicingMixin,
    image_grid,
)
from .pixels_llava_uhd import decoding, upright


@auto_docstring(
    custom_intro="""
    Cuts images into slices and an overview, and these into patches, by torchvision on the device of its input. Pixels
    are within a few grey levels of [`LlavaUhdImageProcessorPil`]'s.

    Source: the paper's section 3.2; transformers' `TorchvisionBackend`.
    """
)
class LlavaUhdImageProcessor(LlavaUhdSlicingMixin, TorchvisionBackend):
    valid_kwargs = LlavaUhdImageProcessorKwargs

    do_resize = True
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_convert_rgb = True
    base_size = 336
    patch_size = 14
    max_slices = 7
    pre_resize_longest_edge = None

    def __init__(self, **kwargs: Unpack[LlavaUhdImageProcessorKwargs]):
        super().__init__(**kwargs)

    @auto_docstring(custom_intro="Makes patches of images.")
    def preprocess(self, images: ImageInput, **kwargs: Unpack[LlavaUhdImageProcessorKwargs]) -> BatchFeature:
        r"""
        Returns:
            [`BatchFeature`] with `pixel_values` of shape `(total_patches, channels * patch_size**2)`, float32, patches
            of all views of all images (slices row by row, then the overview), and `image_grids` of shape `(num_images,
            3, 2)`: `(rows, columns)` of slices, of the patches of a slice, of the patches of the overview.
        """
        return super().preprocess(images, **kwargs)

    def _prepare_image_like_inputs(self, images: ImageInput, *args, expected_ndims: int = 3, **kwargs) -> list:
        images = self._prepare_images_structure(images, expected_ndims=expected_ndims)
        prepared = []
        for index, image in enumerate(images):
            try:
                prepared.append(self.process_image(image, *args, **kwargs))
            except (OSError, ValueError) as error:
                raise ValueError(f"Image {index} of {len(images)} cannot be processed: {error}") from error
        return prepared

    def process_image(self, image: ImageInput, *args, **kwargs) -> torch.Tensor:
        """As in transformers, but turned upright, and in 8 bits where it is rescaled.

        Raises:
            ValueError: if an image holds values that are no grey levels.
        """
        if isinstance(image, Image.Image):
            with decoding():
                image = upright(image)
        image = super().process_image(image, *args, **kwargs)
        if image.is_floating_point() and image.numel():
            low, high = image.aminmax()
            if not (low >= 0 and high <= 255):
                raise ValueError(
                    f"it holds values from {low} to {high}, but grey levels must be finite and lie in 0..255, or in "
                    "0..1 as floats."
                )
            if kwargs.get("do_rescale"):  # which takes 8-bit grey levels, as does the resize that rounds as PIL does
                image = (image * 255 if high <= 1 else image).round().to(torch.uint8)
        return image

    def _preprocess(
        self,
        images: list[torch.Tensor],
        do_resize: bool,
        resample: PILImageResampling | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
        patch_size: int,
        return_tensors: str | TensorType | None = None,
        **kwargs,
    ) -> BatchFeature:
        settings = {name: kwargs[name] for name in SLICING_SETTINGS if name in kwargs}
        settings.update(do_resize=do_resize, patch_size=patch_size)
        plans = self.plan_images([(image.shape[-1], image.shape[-2]) for image in images], settings)
        patches = []
        for image, (size, plan) in zip(images, plans, strict=True):
            image = self._resize_to(image, size, resample)
            for view_size, rows, columns in ((plan.refined_size, plan.rows, plan.columns), (plan.overview_size, 1, 1)):
                if view_size is None:
                    continue
                view = self._resize_to(image, view_size, resample)
                view = self.rescale_and_normalize(
                    view, do_rescale, rescale_factor, do_normalize, image_mean, image_std
                )
                patches.append(to_patches(view, rows, columns, patch_size))
        data = {
            "pixel_values": torch.cat(patches),
            "image_grids": torch.tensor([image_grid(plan) for _, plan in plans]),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _resize_to(
        self, image: torch.Tensor, size: tuple[int, int], resample: PILImageResampling | None
    ) -> torch.Tensor:
        width, height = size
        if image.shape[-2:] == (height, width):
            return image
        return self.resize(image, SizeDict(height=height, width=width), resample)


def to_patches(pixels: torch.Tensor, rows: int, columns: int, patch_size: int) -> torch.Tensor:
    """Cuts a `(channels, height, width)` image into equal views, and these into rows of `channels * patch_size**2`."""
    channels, height, width = pixels.shape
    shape = (rows, height // (rows * patch_size), patch_size, columns, width // (columns * patch_size), patch_size)
    return pixels.reshape(channels, *shape).permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, channels * patch_size**2)


__all__ = ["LlavaUhdImageProcessor"]
