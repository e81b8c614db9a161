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

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
from PIL import Image
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

from .pixels_llava_uhd import (
    TORCH_FILTERS,
    Normalization,
    PreparedImage,
    decoding,
    draft_jpeg,
    grey_levels,
    is_undecoded_jpeg,
    map_in_threads,
    open_image,
    refuse_bomb,
    resize_image,
    to_torch_source,
    upright,
    upright_size,
    write_pixels,
)
from .slicing_llava_uhd import SlicePlan, plan_slices, pre_resize_size


ResampleBackend = Literal["pil", "torch"]


class LlavaUhdImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    base_size (`int`, *optional*, defaults to 336):
        Side in pixels of the square whose area every view has.
    patch_size (`int`, *optional*, defaults to 14):
        Side of a vision encoder patch in pixels; the sides of all views are multiples of it.
    max_slices (`int`, *optional*, defaults to 7):
        Upper limit for the slices of one image. 1 keeps the overview alone, as in the paper's first training stage.
    pre_resize_longest_edge (`int`, *optional*):
        Resizes every image to this longest side, in pixels, before it is sliced. The original's evaluation uses 1024
        for GQA, TextVQA, VizWiz, VQAv2, MME, POPE and ScienceQA.
    resample_backend (`"pil"` or `"torch"`, *optional*, defaults to `"pil"`):
        For the PIL backend: what resizes images. `"pil"` has the original's pixels. `"torch"` is several times as
        fast, and every 8-bit pixel is within two grey levels of them; it knows `resample` bicubic and bilinear.
    use_jpeg_draft (`bool`, *optional*, defaults to `False`):
        For the PIL backend: whether to decode large JPEG files, given by path or bytes or not yet loaded, at the half,
        quarter or eighth of their size that is still at least as large as their views. Photographs of many megapixels
        are then several times as fast. Slices are those of the original size, but pixels are not exactly the same.
    """

    base_size: int
    patch_size: int
    max_slices: int
    pre_resize_longest_edge: int | None
    resample_backend: ResampleBackend
    use_jpeg_draft: bool


# Far more than a model takes. A number from a file may be such that views fill the memory.
MAX_VIEW_SIDE = 4096
MAX_SETTINGS = {
    "base_size": MAX_VIEW_SIDE,
    "patch_size": MAX_VIEW_SIDE,
    "max_slices": 1000,
    "pre_resize_longest_edge": 2 * MAX_VIEW_SIDE,
}

SLICING_SETTINGS = ("base_size", "patch_size", "max_slices", "pre_resize_longest_edge", "do_resize")


def check_setting(name: str, value: Any, limit: int = MAX_VIEW_SIDE) -> None:
    """Raises a `ValueError` if `value` is no integer from 1 to `limit`, by default what a view's side may have."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise ValueError(f"{name} must be an integer of 1..{limit}, but is {value!r}.")


