"""The optional torchvision backend against the PIL one."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.utils import is_torchvision_available

from llava_family import LlavaUhdImageProcessor, LlavaUhdImageProcessorPil

from .conftest import ROOT


pytestmark = pytest.mark.skipif(
    not is_torchvision_available(),
    reason="torchvision is optional, and PyPI's does not import beside a CPU torch 2.13",
)

IMAGES = [Image.open(ROOT / "examples" / "images" / name).convert("RGB") for name in ("rocket.jpg", "wide_text.png")]
ONE_GREY_LEVEL = 1 / 255 / 0.26


def test_pixels_are_within_two_grey_levels_of_the_pil_backend():
    expected = LlavaUhdImageProcessorPil()(IMAGES, return_tensors="pt")
    actual = LlavaUhdImageProcessor()(IMAGES, return_tensors="pt")
    assert torch.equal(actual["image_grids"], expected["image_grids"])
    difference = (actual["pixel_values"] - expected["pixel_values"]).abs()
    assert difference.max() <= 2 * ONE_GREY_LEVEL
    assert difference.mean() < 0.01 * ONE_GREY_LEVEL


def test_paths_and_bytes_are_upright_like_opened_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    IMAGES[1].save(path, exif=exif)
    upright = IMAGES[1].transpose(Image.Transpose.ROTATE_270)
    expected = LlavaUhdImageProcessor()(upright, return_tensors="pt")["pixel_values"]
    for image in (path, str(path), path.read_bytes(), Image.open(path)):
        assert torch.equal(LlavaUhdImageProcessor()([image], return_tensors="pt")["pixel_values"], expected)
    with pytest.raises(ValueError, match=r"Image 1 \(.*missing.png.*\) cannot be read"):
        LlavaUhdImageProcessor()([path, tmp_path / "missing.png"])


def test_grey_levels_are_uint8_where_nothing_is_done_to_them():
    raw = LlavaUhdImageProcessor()(IMAGES, do_rescale=False, do_normalize=False, return_tensors="pt")
    assert raw["pixel_values"].dtype == torch.uint8


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_in_0_to_1_equal_grey_levels(dtype):
    array = np.asarray(IMAGES[0])
    expected = LlavaUhdImageProcessor()(array, return_tensors="pt")["pixel_values"]
    actual = LlavaUhdImageProcessor()((array / 255).astype(dtype), return_tensors="pt")["pixel_values"]
    assert (actual - expected).abs().max() <= 2 * ONE_GREY_LEVEL


@pytest.mark.parametrize(
    "array", [np.full((8, 8, 3), np.nan), np.full((8, 8, 3), -1.0), np.zeros((0, 4, 3), np.uint8)]
)
def test_bad_images_name_themselves(array):
    with pytest.raises(ValueError, match="Image 1 of 2 cannot be"):
        LlavaUhdImageProcessor()([IMAGES[0], array])


def test_pil_is_the_default_of_the_auto_class(tmp_path):
    LlavaUhdImageProcessor().save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is LlavaUhdImageProcessorPil
    assert type(AutoImageProcessor.from_pretrained(tmp_path, backend="torchvision")) is LlavaUhdImageProcessor
