import importlib
import json

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils import is_torchvision_available

from llava_family import LlavaUhdImageProcessorPil
from llava_family.llava_uhd import image_processing_pil_square_llava_uhd
from llava_family.moe_llava.image_processing_pil_moe_llava import MoeLlavaImageProcessorPil


CLIP_56 = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
SIGLIP_56 = {
    "size": {"height": 56, "width": 56},
    "do_center_crop": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
TOWERS = {"clip": (CLIP_56, CLIPImageProcessorPil), "siglip": (SIGLIP_56, SiglipImageProcessorPil)}


def images_of(variant):
    return [Image.open(variant.folder / f"image_{index}.png") for index in range(2)]


def photo(width=83, height=61, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(processor, images, **kwargs):
    return processor(images, return_tensors="pt", **kwargs)["pixel_values"]


def test_pixels_are_those_of_the_original(variant):
    processor = MoeLlavaImageProcessorPil(**(SIGLIP_56 if "siglip" in variant.name else CLIP_56))
    assert torch.equal(pixels(processor, images_of(variant)), variant["pixel_values"])
    assert torch.equal(pixels(processor, images_of(variant), do_pad=False), variant["pixel_values_no_square_pad"])


@pytest.mark.parametrize("size", [(83, 61), (57, 95), (59, 100), (100, 59), (20, 30), (1, 40), (56, 56), (300, 299)])
@pytest.mark.parametrize("tower", TOWERS)
def test_without_padding_it_is_the_tower_s_own_processor(tower, size):
    settings, original = TOWERS[tower]
    processor = MoeLlavaImageProcessorPil(do_pad=False, **settings)
    assert torch.equal(pixels(processor, photo(*size)), pixels(original(**settings), photo(*size)))


@pytest.mark.parametrize("size", [(83, 61), (57, 95), (20, 31), (1, 40)])
@pytest.mark.parametrize("tower", TOWERS)
def test_padding_is_a_centred_paste(tower, size):
    settings, original = TOWERS[tower]
    image, side = photo(*size), max(size)
    color = (127, 127, 127) if tower == "siglip" else (122, 116, 104)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    processor = MoeLlavaImageProcessorPil(**settings)
    assert torch.equal(pixels(processor, image), pixels(original(**settings), square))
    assert processor.background_color is None


def test_images_smaller_than_the_crop():
    settings = {"do_resize": False, "crop_size": {"height": 9, "width": 8}}
    for size in [(5, 4), (5, 12), (8, 9), (11, 20), (4, 4)]:
        expected = pixels(CLIPImageProcessorPil(**settings), photo(*size))
        assert torch.equal(pixels(MoeLlavaImageProcessorPil(do_pad=False, **settings), photo(*size)), expected)


def test_background_color():
    processor = MoeLlavaImageProcessorPil(
        do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False, background_color=[1, 2, 3]
    )
    padded = pixels(processor, photo(4, 1))[0]
    assert padded.shape == (3, 4, 4)
    assert padded[:, 0].T.unique(dim=0).tolist() == padded[:, 3].T.unique(dim=0).tolist() == [[1, 2, 3]]
    np.testing.assert_array_equal(padded[:, 1].T, np.asarray(photo(4, 1))[0])
    grey = pixels(processor, photo(4, 1).convert("L"), do_convert_rgb=False, background_color=(7,))
    assert grey.shape == (1, 1, 4, 4) and grey[0, 0, 0].tolist() == [7] * 4
    for bad in ([1, 2], [1, 2, 256], [-1, 0, 0]):
        with pytest.raises(ValueError, match="one grey level of 0..255 for each of the 3 channels"):
            processor(photo(4, 1), background_color=bad)


@pytest.mark.parametrize("flags", [{"do_rescale": False}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}])
def test_flags_are_honoured(flags):
    expected = pixels(CLIPImageProcessorPil(**CLIP_56), photo(56, 56), **flags)
    actual = pixels(MoeLlavaImageProcessorPil(**CLIP_56), photo(56, 56), **flags)
    torch.testing.assert_close(actual, expected.float(), atol=1e-5, rtol=1e-6)


def test_defaults_are_clip_336():
    processor = MoeLlavaImageProcessorPil()
    assert pixels(processor, [photo(), photo(40, 90)]).shape == (2, 3, 336, 336)
    assert torch.equal(pixels(processor, photo(), resample=0), pixels(MoeLlavaImageProcessorPil(resample=0), photo()))
    assert pixels(MoeLlavaImageProcessorPil(size=64, do_center_crop=False), photo()).shape == (1, 3, 64, 64)


def test_slices_are_those_of_llava_uhd():
    images = [photo(900, 700), photo(100, 60)]
    expected = LlavaUhdImageProcessorPil()(images, return_tensors="pt")
    for actual in (
        MoeLlavaImageProcessorPil(vision_encoding="slices")(images, return_tensors="pt"),
        MoeLlavaImageProcessorPil()(images, vision_encoding="slices", return_tensors="pt"),
    ):
        assert set(actual) == {"pixel_values", "image_grids"}
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert set(MoeLlavaImageProcessorPil()(images)) == {"pixel_values"}


def test_number_of_image_patches():
    processor = MoeLlavaImageProcessorPil()
    assert processor.get_number_of_image_patches(700, 900) == 1
    expected = LlavaUhdImageProcessorPil().get_number_of_image_patches(700, 900)
    assert processor.get_number_of_image_patches(700, 900, {"vision_encoding": "slices"}) == expected
    assert MoeLlavaImageProcessorPil(vision_encoding="slices").get_number_of_image_patches(700, 900) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vision_encoding": "round"}, "square.*slices.*round"),
        ({"size": {"longest_edge": 56}}, "`height` and `width`, or `shortest_edge`"),
        ({"size": {"shortest_edge": 56, "longest_edge": 60}}, "`height` and `width`, or `shortest_edge`"),
    ],
)
def test_settings_that_make_no_square(settings, message):
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=message):
        MoeLlavaImageProcessorPil()(photo(), **settings)
    with pytest.raises(ValueError, match=message):
        MoeLlavaImageProcessorPil(**settings)(photo())


