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
"""PIL image processor of the families that take an image as one square view, or in slices as LLaVA-UHD does.

MoE-LLaVA and LLaVA-MoLE pad an image to a square, as LLaVA-1.5 does, and theirs differ from these in a line or two.

Source: the original codes' `expand2square` and CLIP's or SigLIP's image processor; transformers'
`LlavaImageProcessorPil`.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ImageInput, PILImageResampling, SizeDict
from transformers.processing_utils import Unpack
from transformers.utils import TensorType, auto_docstring

from .image_processing_pil_llava_uhd import (
    LlavaUhdImageProcessorKwargs,
    LlavaUhdImageProcessorPil,
    LlavaUhdSlicingMixin,
    ResampleBackend,
    _common_channels,
    check_setting,
)
from .pixels_llava_uhd import (
    PreparedImage,
    map_in_threads,
    resize_image,
    resizes_columns_first,
    to_torch_source,
    write_pixels,
)


VisionEncoding = Literal["square", "slices"]

# How far from its place, in pixels of the smaller image, each filter looks
FILTER_REACHES = {
    PILImageResampling.BOX: 0.5,
    PILImageResampling.BILINEAR: 1,
    PILImageResampling.HAMMING: 1,
    PILImageResampling.BICUBIC: 2,
    PILImageResampling.LANCZOS: 3,
}

# The square around a higher image, 256 MB or more, is never made.
MAX_SQUARE_SIDE = 8192

# A strip of one by 10**8 pixels is a small file, but its square, or its resize to a shortest edge, fills any memory.
MAX_SQUARE_PIXELS = 2**29


class SquareOrSlicesImageProcessorKwargs(LlavaUhdImageProcessorKwargs, total=False):  # type: ignore[call-arg]
    r"""
    base_size (`int`, *optional*, defaults to 336):
        For `"slices"`: side in pixels of the square whose area every view has.
    patch_size (`int`, *optional*, defaults to 14):
        For `"slices"`: side of a vision encoder patch in pixels; the sides of all views are multiples of it.
    max_slices (`int`, *optional*, defaults to 7):
        For `"slices"`: upper limit for the slices of one image.
    pre_resize_longest_edge (`int`, *optional*):
        For `"slices"`: resizes every image to this longest side, in pixels, before it is sliced.
    resample_backend (`"pil"` or `"torch"`, *optional*, defaults to `"pil"`):
        For the PIL backend: what resizes images. `"torch"` is several times as fast, and within two grey levels of
        `"pil"`; it knows `resample` bicubic and bilinear.
    use_jpeg_draft (`bool`, *optional*, defaults to `False`):
        For the PIL backend: whether to decode large JPEG files that are not loaded yet at the half, quarter or eighth
        of their size that is still at least as large as their views. Fast, but pixels are not exactly the same.
    vision_encoding (`"square"` or `"slices"`, *optional*, defaults to `"square"`):
        `"square"` is the paper's: one view of every image, of the vision tower's own size. `"slices"` is LLaVA-UHD's;
        `do_pad`, `size`, `do_center_crop`, `crop_size` and `background_color` have no effect then.
    background_color (`list[int]` or `tuple[int]`, *optional*):
        Grey level of each channel of the border that `do_pad` puts around an image to make it square. Defaults to
        `image_mean` in 8 bits, rounded down.
    """

    vision_encoding: VisionEncoding
    background_color: list[int] | tuple[int, ...] | None


class SquareOrSlicesMixin(LlavaUhdSlicingMixin):  # trf-ignore: TRF057 (no user makes one)
    """What the two backends of the image processor share: how an image becomes a square view."""

    vision_encoding: VisionEncoding

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "image_grids"] if self.vision_encoding == "slices" else ["pixel_values"]

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Counts the rows of `pixel_values` that an image gets.

        Args:
            height (`int`): Height of the image in pixels.
            width (`int`): Width of the image in pixels.
            images_kwargs (`dict[str, Any]`, *optional*): Settings for this call.

        Returns:
            `int`: 1 for `"square"`; patches of all views together for `"slices"`.
        """
        images_kwargs = images_kwargs or {}
        if images_kwargs.get("vision_encoding", self.vision_encoding) == "square":
            return 1
        return super().get_number_of_image_patches(height, width, images_kwargs)

    def _validate_preprocess_kwargs(self, **kwargs):
        encoding = kwargs["vision_encoding"]
        if encoding not in ("square", "slices"):
            raise ValueError(f'`vision_encoding` must be "square" or "slices", but is {encoding!r}.')
        if encoding == "square" and kwargs["do_resize"]:
            size = kwargs["size"]
            if not (size and (size.shortest_edge or (size.height and size.width))) or size.longest_edge:
                raise ValueError(f"`size` must have `height` and `width`, or `shortest_edge`, but is {size}.")
            for side in ("shortest_edge", "height", "width"):
                if size[side] is not None:
                    check_setting(f"`{side}` of `size`", size[side])
            if kwargs["resample"] is None:
                raise ValueError("`resample` must be given if `do_resize` is true.")
        if encoding == "square" and kwargs["do_center_crop"]:
            for side in ("height", "width"):
                check_setting(f"`{side}` of `crop_size`", kwargs["crop_size"] and kwargs["crop_size"][side])
        super()._validate_preprocess_kwargs(**kwargs)

    @staticmethod
    def square_background(
        background_color: list[int] | tuple[int, ...] | None, image_mean: Any, num_channels: int
    ) -> tuple[int, ...]:
        """Chooses the color of the border that makes an image square.

        Args:
            background_color (`list[int]` or `tuple[int, ...]`, *optional*): Grey level in 8 bits of every channel, or
                one of all. Defaults to `image_mean`.
            image_mean (`float` or `list[float]`): Mean of every channel in 0..1.
            num_channels (`int`): Channels of the image.

        Returns:
            `tuple[int, ...]`: Grey level of every channel, in 8 bits.

        Raises:
            ValueError: if there are not as many grey levels of 0..255 as channels.
        """
        if background_color is None:
            background_color = [int(255 * mean) for mean in np.atleast_1d(image_mean)]
        color = list(background_color) * (num_channels if len(background_color) == 1 else 1)
        if len(color) != num_channels or not all(0 <= level <= 255 for level in color):
            raise ValueError(
                "`background_color`, or else 255 times `image_mean`, must be one grey level of 0..255 for each of the "
                f"{num_channels} channels, but is {color}."
            )
        return tuple(color)

    @staticmethod
    def resized_size(width: int, height: int, size: SizeDict) -> tuple[int, int]:
        """Size that an image is resized to.

        Args:
            width (`int`): Width of the image in pixels.
            height (`int`): Height of the image in pixels.
            size (`SizeDict`): `height` and `width` in pixels, or `shortest_edge`, that of the shorter side.

        Returns:
            `tuple[int, int]`: `(width, height)` in pixels.
        """
        if not size.shortest_edge:
            return size.width, size.height
        short = min(width, height)
        return size.shortest_edge * width // short, size.shortest_edge * height // short

    @staticmethod
    def check_num_pixels(index: int, num_images: int, width: int, height: int) -> None:
        """Refuses a view on the way that would have so many pixels that it may not fit into memory.

        Args:
            index (`int`): Of the image among those of the call, for the message.
            num_images (`int`): Images of the call, for the message.
            width (`int`): Width of the view in pixels.
            height (`int`): Height of the view in pixels.

        Raises:
            ValueError: if it has more than `MAX_SQUARE_PIXELS`.
        """
        if width * height > MAX_SQUARE_PIXELS:
            raise ValueError(
                f"Image {index} of {num_images} is too long: to become a square view it would need {width}x{height} "
                f"pixels, but at most {MAX_SQUARE_PIXELS} are allowed."
            )

    @staticmethod
    def check_equal_sizes(sizes: list[tuple[int, int]]) -> None:
        """Refuses views that cannot be stacked.

        Args:
            sizes (`list[tuple[int, int]]`): `(width, height)` of every view in pixels.

        Raises:
            ValueError: if they differ.
        """
        if len(set(sizes)) > 1:
            raise ValueError(
                f"The views of all images of a call must have one size, but have {sizes} (width, height). Resize them "
                "to a `height` and `width`, or set `do_center_crop`."
            )