def check_numbers(name: str, values: Sequence[Any]) -> None:
    """Raises a `ValueError` if not all `values` are finite numbers."""
    limit = sys.float_info.max
    if not all(isinstance(value, int | float | np.floating) and -limit <= value <= limit for value in values):
        raise ValueError(f"{name} must be finite numbers, but is {values!r}.")


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
    patches = np.empty((height * width // patch_size**2, channels, patch_size**2), pixels.dtype)
    places = patch_rows(patches, rows, columns, width)
    places[...] = pixels.reshape(places.shape)
    return patches


def patch_rows(patches: np.ndarray, rows: int, columns: int, width: int) -> np.ndarray:
    """The places of a `width` pixels wide image's pixels in the patches of its views, in the order of the image.

    Args:
        patches (`np.ndarray` of shape `(patches, channels, patch_size**2)`): As `to_patches` returns them.

    Returns:
        View of shape `(rows, patch rows per view, patch_size, columns, patch columns per view, patch_size, channels)`.
    """
    channels, patch_size = patches.shape[1], math.isqrt(patches.shape[2])
    shape = (rows, columns, -1, width // (columns * patch_size), channels, patch_size, patch_size)
    return patches.reshape(shape).transpose(0, 2, 5, 1, 3, 6, 4)


class LlavaUhdSlicingMixin:
    """What the two backends of the image processor share: ways in, and how an image of a given size is sliced."""

    # For the PIL backend, but a saved image processor has the settings of both.
    resample_backend: ResampleBackend = "pil"
    use_jpeg_draft = False

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "image_grids"]

    def slice_plan(self, width: int, height: int, **kwargs: Unpack[LlavaUhdImageProcessorKwargs]) -> SlicePlan:
        """Plans the views of an image under this processor's settings.

        Args:
            width (`int`): Width of the image in pixels.
            height (`int`): Height of the image in pixels.
            kwargs ([`LlavaUhdImageProcessorKwargs`]): Settings for this call.

        Returns:
            `SlicePlan`: Grid, sizes and counts of the views.

        Raises:
            ValueError: if the image cannot be sliced as asked.
        """
        settings = {name: kwargs.get(name, getattr(self, name)) for name in SLICING_SETTINGS}
        return plan_image(width, height, **settings)[1]

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Counts the rows of `pixel_values` that an image gets.

        Args:
            height (`int`): Height of the image in pixels.
            width (`int`): Width of the image in pixels.
            images_kwargs (`dict[str, Any]`, *optional*): Settings for this call.

        Returns:
            `int`: Patches of all views together.
        """
        return self.slice_plan(width, height, **(images_kwargs or {})).num_patches

    def _validate_preprocess_kwargs(self, **kwargs):
        for name, limit in MAX_SETTINGS.items():
            if name != "pre_resize_longest_edge" or kwargs[name] is not None:
                check_setting(f"`{name}`", kwargs[name], limit)
        # The size to resize to follows from each image's own, there is no `size` to ask for.
        kwargs.pop("do_resize")
        super()._validate_preprocess_kwargs(**kwargs)

    def fetch_images(self, image_url_or_urls):
        """Opens images that are given by path, URL or the bytes of a file; those in files are decoded later.

        Raises:
            ValueError: if one cannot be read, with its index among all images.
        """
        indices = itertools.count()

        def fetch(image):
            if isinstance(image, list | tuple):
                return [fetch(part) for part in image]
            index = next(indices)
            if getattr(image, "ndim", None) == 2:
                image = image[..., None]  # transformers knows no arrays without channels.
            try:
                return super(LlavaUhdSlicingMixin, self).fetch_images(open_image(image))
            except (OSError, ValueError) as error:
                name = f"{len(image)} bytes" if isinstance(image, bytes | bytearray) else f"{str(image)[:200]!r}"
                raise ValueError(f"Image {index} ({name}) cannot be read: {error}") from error

        return fetch(image_url_or_urls)

    @staticmethod
    def plan_images(sizes: list[tuple[int, int]], settings: dict[str, Any]) -> list[tuple[tuple[int, int], SlicePlan]]:
        """Plans the views of several images.

        Args:
            sizes (`list[tuple[int, int]]`): `(width, height)` of every image in pixels.
            settings (`dict[str, Any]`): Those of `SLICING_SETTINGS`.

        Returns:
            `list[tuple[tuple[int, int], SlicePlan]]`: For every image the `(width, height)` in pixels that it has
            before it is sliced, and its plan.

        Raises:
            ValueError: if an image cannot be sliced as asked; it is named by its index.
        """
        plans = []
        for index, size in enumerate(sizes):
            try:
                plans.append(plan_image(*size, **settings))
            except ValueError as error:
                raise ValueError(f"Image {index} of {len(sizes)} cannot be sliced: {error}") from error
        return plans


@auto_docstring(
    custom_intro="""
    Cuts images into slices and an overview, and these into patches. Its pixels are those of the original code.

    Source: the paper's section 3.2 and the original code; transformers' `PilBackend`.
    """
)
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

    @auto_docstring(custom_intro="Makes patches of images.")
    def preprocess(self, images: ImageInput, **kwargs: Unpack[LlavaUhdImageProcessorKwargs]) -> BatchFeature:
        r"""
        Returns:
            [`BatchFeature`] with `pixel_values` of shape `(total_patches, channels * patch_size**2)`, patches of all
            views of all images (slices row by row, then the overview), and `image_grids` of shape `(num_images, 3,
            2)`: `(rows, columns)` of slices, of the patches of a slice, of the patches of the overview. Pixel values
            are float32, or uint8 grey levels with neither `do_rescale` nor `do_normalize`: models normalise those
            themselves, on their device.

        Images are decoded, resized and written on as many threads as torch may use, `torch.get_num_threads()`.
        """
        return super().preprocess(images, **kwargs)

    def _validate_preprocess_kwargs(self, **kwargs):
        backend, resample = kwargs["resample_backend"], kwargs["resample"]
        if backend not in ("pil", "torch"):
            raise ValueError(f'`resample_backend` must be "pil" or "torch", but is {backend!r}.')
        if resample is not None and resample not in list(PILImageResampling):
            raise ValueError(f"`resample` must be one of `PIL.Image.Resampling`, but is {resample!r}.")
        if kwargs["do_rescale"]:
            check_numbers("`rescale_factor`", [kwargs["rescale_factor"]])
        for name in ("image_mean", "image_std") if kwargs["do_normalize"] else ():
            stats = kwargs[name]
            check_numbers(f"`{name}`", stats if isinstance(stats, list | tuple) else [stats])
        if backend == "torch" and resample not in TORCH_FILTERS:
            raise ValueError(
                f'`resample_backend="torch"` resizes by bicubic or bilinear filters, but `resample` is {resample!r}.'
            )
        super()._validate_preprocess_kwargs(**kwargs)

    def _prepare_image_like_inputs(self, images: ImageInput, *args, expected_ndims: int = 3, **kwargs) -> list:
        images = self._prepare_images_structure(images, expected_ndims=expected_ndims)
        # An image that occurs again is the same one: no two threads may decode it.
        indices = {id(image): index for index, image in reversed(list(enumerate(images)))}

        def prepare(index):
            is_file = isinstance(images[index], Image.Image)
            try:
                with decoding() if is_file else nullcontext():
                    return self._prepare_image(images[index], *args, **kwargs)
            except (OSError, ValueError) as error:
                raise ValueError(f"Image {index} of {len(images)} cannot be processed: {error}") from error

        first_indices = sorted(indices.values())
        prepared = dict(zip(first_indices, map_in_threads(prepare, first_indices), strict=True))
        return [prepared[indices[id(image)]] for image in images]

    def _prepare_image(self, image: ImageInput, *args, **kwargs) -> PreparedImage:
        size = None
        if kwargs["use_jpeg_draft"] and is_undecoded_jpeg(image):
            size = upright_size(image)
            image = draft_jpeg(image, self._least_size(*size, **kwargs))
        image, white = self.process_image(image, *args, **kwargs)
        return PreparedImage(image, white, size or image.size)

    def _least_size(self, width: int, height: int, **kwargs) -> tuple[int, int]:
        """Least `(width, height)` of a draft, from which no view is scaled up that is scaled down from the image."""
        size, plan = plan_image(width, height, **{name: kwargs[name] for name in SLICING_SETTINGS})
        if size != (width, height):
            return size
        refined_size = plan.refined_size or plan.overview_size
        return max(refined_size[0], plan.overview_size[0]), max(refined_size[1], plan.overview_size[1])

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Unpack[ImagesKwargs],
    ) -> tuple[Image.Image, float]:
        """Brings a PIL image or an array to 8 bits, upright and, with `do_convert_rgb`, to RGB over white.

        Returns:
            The image, and the value that its grey level 255 stands for.

        Raises:
            ValueError: if the image has no pixels or too many to be decoded, or holds values that are no grey levels.
        """
        white = 255.0
        if isinstance(image, Image.Image):
            refuse_bomb(image)
            image = upright(image)
            if min(image.size) < 1:
                raise ValueError(f"it has {image.width}x{image.height} pixels, but each side must have at least one.")
            if image.mode.startswith(("I", "F")):
                levels, white = grey_levels(np.asarray(image))  # PIL would clip them at 255.
                image = Image.fromarray(levels)
        else:
            image, white = self._array_to_image(image, input_data_format)
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
        levels, white = grey_levels(array)
        return Image.fromarray(np.ascontiguousarray(levels)), white

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
        resample_backend: ResampleBackend = "pil",
        return_tensors: str | TensorType | None = None,
        **kwargs,
    ) -> BatchFeature:
        settings = {name: kwargs[name] for name in SLICING_SETTINGS if name in kwargs}
        settings.update(do_resize=do_resize, patch_size=patch_size)
        plans = self.plan_images([image.size for image in images], settings)
        channels = _common_channels(images)
        normalization = (channels, do_rescale, rescale_factor, do_normalize, image_mean, image_std)
        num_patches = sum(plan.num_patches for _, plan in plans)
        dtype = self._pixel_dtype(images, do_rescale, do_normalize)
        pixel_values = np.empty((num_patches, channels, patch_size**2), dtype)

        def pre_resize(index):
            (image, _, planned_size), (size, _) = images[index], plans[index]
            source = to_torch_source(image) if resample_backend == "torch" else image
            return source if size == planned_size else resize_image(source, size, resample)

        def write_view(view):
            index, size, places = view
            pixels = np.asarray(resize_image(sources[index], size, resample)).reshape(size[1], size[0], channels)
            write_pixels(places, pixels, self._normalization(images[index].white, *normalization))

        sources = map_in_threads(pre_resize, range(len(images)))
        map_in_threads(write_view, self._places_of_views([plan for _, plan in plans], pixel_values))
        data = {
            "pixel_values": pixel_values.reshape(num_patches, -1),
            "image_grids": np.array([image_grid(plan) for _, plan in plans], dtype=np.int64),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)

    @staticmethod
    def _places_of_views(
        plans: list[SlicePlan], patches: np.ndarray
    ) -> Iterator[tuple[int, tuple[int, int], np.ndarray]]:
        """For each size that an image is resized to: the image's index, the size, and its places in the `patches`."""
        start = 0
        for index, plan in enumerate(plans):
            for size, rows, columns in ((plan.refined_size, plan.rows, plan.columns), (plan.overview_size, 1, 1)):
                if size is not None:
                    end = start + size[0] * size[1] // plan.patch_size**2
                    yield index, size, patch_rows(patches[start:end], rows, columns, size[0])
                    start = end

    @staticmethod
    def _pixel_dtype(images: list[PreparedImage], do_rescale: bool, do_normalize: bool) -> type[np.generic]:
        is_grey_levels = not do_rescale and not do_normalize and all(image.white == 255 for image in images)
        return np.uint8 if is_grey_levels else np.float32

    @staticmethod
    def _normalization(
        white: float,
        num_channels: int,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
    ) -> Normalization:
        # What came as floats in 0..1 is rescaled already, whatever the flag says: back to what it was.
        factor = 1 / 255 if white == 1.0 else float(rescale_factor) if do_rescale else None
        mean, std = (
            np.broadcast_to(np.asarray(stat, dtype=np.float32), (num_channels,)) if do_normalize else None
            for stat in (image_mean, image_std)
        )
        return Normalization(factor, mean, std)


def _common_channels(images: list[PreparedImage]) -> int:
    channels = [len(image.image.getbands()) for image in images]
    if len(set(channels)) > 1:
        raise ValueError(
            f"With `do_convert_rgb=False` all images of a call must have as many channels, but they have {channels}."
        )
    return channels[0]


__all__ = ["LlavaUhdImageProcessorPil"]