def test_views_of_different_sizes():
    with pytest.raises(ValueError, match=r"one size.*\(76, 56\).*\(56, 93\)"):
        MoeLlavaImageProcessorPil(**CLIP_56, do_pad=False, do_center_crop=False)([photo(), photo(57, 95)])


@pytest.mark.parametrize("do_pad", [True, False])
def test_strips_that_would_fill_the_memory(monkeypatch, do_pad):
    monkeypatch.setattr(image_processing_pil_square_llava_uhd, "MAX_SQUARE_PIXELS", 10**6)
    processor = MoeLlavaImageProcessorPil(do_pad=do_pad)
    assert processor(photo(200, 500), return_tensors="np")["pixel_values"].shape == (1, 3, 336, 336)
    with pytest.raises(ValueError, match="Image 1 of 2 is too long"):
        processor([photo(), photo(20_000, 2)])


@pytest.mark.parametrize(
    ("image", "message"),
    [(np.full((8, 8, 3), np.nan), "finite"), (Image.new("RGB", (0, 5)), "0x5"), (np.full((8, 8, 3), 300), "300")],
)
def test_bad_images_name_themselves(image, message):
    with pytest.raises(ValueError, match=f"Image 1 of 2 .*{message}"):
        MoeLlavaImageProcessorPil()([photo(), image])


def test_arrays_and_tensors_equal_pil_images():
    processor, array = MoeLlavaImageProcessorPil(**CLIP_56), np.array(photo())
    expected = pixels(processor, photo())
    for same in (array, array.transpose(2, 0, 1), torch.from_numpy(array), array / 255):
        assert torch.equal(pixels(processor, same), expected)


def test_save_and_load(tmp_path):
    processor = MoeLlavaImageProcessorPil(
        **SIGLIP_56, background_color=[1, 2, 3], vision_encoding="slices", do_pad=False
    )
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "MoeLlavaImageProcessor"
    loaded = MoeLlavaImageProcessorPil.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert (loaded.vision_encoding, loaded.do_pad, loaded.do_center_crop) == ("slices", False, False)
    assert dict(loaded.size) == SIGLIP_56["size"]


def test_the_torchvision_backend_can_be_imported_without_torchvision():
    module = importlib.import_module("llava_family.moe_llava.image_processing_moe_llava")
    assert module.MoeLlavaImageProcessor.__name__ == "MoeLlavaImageProcessor"


@pytest.mark.skipif(
    not is_torchvision_available(),
    reason="torchvision is optional, and PyPI's does not import beside a CPU torch 2.13",
)
class TestTorchvision:
    @property
    def backend(self):
        return importlib.import_module("llava_family.moe_llava.image_processing_moe_llava").MoeLlavaImageProcessor

    @pytest.mark.parametrize("do_pad", [True, False])
    def test_pixels_are_within_two_grey_levels_of_the_original(self, variant, do_pad):
        settings = SIGLIP_56 if "siglip" in variant.name else CLIP_56
        expected = variant["pixel_values" if do_pad else "pixel_values_no_square_pad"]
        actual = pixels(self.backend(do_pad=do_pad, **settings), images_of(variant))
        assert (actual - expected).abs().max() <= 2 / 255 / 0.26

    def test_floats_and_padding(self):
        array = np.array(photo())
        expected = pixels(self.backend(**CLIP_56), photo())
        torch.testing.assert_close(pixels(self.backend(**CLIP_56), array / 255), expected)
        raw = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
        small = (array / 255).astype(np.float32)
        actual, grey = pixels(self.backend(**raw), small), pixels(MoeLlavaImageProcessorPil(**raw), small)
        torch.testing.assert_close(actual, grey, atol=1e-5, rtol=0)

    def test_slices_are_those_of_llava_uhd(self):
        actual = self.backend(vision_encoding="slices")([photo(300, 200)], return_tensors="pt")
        expected = LlavaUhdImageProcessorPil()([photo(300, 200)], return_tensors="pt")
        assert torch.equal(actual["image_grids"], expected["image_grids"])
        assert actual["pixel_values"].shape == expected["pixel_values"].shape

    def test_errors(self, monkeypatch):
        with pytest.raises(ValueError, match="Image 1 of 2"):
            self.backend()([photo(), np.zeros((0, 4, 3), np.uint8)])
        monkeypatch.setattr(image_processing_pil_square_llava_uhd, "MAX_SQUARE_PIXELS", 10**6)
        with pytest.raises(ValueError, match="Image 0 of 1 is too long"):
            self.backend()(photo(20_000, 2))