def pad_to(image: Image.Image, size: tuple[int, int], color: tuple[int, ...]) -> Image.Image:
    """Centres an image on a larger one of one color.

    Args:
        image (`Image.Image`): The image.
        size (`tuple[int, int]`): `(width, height)` of the result in pixels.
        color (`tuple[int, ...]`): Grey level of each channel of the border, in 8 bits.

    Returns:
        `Image.Image`: Of the mode of `image`.
    """
    canvas = Image.new(image.mode, size, color)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas


def pad_for_resize(
    image: Image.Image,
    color: tuple[int, ...],
    size: tuple[int, int],
    resample: int,
    resize: Callable[[Image.Image, tuple[int, int]], Image.Image],
) -> Image.Image:
    """Centres an image on a square that is to be resized to `size`; its rows may be resized already.

    Pixels are resized along rows, then along columns, and have 8 bits in between; rows of one color stay as they are.
    So the square of a long image, which would fill the memory, need not be made. Of a wide image the result is the
    same. That of one higher than `MAX_SQUARE_SIDE` differs by a grey level here and there, since PIL takes the place
    of a part in single precision.

    Args:
        image (`Image.Image`): Grey or RGB image, not square.
        color (`tuple[int, ...]`): Grey level of each channel of the border, in 8 bits.
        size (`tuple[int, int]`): `(width, height)` in pixels.
        resample (`int`): One of `FILTER_REACHES`.
        resize (`Callable`): Resizes an image to a `(width, height)` by this filter.

    Returns:
        `Image.Image`: Whose resize to `size` is that of the square.
    """
    side, width = max(image.size), size[0]
    columns_first = resizes_columns_first((side, side), size)
    if image.width == side and not columns_first:
        return pad_to(resize(image, (width, image.height)), (width, side), color)
    if side <= MAX_SQUARE_SIDE or columns_first:
        return pad_to(image, (side, side), color)
    # The columns that see something of the image, made of the part of the square that they see
    scale, left = side / width, (side - image.width) // 2
    reach = FILTER_REACHES[resample] * max(scale, 1)
    first = max(math.floor((left - reach) / scale), 0)
    last = min(math.ceil((left + image.width + reach) / scale), width)
    start, end = max(math.floor(first * scale - reach), 0), min(math.ceil(last * scale + reach), side)
    part = Image.new(image.mode, (end - start, side), color)
    part.paste(image, (left - start, 0))
    box = (first * scale - start, 0, last * scale - start, side)
    rows = Image.new(image.mode, (width, side), color)
    rows.paste(part.resize((last - first, side), resample, box), (first, 0))
    return rows


