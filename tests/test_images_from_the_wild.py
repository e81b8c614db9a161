"""Every kind of image gives right pixels, or one error that names it: the table of docs/images.md."""

import io
import re
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from llava_family import LlavaMoleImageProcessorPil, LlavaUhdImageProcessorPil, MoeLlavaImageProcessorPil


DOCUMENT = Path(__file__).parents[1] / "docs" / "images.md"
PROCESSORS = (LlavaUhdImageProcessorPil, MoeLlavaImageProcessorPil, LlavaMoleImageProcessorPil)
SIZE = (28, 14)  # width, height
GREY = np.add.outer(4 * np.arange(14), 7 * np.arange(28)).astype(np.uint8)  # 0 to 241, brighter to the right and down
RGB = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)
ALPHA = np.where(np.arange(28) < 14, 255, 0).astype(np.uint8) * np.ones((14, 1), np.uint8)
OVER_WHITE = np.where(ALPHA[..., None] == 255, RGB, 255)
PALETTE = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE, colors=256)


def grey(levels=GREY):
    return np.repeat(np.asarray(levels)[..., None], 3, axis=-1)


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def animated(format):
    frames = [Image.new("RGB", SIZE, color) for color in ("red", "lime")]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)


def png_header(width, height):
    """A PNG that claims a size, and has next to no pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


def oriented(number):
    """A PNG whose EXIF data asks to be shown as RGB is, and its pixels."""
    undo = {
        1: lambda array: array,
        2: np.fliplr,
        3: partial(np.rot90, k=2),
        4: np.flipud,
        5: lambda array: array.transpose(1, 0, 2),
        6: np.rot90,
        7: lambda array: np.rot90(array.transpose(1, 0, 2), 2),
        8: partial(np.rot90, k=-1),
    }
    exif = Image.Exif()
    exif[0x0112] = number
    return encoded(Image.fromarray(np.ascontiguousarray(undo[number](RGB))), "PNG", exif=exif)


def with_alpha(array=RGB):
    return Image.fromarray(np.dstack([array, ALPHA]))


def palette_with_alpha():
    image = Image.new("PA", SIZE)
    image.putpalette([level for level in range(256) for _ in range(3)])
    image.putdata([(int(level), int(alpha)) for level, alpha in zip(GREY.ravel(), ALPHA.ravel(), strict=True)])
    return image


def cmyk():
    return Image.fromarray(RGB).convert("CMYK")


TIFF = encoded(Image.fromarray(RGB), "TIFF", save_all=True, append_images=[Image.new("RGB", SIZE)])
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
JPEG = encoded(Image.fromarray(RGB), "JPEG")

# What is given, and the RGB pixels that it is
PIXELS = {
    "L": (Image.fromarray(GREY), grey()),
    "LA": (Image.fromarray(np.dstack([GREY, ALPHA])), np.where(ALPHA[..., None] == 255, grey(), 255)),
    "P": (PALETTE, np.asarray(PALETTE.convert("RGB"))),
    "PA": (palette_with_alpha(), np.where(ALPHA[..., None] == 255, grey(), 255)),
    "RGBA": (with_alpha(), OVER_WHITE),
    "CMYK": (cmyk(), np.asarray(cmyk().convert("RGB"))),
    "1": (Image.fromarray(GREY > 100), grey(np.where(GREY > 100, 255, 0))),
    "I;16": (Image.fromarray(GREY.astype(np.uint16) * 257), grey()),
    "I": (Image.fromarray(GREY.astype(np.int32) * 257), grey()),
    "F, 0..255": (Image.fromarray(GREY.astype(np.float32)), grey()),
    "F, 0..1": (Image.fromarray(GREY.astype(np.float32) / 255), grey()),
    "16-bit PNG": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), grey()),
    **{f"EXIF orientation {number}": (oriented(number), RGB) for number in range(1, 9)},
    "animated GIF": (animated("GIF"), np.full((14, 28, 3), (255, 0, 0))),
    "animated WebP": (animated("WEBP"), np.full((14, 28, 3), (255, 0, 0))),
    "TIFF of several pages": (TIFF, RGB),
    "ICC profile": (encoded(Image.fromarray(RGB), "PNG", icc_profile=PROFILE), RGB),
    "array, height x width": (GREY, grey()),
    "array, height x width x 1": (GREY[..., None], grey()),
    "array, height x width x 3": (RGB, RGB),
    "array, channels first": (RGB.transpose(2, 0, 1), RGB),
    "array, four channels": (np.dstack([RGB, ALPHA]), OVER_WHITE),
    "floats 0..1": (RGB.astype(np.float32) / 255, RGB),
    "floats 0..255": (RGB.astype(np.float64), RGB),
    "16-bit array": (GREY.astype(np.uint16) * 257, grey()),
    "booleans": (GREY > 100, grey(np.where(GREY > 100, 255, 0))),
    "tensor": (torch.from_numpy(RGB.transpose(2, 0, 1).copy()), RGB),
    "tensor that requires a gradient": (
        torch.from_numpy(RGB.transpose(2, 0, 1) / np.float32(255)).requires_grad_(),
        RGB,
    ),
}

# What is given, and what its error says
ERRORS = {
    "NaN": (np.full((14, 28, 3), np.nan), "values from nan to nan"),
    "infinity": (np.full((14, 28, 3), np.inf), "values from inf to inf"),
    "negative": (np.full((14, 28, 3), -1.0), "values from -1.0 to -1.0"),
    "too large": (np.full((14, 28, 3), 256), "values from 256 to 256"),
    "no pixels": (Image.new("RGB", (0, 0)), "0x0 pixels"),
    "array without pixels": (np.zeros((0, 28, 3), np.uint8), "without any pixels"),
    "two channels first and last": (np.zeros((7, 28, 9), np.uint8), "channel"),
    "truncated": (JPEG[:-40], "truncated"),
    "corrupt": (JPEG[:20] + bytes(200), "cannot identify|cannot be read|cannot be processed"),
    "empty file": (b"", "cannot identify"),
    "text file": (b"This is no image.", "cannot identify"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "cannot identify"),
    "bomb of 176 megapixels": (png_header(16000, 11000), r"16000x11000 pixels, 176\.0 million, .* is 89\.5 million"),
    "bomb of 400 megapixels": (png_header(20000, 20000), "decompression bomb"),
}

# (width, height) of what is merely thin or small
SIZES = {"1x1": (1, 1), "1x4000": (1, 4000), "4000x1": (4000, 1), "20000x20": (20000, 20)}


@pytest.fixture
def processor():
    return LlavaUhdImageProcessorPil(base_size=28, patch_size=14)


def pixels_of(processor, image):
    """The RGB image that a processor sees, at its own size."""
    inputs = processor(images=image, do_resize=False, do_rescale=False, do_normalize=False, return_tensors="np")
    (_, _), _, (rows, columns) = inputs["image_grids"][0]
    patches = inputs["pixel_values"].reshape(rows, columns, 3, 14, 14)
    return patches.transpose(0, 3, 1, 4, 2).reshape(rows * 14, columns * 14, 3)


@pytest.mark.parametrize("name", PIXELS)
def test_pixels(processor, name):
    image, expected = PIXELS[name]
    scale = 255 if name in ("F, 0..1", "floats 0..1", "booleans", "tensor that requires a gradient") else 1
    np.testing.assert_allclose(pixels_of(processor, image) * scale, expected, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in PIXELS if isinstance(PIXELS[name][0], bytes)])
def test_a_path_bytes_and_an_opened_file_are_the_same(processor, tmp_path, name):
    content, expected = PIXELS[name]
    path = tmp_path / "image"
    path.write_bytes(content)
    for given in (path, str(path), content, Image.open(path)):
        np.testing.assert_array_equal(pixels_of(processor, given), expected)


@pytest.mark.parametrize("number", range(1, 9))
def test_orientations_are_not_all_alike(number):
    stored = np.asarray(Image.open(io.BytesIO(oriented(number))))
    assert (stored.shape == RGB.shape and (stored == RGB).all()) == (number == 1)


@pytest.mark.parametrize(
    "processor_class", [LlavaUhdImageProcessorPil, MoeLlavaImageProcessorPil, LlavaMoleImageProcessorPil]
)
@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_image(processor_class, name):
    image, message = ERRORS[name]
    with pytest.raises(ValueError, match=message) as caught:
        processor_class()(images=[Image.new("RGB", SIZE), image], return_tensors="np")
    assert re.match(r"Image 1\b", str(caught.value)), caught.value


@pytest.mark.parametrize(
    "processor_class", [LlavaUhdImageProcessorPil, MoeLlavaImageProcessorPil, LlavaMoleImageProcessorPil]
)
@pytest.mark.parametrize("name", SIZES)
def test_sizes(processor_class, name):
    size = SIZES[name]
    inputs = processor_class()(images=Image.new("RGB", size, (200, 100, 50)), return_tensors="np")
    assert np.isfinite(inputs["pixel_values"]).all()
    if processor_class is LlavaUhdImageProcessorPil:
        plain = processor_class()(Image.new("RGB", (336, 336), (200, 100, 50)), return_tensors="np")["pixel_values"]
        # Of one color before, of one color after
        np.testing.assert_allclose(np.unique(inputs["pixel_values"]), np.unique(plain), atol=1e-6)


def test_the_limit_is_settable(processor, monkeypatch):
    image = encoded(Image.fromarray(RGB), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 14 * 28 - 1)
    with pytest.raises(ValueError, match="28x14 pixels, 0.0 million"):
        processor(images=image)
    with pytest.warns(Image.DecompressionBombWarning):
        opened = Image.open(io.BytesIO(image))
    with pytest.raises(ValueError, match="Image 0 of 1 cannot be processed: it has 28x14 pixels"):
        processor(images=opened)
    for limit in (14 * 28, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        np.testing.assert_array_equal(pixels_of(processor, image), RGB)
    # What is decoded already does no harm.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    np.testing.assert_array_equal(pixels_of(processor, Image.fromarray(RGB)), RGB)


def test_dark_16_bit_images_stay_dark(processor):
    dark = np.full((14, 28), 200, np.uint16)
    assert (pixels_of(processor, Image.fromarray(dark)) == 1).all()
    assert (pixels_of(processor, dark) == 1).all()


def test_every_case_is_in_the_document():
    text = DOCUMENT.read_text("utf-8")
    cases = [line.split("|")[1].strip() for line in text.splitlines() if re.match(r"\| (?!---|case )", line)]
    assert cases == [*PIXELS, *SIZES, *ERRORS]
    assert len(cases) >= 40
