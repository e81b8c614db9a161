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
"""From image files to pixel values: opening, decoding, resizing and writing, on as many threads as torch may use.

PIL, numpy and torch release the interpreter's lock while they work, so plain threads share the cores.

Source: PIL's own operations; their pixels and roundings are those of the original code.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from transformers.image_utils import PILImageResampling


# torch resizes by no other filter as PIL does; PIL's own default is bicubic
TORCH_FILTERS = {
    None: "bicubic",
    PILImageResampling.BICUBIC: "bicubic",
    PILImageResampling.BILINEAR: "bilinear",
}

PILLOW_VERSION = int(PIL.__version__.split(".")[0])


class PreparedImage(NamedTuple):
    """An image before it is resized.

    Attributes:
        image (`Image.Image`): The image, upright, of 8 bits.
        white (`float`): The value that its grey level 255 stands for: 255, or 1 for float arrays in 0..1.
        size (`tuple[int, int]`): `(width, height)` in pixels that its views are planned for, which a draft is smaller
            than.
    """

    image: Image.Image
    white: float
    size: tuple[int, int]


def map_in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Calls a function with every item, on up to `torch.get_num_threads()` threads.

    That number is 1 in the worker processes of a torch `DataLoader`. Threads are not kept: a fork would lose them. An
    exception is that of the first failing item.

    Args:
        function (`Callable[[Any], Any]`): What to call; it must be safe to run in several threads.
        items (`Iterable[Any]`): Its arguments.

    Returns:
        `list[Any]`: The results in the order of the items.
    """
    items = list(items)
    num_threads = min(torch.get_num_threads(), len(items))
    if num_threads <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(function, items))


@contextmanager
def decoding() -> Iterator[None]:
    """Makes a `ValueError` of whatever PIL raises on a broken file: its decoders stumble in any way there is.

    Raises:
        OSError: as PIL raises it.
        ValueError: in place of any other exception.
    """
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"PIL cannot decode it: {type(error).__name__}: {error}") from error


def open_image(image: Any) -> Any:
    """Opens the image in a file, without decoding it yet.

    Args:
        image (`str`, `os.PathLike` or `bytes`): Path or content of the file. Anything else, also a `str` that names no
            file, such as a URL, is returned as it is.

    Returns:
        `Image.Image`: The opened image.

    Raises:
        OSError: if there is no such file, or no image in it.
        ValueError: if it has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if isinstance(image, os.PathLike) or (isinstance(image, str) and os.path.isfile(image)):
        # Read, not kept open: a list may have more images than a process may have open files.
        with open(image, "rb") as file:
            image = file.read()
    if not isinstance(image, bytes | bytearray):
        return image
    with decoding():
        # PIL may warn of what is refused below. To filter that here would change the filters of other threads.
        opened = Image.open(BytesIO(image))
    refuse_bomb(opened)
    return opened


def refuse_bomb(image: Image.Image) -> None:
    """Refuses an image that is not decoded yet and has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.

    PIL itself only warns of up to twice as many.

    Args:
        image (`Image.Image`): An opened image.

    Raises:
        ValueError: if it has.
    """
    limit, num_pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if limit is not None and num_pixels > limit and getattr(image, "tile", None):
        raise ValueError(
            f"it has {image.width}x{image.height} pixels, {num_pixels / 1e6:.1f} million, but the limit against "
            f"decompression bombs is {limit / 1e6:.1f} million. If you trust it, set `PIL.Image.MAX_IMAGE_PIXELS`."
        )


def grey_levels(levels: np.ndarray) -> tuple[np.ndarray, float]:
    """Brings grey levels to 8 bits.

    16-bit levels keep their range: 65535 becomes 255. So do 32-bit ones that are too large for 8 bits.

    Args:
        levels (`np.ndarray` of any shape but empty): Floats in 0..1 or 0..255, booleans, or integers.

    Returns:
        `tuple[np.ndarray, float]`: The levels in uint8, of the shape of `levels`, and the value that 255 stands for:
        255, or 1 for floats in 0..1.

    Raises:
        ValueError: if they lie elsewhere.
    """
    low, high = levels.min(), levels.max()
    is_16_bit = levels.dtype == np.uint16 or (levels.dtype == np.int32 and 255 < high <= 65535)
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or (high > 255 and not is_16_bit):
        raise ValueError(
            f"it is an array with values from {low} to {high}, but grey levels must be finite and lie in 0..255, in "
            "0..1 as floats, or in 0..65535 as uint16."
        )
    if levels.dtype == np.uint8:
        return levels, 255.0
    white = 1.0 if levels.dtype.kind in "fb" and high <= 1 else 255.0
    factor = 255 / 65535 if is_16_bit else 255.0 / white
    return np.rint(levels.astype(np.float32) * np.float32(factor)).astype(np.uint8), white


def upright(image: Image.Image) -> Image.Image:
    """Turns an image as its EXIF orientation says that it is to be shown.

    Args:
        image (`Image.Image`): An opened image. It is decoded here.

    Returns:
        `Image.Image`: A turned copy, or `image` itself where that is how it lies.
    """
    image.load()  # The EXIF data of a PNG file may stand behind its pixels.
    return ImageOps.exif_transpose(image) if _orientation(image) in range(2, 9) else image


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def is_undecoded_jpeg(image: Any) -> bool:
    """Whether `image` is the first image of a JPEG file, and its pixels are still to be decoded.

    Args:
        image (`Any`): A PIL image, or anything else.
    """
    return isinstance(image, JpegImageFile) and bool(image.tile) and image.fp is not None and image.tell() == 0


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Size that an undecoded JPEG will have when it is upright.

    Args:
        image (`Image.Image`): An opened image.

    Returns:
        `tuple[int, int]`: `(width, height)` in pixels.
    """
    return (image.height, image.width) if _orientation(image) in range(5, 9) else image.size


