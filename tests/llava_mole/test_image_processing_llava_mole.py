import hashlib
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.utils import is_torchvision_available

from llava_family import LlavaUhdImageProcessorPil, MoeLlavaImageProcessorPil
from llava_family.llava_mole.image_processing_pil_llava_mole import LlavaMoleImageProcessorPil


FIXTURES = Path(__file__).parents[1] / "fixtures" / "llava_mole"
METADATA = json.loads((FIXTURES / "expected.json").read_text())
CLIP_56 = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
CASES = range(len(METADATA["cases"]))


@pytest.fixture(scope="module")
def goldens():
    return load_file(FIXTURES / "expected.safetensors")


def image_of(case):
    return Image.open(FIXTURES / METADATA["cases"][case]["image"])


def pixels(processor, images, **kwargs):
    return processor(images, return_tensors="pt", **kwargs)["pixel_values"]


def photo(width=83, height=61, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_pixels_are_those_of_the_original(goldens):
    """An RGB, an RGBA and a grey image, wider than high, higher than wide and square."""
    assert [image_of(case).mode for case in CASES] == ["RGB", "RGBA", "L"]
    actual = pixels(LlavaMoleImageProcessorPil(**CLIP_56), [image_of(case) for case in CASES])
    for case in CASES:
        assert torch.equal(actual[case], goldens[f"c{case}.pixel_values"])


@pytest.mark.parametrize("case", CASES)
def test_default_pixels_are_those_of_the_original(goldens, case):
    expected = METADATA["pre336"][case]
    (actual,) = pixels(LlavaMoleImageProcessorPil(), Image.open(FIXTURES / expected["image"]))
    assert list(actual.shape) == expected["shape"]
    assert hashlib.sha256(actual.numpy().tobytes()).hexdigest() == expected["sha256_f32"]
    assert actual.double().sum().item() == pytest.approx(expected["sum"], rel=1e-12)
    assert actual.double().abs().sum().item() == pytest.approx(expected["abs_sum"], rel=1e-12)
    assert torch.equal(actual[:, ::8, ::8], goldens[f"pre336.img{case}.stride8"])


def palette_image():
    image = Image.fromarray(photo()).convert("P")
    image.info["transparency"] = image.getpixel((0, 0))
    return image


TRANSPARENT = {
    "RGBA": Image.fromarray(photo(channels=4), "RGBA"),
    "LA": Image.fromarray(photo(channels=2), "LA"),
    "P": palette_image(),
}


@pytest.mark.parametrize("vision_encoding", ["square", "slices"])
@pytest.mark.parametrize("mode", TRANSPARENT)
def test_transparency_is_dropped(mode, vision_encoding):
    image = TRANSPARENT[mode]
    processor = LlavaMoleImageProcessorPil(**CLIP_56, vision_encoding=vision_encoding)
    opaque = pixels(MoeLlavaImageProcessorPil(**CLIP_56, vision_encoding=vision_encoding), image.convert("RGB"))
    assert torch.equal(pixels(processor, image), opaque)
    if mode == "RGBA":
        for array in (photo(channels=4), photo(channels=4).transpose(2, 0, 1)):
            assert torch.equal(pixels(processor, array), opaque)


def test_layout_of_arrays_can_be_told():
    """Three rows look like three channels."""
    processor, array = LlavaMoleImageProcessorPil(**CLIP_56), photo(height=3)
    expected = pixels(processor, Image.fromarray(array))
    assert torch.equal(pixels(processor, array, input_data_format="channels_last"), expected)


def test_conversion_to_rgb_is_optional():
    settings = {"do_convert_rgb": False, "do_normalize": False, "background_color": [0, 0, 0, 0]}
    assert pixels(LlavaMoleImageProcessorPil(**CLIP_56), TRANSPARENT["RGBA"], **settings).shape == (1, 4, 56, 56)


def test_images_are_turned_upright(tmp_path):
    image, exif = Image.fromarray(photo()), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    upright = pixels(LlavaMoleImageProcessorPil(**CLIP_56), image.transpose(Image.Transpose.ROTATE_270))
    assert torch.equal(pixels(LlavaMoleImageProcessorPil(**CLIP_56), Image.open(tmp_path / "turned.png")), upright)


def test_slices_are_those_of_llava_uhd():
    images = [Image.fromarray(photo(900, 700)), Image.fromarray(photo(100, 60))]
    expected = LlavaUhdImageProcessorPil()(images, return_tensors="pt")
    for processor, kwargs in [
        (LlavaMoleImageProcessorPil(vision_encoding="slices"), {}),
        (LlavaMoleImageProcessorPil(), {"vision_encoding": "slices"}),
    ]:
        actual = processor(images, return_tensors="pt", **kwargs)
        assert set(actual) == {"pixel_values", "image_grids"}
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert set(LlavaMoleImageProcessorPil()(images)) == {"pixel_values"}


def test_settings_are_those_of_the_square_path():
    expected, actual = MoeLlavaImageProcessorPil().to_dict(), LlavaMoleImageProcessorPil().to_dict()
    assert actual.pop("image_processor_type") == "LlavaMoleImageProcessor"
    assert expected.pop("image_processor_type") == "MoeLlavaImageProcessor"
    assert actual == expected
    assert (actual["vision_encoding"], actual["do_pad"]) == ("square", True)


def test_save_and_load(tmp_path):
    processor = LlavaMoleImageProcessorPil(**CLIP_56, vision_encoding="slices", background_color=[1, 2, 3])
    processor.save_pretrained(tmp_path)
    assert LlavaMoleImageProcessorPil.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_settings_of_the_original_clip_folder():
    processor = LlavaMoleImageProcessorPil.from_pretrained(
        FIXTURES / "original_checkpoint" / "clip-vit-large-patch14-336"
    )
    assert pixels(processor, image_of(0)).shape == (1, 3, 56, 56)
    assert torch.equal(pixels(processor, image_of(0)), pixels(LlavaMoleImageProcessorPil(**CLIP_56), image_of(0)))


def test_the_torchvision_backend_can_be_imported_without_torchvision():
    module = importlib.import_module("llava_family.llava_mole.image_processing_llava_mole")
    assert module.LlavaMoleImageProcessor.__name__ == "LlavaMoleImageProcessor"


@pytest.mark.skipif(
    not is_torchvision_available(),
    reason="torchvision is optional, and PyPI's does not import beside a CPU torch 2.13",
)
class TestTorchvision:
    @property
    def backend(self):
        return importlib.import_module("llava_family.llava_mole.image_processing_llava_mole").LlavaMoleImageProcessor

    def test_pixels_are_within_two_grey_levels_of_the_original(self, goldens):
        actual = pixels(self.backend(**CLIP_56), [image_of(case) for case in CASES])
        expected = torch.stack([goldens[f"c{case}.pixel_values"] for case in CASES])
        assert (actual - expected).abs().max() <= 2 / 255 / 0.26

    @pytest.mark.parametrize("mode", TRANSPARENT)
    def test_transparency_is_dropped(self, mode):
        image, processor = TRANSPARENT[mode], self.backend(**CLIP_56)
        opaque = pixels(processor, image.convert("RGB"))
        assert torch.equal(pixels(processor, image), opaque)
        if mode == "RGBA":
            array = photo(channels=4)
            for same in (array, torch.from_numpy(array).permute(2, 0, 1), array / 255):
                torch.testing.assert_close(pixels(processor, same), opaque)

    def test_conversion_to_rgb_is_optional(self):
        settings = {"do_convert_rgb": False, "do_normalize": False, "background_color": [0, 0, 0, 0]}
        assert pixels(self.backend(**CLIP_56), TRANSPARENT["RGBA"], **settings).shape == (1, 4, 56, 56)
