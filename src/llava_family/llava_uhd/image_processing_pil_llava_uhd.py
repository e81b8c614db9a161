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
"""PIL image processor of LLaVA-UHD, the default: its pixels are those of the original code."""

from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType, auto_docstring

from .slicing_llava_uhd import SlicePlan, plan_slices, pre_resize_size


class LlavaUhdImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    base_size (`int`, *optional*, defaults to 336):
        Side of the square whose area every view has.
    patch_size (`int`, *optional*, defaults to 14):
        Side of a vision encoder patch; the sides of all views are multiples of it.
    max_slices (`int`, *optional*, defaults to 7):
        Upper limit for the slices of one image. 1 keeps the overview alone, as in the paper's first training stage.
    pre_resize_longest_edge (`int`, *optional*):
        Resizes every image to this longest side before it is sliced. The original's evaluation uses 1024 for GQA,
        TextVQA, VizWiz, VQAv2, MME, POPE and ScienceQA.
    """

    base_size: int
    patch_size: int
    max_slices: int
    pre_resize_longest_edge: int | None


SLICING_SETTINGS = ("base_size", "patch_size", "max_slices", "pre_resize_longest_edge", "do_resize")


# A prepared image, and the value that its grey level 255 stands for: 255, or 1 for float arrays in 0..1
PreparedImage = tuple[Image.Image, float]


def plan_image(
    width: int,
    height: int,
    *,
    base_size: int,
    patch_size: int,
    max_slices: int,
    pre_resize_longest_edge: int | None = None,
    do_resize: bool = True,
) -> tuple[tuple[int, int], SlicePlan]:
    """The `(width, height)` that an image has before it is sliced, and its plan.

    Raises:
        ValueError: if the image cannot be sliced as asked.
    """
    if not do_resize:
        if width % patch_size or height % patch_size:
            raise ValueError(
                f"Without `do_resize` both sides must be multiples of `patch_size` ({patch_size}), but the image has "
                f"{width}x{height} pixels."
            )
        return (width, height), SlicePlan(0, 0, None, (width, height), patch_size)
    if pre_resize_longest_edge is not None:
        width, height = pre_resize_size(width, height, pre_resize_longest_edge)
    plan = plan_slices(width, height, base_size=base_size, patch_size=patch_size, max_slices=max_slices)
    return (width, height), plan


def image_grid(plan: SlicePlan) -> list[tuple[int, int]]:
    """One row of `image_grids`: `(rows, columns)` of slices, of patches of a slice (0 without), of the overview."""
    grids = plan.view_grids
    return [(plan.rows, plan.columns), grids[0] if plan.num_slices else (0, 0), grids[-1]]


def to_patches(pixels: np.ndarray, rows: int, columns: int, patch_size: int) -> np.ndarray:
    """Cuts a `(height, width, channels)` image into equal views and these into patches.

    Returns:
        `np.ndarray` of shape `(rows * columns * patches per view, channels, patch_size**2)`; views row by row, and the
        patches of each row by row.
    """
    height, width, channels = pixels.shape
    shape = (rows, height // (rows * patch_size), patch_size, columns, width // (columns * patch_size), patch_size)
    patches = pixels.reshape(*shape, channels).transpose(0, 3, 1, 4, 6, 2, 5)
    return patches.reshape(-1, channels, patch_size**2)


class LlavaUhdSlicingMixin:
    """What the two backends of the image processor share: how an image of a given size is sliced."""

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "image_grids"]

    def slice_plan(self, width: int, height: int, **kwargs: Unpack[LlavaUhdImageProcessorKwargs]) -> SlicePlan:
        """The plan for an image of `width` x `height` pixels under this processor's settings or those in `kwargs`."""
        settings = {name: kwargs.get(name, getattr(self, name)) for name in SLICING_SETTINGS}
        return plan_image(width, height, **settings)[1]

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Rows of `pixel_values` for an image of `height` x `width` pixels."""
        return self.slice_plan(width, height, **(images_kwargs or {})).num_patches

    def _validate_preprocess_kwargs(self, **kwargs):
        # The size to resize to follows from each image's own, there is no `size` to ask for.
        kwargs.pop("do_resize")
        super()._validate_preprocess_kwargs(**kwargs)

    @staticmethod
    def plan_images(sizes: list[tuple[int, int]], settings: dict[str, Any]) -> list[tuple[tuple[int, int], SlicePlan]]:
        """`plan_image` of every `(width, height)`, with errors that name the image."""
        plans = []
        for index, size in enumerate(sizes):
            try:
                plans.append(plan_image(*size, **settings))
            except ValueError as error:
                raise ValueError(f"Image {index} of {len(sizes)} cannot be sliced: {error}") from error
        return plans


@auto_docstring
class LlavaUhdImageProcessorPil(LlavaUhdSlicingMixin, PilBackend):
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

    @auto_docstring
    def preprocess(self, images: ImageInput, **kwargs: Unpack[LlavaUhdImageProcessorKwargs]) -> BatchFeature:
        r"""
        Returns:
            [`BatchFeature`] with `pixel_values` of shape `(total_patches, channels * patch_size**2)`, float32, patches
            of all views of all images (slices row by row, then the overview), and `image_grids` of shape `(num_images,
            3, 2)`: `(rows, columns)` of slices, of the patches of a slice, of the patches of the overview.
        """
        return super().preprocess(images, **kwargs)

    def fetch_images(self, image_url_or_urls):
        try:
            return super().fetch_images(image_url_or_urls)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            if isinstance(image_url_or_urls, str):
                raise ValueError(f"The image {image_url_or_urls!r} cannot be read: {error}") from error
            raise

    def _prepare_image_like_inputs(self, images: ImageInput, *args, expected_ndims: int = 3, **kwargs) -> list:
        images = self._prepare_images_structure(images, expected_ndims=expected_ndims)
        prepared = []
        for index, image in enumerate(images):
            try:
                prepared.append(self.process_image(image, *args, **kwargs))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise ValueError(f"Image {index} of {len(images)} cannot be processed: {error}") from error
        return prepared

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Unpack[ImagesKwargs],
    ) -> PreparedImage:
        """Brings a PIL image or an array to 8 bits, upright and, with `do_convert_rgb`, to RGB over white.

        Raises:
            ValueError: if the image has no pixels, or an array holds values that are no grey levels.
        """
        white = 255.0
        if isinstance(image, Image.Image):
            image = ImageOps.exif_transpose(image)
        else:
            image, white = self._array_to_image(image, input_data_format)
        if min(image.size) < 1:
            raise ValueError(f"it has {image.width}x{image.height} pixels, but each side must have at least one.")
        if do_convert_rgb and image.mode != "RGB":
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
        return image, white

    def _array_to_image(
        self, array: Any, input_data_format: str | ChannelDimension | None
    ) -> tuple[Image.Image, float]:
        array = array.numpy(force=True) if hasattr(array, "numpy") else np.asarray(array)
        if array.size == 0:
            raise ValueError(f"it is an array of shape {array.shape}, without any pixels.")
        if array.ndim == 3:
            layout = input_data_format or infer_channel_dimension_format(array, num_channels=(1, 3, 4))
            array = np.moveaxis(array, 0, -1) if layout == ChannelDimension.FIRST else array
        array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
        low, high = array.min(), array.max()
        if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > 255:
            raise ValueError(
                f"it is an array with values from {low} to {high}, but grey levels must be finite and lie in 0..255, "
                "or in 0..1 as floats."
            )
        white = 1.0 if array.dtype.kind in "fb" and high <= 1 else 255.0
        if array.dtype != np.uint8:
            array = np.rint(array.astype(np.float32) * (255.0 / white)).astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(array)), white

    def _preprocess(
        self,
        images: list[PreparedImage],
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
        plans = self.plan_images([image.size for image, _ in images], settings)
        channels = _common_channels(images)
        num_patches = sum(plan.num_patches for _, plan in plans)
        pixel_values = np.empty((num_patches, channels, patch_size**2), dtype=np.float32)
        start = 0
        for (image, white), (size, plan) in zip(images, plans, strict=True):
            values = self._grey_level_values(
                channels, white, do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
            image = image if image.size == size else image.resize(size, resample)
            for view_size, rows, columns in ((plan.refined_size, plan.rows, plan.columns), (plan.overview_size, 1, 1)):
                if view_size is None:
                    continue
                view = image if image.size == view_size else image.resize(view_size, resample)
                pixels = np.asarray(view).reshape(view.height, view.width, channels)
                patches = to_patches(pixels, rows, columns, patch_size)
                target = pixel_values[start : start + len(patches)]
                for channel in range(channels):
                    target[:, channel] = values[channel][patches[:, channel]]
                start += len(patches)
        data = {
            "pixel_values": pixel_values.reshape(num_patches, -1),
            "image_grids": np.array([image_grid(plan) for _, plan in plans], dtype=np.int64),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)

    @staticmethod
    def _grey_level_values(
        num_channels: int,
        white: float,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
    ) -> np.ndarray:
        """What each of the 256 grey levels becomes in each channel, `(channels, 256)`.

        Looking the levels up is exact, since rescaling and normalising see one pixel at a time, and touches each once.
        """
        levels = np.arange(256)
        if white == 1.0:
            levels = (levels / 255).astype(np.float32)
        elif do_rescale:
            levels = (levels * rescale_factor).astype(np.float32)
        values = np.tile(levels.astype(np.float32), (num_channels, 1))
        if do_normalize:
            mean, std = (
                np.broadcast_to(np.asarray(stat, dtype=np.float32), (num_channels,))
                for stat in (image_mean, image_std)
            )
            values = (values - mean[:, None]) / std[:, None]
        return values


def _common_channels(images: list[PreparedImage]) -> int:
    channels = [len(image.getbands()) for image, _ in images]
    if len(set(channels)) > 1:
        raise ValueError(
            f"With `do_convert_rgb=False` all images of a call must have as many channels, but they have {channels}."
        )
    return channels[0]


__all__ = ["LlavaUhdImageProcessorPil"]