def draft_jpeg(image: JpegImageFile, size: tuple[int, int]) -> Image.Image:
    """Opens an undecoded JPEG once more, to be decoded at 1/2, 1/4 or 1/8 of its size where that is at least `size`.

    Args:
        image (`JpegImageFile`): An undecoded JPEG, which is left as it is: PIL would draft it for whoever owns it.
        size (`tuple[int, int]`): Least `(width, height)` in pixels of the decoded image when it is upright.

    Returns:
        `Image.Image`: The draft, not decoded yet.
    """
    draft = Image.open(image.fp)  # type: ignore[arg-type]
    draft.draft(None, size if upright_size(image) == image.size else size[::-1])
    return draft


def resizes_columns_first(old_size: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether PIL resizes an image along its columns before its rows; before Pillow 13 it never did.

    Args:
        old_size (`tuple[int, int]`): `(width, height)` of the image in pixels.
        size (`tuple[int, int]`): `(width, height)` in pixels that it is resized to.
    """
    (old_width, old_height), (width, height) = old_size, size
    return PILLOW_VERSION >= 13 and 0 < old_height - height > 2 * (old_width - width)


def resize_image(
    image: Image.Image | np.ndarray, size: tuple[int, int], resample: int | None
) -> Image.Image | np.ndarray:
    """Resizes a PIL image by PIL, or an array by torch, which comes within two grey levels of PIL.

    Args:
        image (`Image.Image`, or `np.ndarray` of shape `(height, width)` or `(height, width, channels)`): 8-bit image.
        size (`tuple[int, int]`): `(width, height)` in pixels to resize it to.
        resample (`int`, *optional*): PIL's filter; for arrays one of `TORCH_FILTERS`.

    Returns:
        `Image.Image`, or `np.ndarray` of shape `(height, width)` or `(height, width, channels)` in uint8: Of the kind
        of `image`.
    """
    if isinstance(image, Image.Image):
        return image if image.size == size else image.resize(size, resample)
    width, height = size
    old_height, old_width = image.shape[:2]
    tensor = torch.from_numpy(image).reshape(1, old_height, old_width, -1).permute(0, 3, 1, 2)  # channels last: fast
    sizes = [(height, width)]
    # In between, values are rounded and clamped to 8 bits. torch resizes horizontally first, as Pillow before 13 did.
    if resizes_columns_first((old_width, old_height), size):
        sizes.insert(0, (height, old_width))
    for new_size in sizes:
        if tensor.shape[2:] != new_size:
            mode = TORCH_FILTERS[resample]
            tensor = torch.nn.functional.interpolate(tensor, new_size, mode=mode, antialias=True)
    return tensor.permute(0, 2, 3, 1).reshape(height, width, *image.shape[2:]).numpy()


def to_torch_source(image: Image.Image) -> Image.Image | np.ndarray:
    """Makes the array that torch resizes, unless PIL does more to the image, such as weighing colors by their opacity.

    Args:
        image (`Image.Image`): A decoded image.

    Returns:
        `np.ndarray` of shape `(height, width)` or `(height, width, 3)` in uint8 for a grey or RGB image; any other
        image itself.
    """
    return np.array(image) if image.mode in ("L", "RGB") else image


class Normalization(NamedTuple):
    """What is done to 8-bit grey levels: nothing, or `(level * factor - mean) / std`.

    Attributes:
        factor (`float`, *optional*): In float64 and then rounded to float32, as the original rescales.
        mean, std (`np.ndarray` of shape `(channels,)`, *optional*): In float32.
    """

    factor: float | None
    mean: np.ndarray | None
    std: np.ndarray | None


def write_pixels(target: np.ndarray, pixels: np.ndarray, normalization: Normalization) -> None:
    """Writes 8-bit pixels to their places, normalised, with the very bits of the original's operations.

    Each band of rows is brought into the target's order as bytes, and then passes through all operations while it lies
    in the processor's cache.

    Args:
        target (`np.ndarray` of shape `(bands, bands, band height, ..., channels)`, uint8 or float32): View of the
            places in the order of the pixels: without its first two dimensions, a band is one run of pixels, row by
            row.
        pixels (`np.ndarray` of shape `(height, width, channels)`, uint8): Grey levels of the resized image.
        normalization (`Normalization`): What is done to them.
    """
    factor, mean, std = normalization
    order = sorted(range(2, target.ndim), key=lambda axis: target.strides[axis], reverse=True)
    target, pixels = (array.transpose(0, 1, *order) for array in (target, pixels.reshape(target.shape)))
    if factor is None and mean is None:
        target[...] = pixels
        return
    shape = target.shape[2:]
    if mean is not None and std is not None:
        # One for each value of a band: numpy is slow where it has to repeat a few.
        channels = [-1 if axis == len(order) + 1 else 1 for axis in order]
        mean, std = (np.broadcast_to(stat.reshape(channels), shape).copy() for stat in (mean, std))
    divisor = None if factor is None else _exact_divisor(factor)
    levels, values = np.empty(shape, np.uint8), np.empty(shape, np.float32)
    for band in np.ndindex(target.shape[:2]):
        levels[...] = pixels[band]
        values[...] = levels if factor is None or divisor is not None else levels * factor
        if divisor is not None:
            values /= divisor
        if mean is not None and std is not None:
            values -= mean
            np.divide(values, std, out=target[band])
        else:
            target[band] = values


def _exact_divisor(factor: float) -> np.float32 | None:
    """The float32 by which all 256 grey levels are divided as if multiplied by `factor` in float64 and then rounded.

    255 is that of the usual 1/255. None where there is none: float64 takes three times as long.
    """
    levels = np.arange(256)
    with np.errstate(all="ignore"):
        divisor = np.float32(1) / np.float32(factor)
        is_exact = np.array_equal((levels * factor).astype(np.float32), levels.astype(np.float32) / divisor)
    return divisor if is_exact else None


__all__ = [
    "TORCH_FILTERS",
    "Normalization",
    "PreparedImage",
    "decoding",
    "draft_jpeg",
    "grey_levels",
    "is_undecoded_jpeg",
    "map_in_threads",
    "open_image",
    "refuse_bomb",
    "resize_image",
    "resizes_columns_first",
    "to_torch_source",
    "upright",
    "upright_size",
    "write_pixels",
]