@auto_docstring(custom_intro="Makes square views of images, or slices and an overview; the backend is PIL.")
class SquareOrSlicesImageProcessorPil(SquareOrSlicesMixin, LlavaUhdImageProcessorPil):
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
            [`BatchFeature`] with `pixel_values` of shape `(num_images, channels, height, width)` for `"square"`,
            float32, or uint8 grey levels with neither `do_rescale` nor `do_normalize`. For `"slices"` of shape
            `(total_patches, channels * patch_size**2)`, and with `image_grids` of shape `(num_images, 3, 2)`, as
            [`LlavaUhdImageProcessorPil`] makes them.
        """
        return super().preprocess(images, **kwargs)

    def _preprocess(self, images: list[PreparedImage], *args, **kwargs) -> BatchFeature:
        if kwargs["vision_encoding"] == "slices":
            return super()._preprocess(images, *args, **kwargs)
        return self._preprocess_square(images, *args, **kwargs)

    def _preprocess_square(
        self,
        images: list[PreparedImage],
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
        resample_backend: ResampleBackend = "pil",
        return_tensors: str | TensorType | None = None,
        **kwargs,
    ) -> BatchFeature:
        channels = _common_channels(images)

        def resize(image, size):
            source = to_torch_source(image) if resample_backend == "torch" else image
            resized = resize_image(source, size, resample)
            return Image.fromarray(resized) if isinstance(resized, np.ndarray) else resized

        def square_view(index):
            image, _, planned_size = images[index]
            if do_resize:
                resized = self.resized_size(*self._padded_size(*planned_size, do_pad), size)
                self.check_num_pixels(index, len(images), *resized)
            if do_pad and image.width != image.height:
                side = max(image.size)
                self.check_num_pixels(index, len(images), side, side)
                background = self.square_background(background_color, image_mean, channels)
                if do_resize and image.mode in ("L", "RGB") and resample in FILTER_REACHES:
                    image = pad_for_resize(image, background, resized, resample, resize)
                else:
                    image = pad_to(image, (side, side), background)
            if do_resize:
                image = resize(image, resized)
            if do_center_crop:
                # Black where the image is smaller, as in-tree
                left, top = (image.width - crop_size.width) // 2, (image.height - crop_size.height) // 2
                image = image.crop((left, top, left + crop_size.width, top + crop_size.height))
            return image

        def write_view(index):
            normalization = self._normalization(
                images[index].white, channels, do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
            pixels = np.asarray(views[index]).reshape(height, width, channels)
            write_pixels(pixel_values[index].transpose(1, 2, 0)[None, None], pixels, normalization)

        views = map_in_threads(square_view, range(len(images)))
        self.check_equal_sizes([view.size for view in views])
        width, height = views[0].size
        dtype = self._pixel_dtype(images, do_rescale, do_normalize)
        pixel_values = np.empty((len(views), channels, height, width), dtype)
        map_in_threads(write_view, range(len(images)))
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)

    @staticmethod
    def _padded_size(width: int, height: int, do_pad: bool) -> tuple[int, int]:
        side = max(width, height)
        return (side, side) if do_pad else (width, height)

    def _least_size(self, width: int, height: int, **kwargs) -> tuple[int, int]:
        if kwargs["vision_encoding"] == "slices":
            return super()._least_size(width, height, **kwargs)
        if not kwargs["do_resize"]:
            return width, height
        padded = self._padded_size(width, height, kwargs["do_pad"])
        resized = self.resized_size(*padded, kwargs["size"])
        return math.ceil(width * resized[0] / padded[0]), math.ceil(height * resized[1] / padded[1])


__all__ = ["SquareOrSlicesImageProcessorPil", "pad_for_resize", "pad_to"]
