import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from llava_family import LlavaUhdImageProcessorPil, plan_slices
from llava_family.llava_uhd.image_processing_pil_llava_uhd import to_patches

from .conftest import METADATA_CASES


@pytest.fixture
def image_processor():
    return LlavaUhdImageProcessorPil()


def photo(width=500, height=300, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def unpatch(patches, rows, columns):
    """`(rows * columns, 588)` to `(height, width, 3)`."""
    return patches.reshape(rows, columns, 3, 14, 14).transpose(0, 3, 1, 4, 2).reshape(rows * 14, columns * 14, 3)


@pytest.mark.parametrize("name", [name for name, case in METADATA_CASES.items() if case["images"]])
def test_bytes_of_every_view_are_those_of_the_original(goldens, name):
    case = goldens.case(name)
    raw = LlavaUhdImageProcessorPil(
        do_rescale=False,
        do_normalize=False,
        pre_resize_longest_edge=case.get("pre_resize_longest"),
        max_slices=1 if case.get("single") else 7,
    )
    infos = [info for info in case["image_info"] if info]
    for image, info in zip(goldens.images(name), infos, strict=True):
        patches = raw(image, return_tensors="np")["pixel_values"]
        for (rows, columns), digest in zip(info["patch_grids_hw"], info["sha256_uint8"], strict=True):
            view, patches = np.split(patches, [rows * columns])
            pixels = unpatch(view, rows, columns).astype(np.uint8)
            assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == digest
        assert len(patches) == 0


def test_slices_are_the_refined_image_in_order(image_processor):
    image, plan = photo(900, 700), plan_slices(900, 700)
    patches = image_processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    refined = np.asarray(image.resize(plan.refined_size, Image.Resampling.BICUBIC))
    for box, (rows, columns) in zip(plan.slice_boxes(), plan.view_grids[:-1], strict=True):
        view, patches = np.split(patches, [rows * columns])
        left, top, right, bottom = box
        np.testing.assert_array_equal(unpatch(view, rows, columns), refined[top:bottom, left:right])
    overview = np.asarray(image.resize(plan.overview_size, Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(unpatch(patches, *plan.view_grids[-1]), overview)


def test_normalised_values_are_computed_as_by_the_original(image_processor):
    image = photo(336, 336)
    actual = image_processor(image, return_tensors="np")["pixel_values"]
    rescaled = (np.asarray(image) * (1 / 255)).astype(np.float32)
    expected = (rescaled - np.array(OPENAI_CLIP_MEAN, np.float32)) / np.array(OPENAI_CLIP_STD, np.float32)
    np.testing.assert_array_equal(unpatch(actual, 24, 24), expected)
    assert actual.dtype == np.float32


@pytest.mark.parametrize("flags", [{"do_rescale": False}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}])
def test_flags_are_honoured(image_processor, flags):
    image = photo(336, 336)
    settings = {"do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, **flags}
    expected = np.asarray(image).astype(np.float32)
    expected = expected * settings["rescale_factor"] if settings["do_rescale"] else expected
    if settings["do_normalize"]:
        expected = (expected - np.array(OPENAI_CLIP_MEAN)) / np.array(OPENAI_CLIP_STD)
    actual = image_processor(image, **flags, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(unpatch(actual, 24, 24), expected, rtol=1e-5, atol=1e-5)


def test_resampling_filter_and_limits_are_honoured(image_processor):
    image = photo(900, 700)
    default = image_processor(image, return_tensors="np")
    nearest = image_processor(image, resample=Image.Resampling.NEAREST, return_tensors="np")
    assert not np.array_equal(default["pixel_values"], nearest["pixel_values"])
    single = image_processor(image, max_slices=1, return_tensors="np")
    assert single["image_grids"].tolist() == [[[0, 0], [0, 0], default["image_grids"][0, 2].tolist()]]
    small = image_processor(image, base_size=112, return_tensors="np")
    assert len(small["pixel_values"]) < len(default["pixel_values"])


def test_without_resizing(image_processor):
    image = photo(42, 28)
    raw = image_processor(image, do_resize=False, do_rescale=False, do_normalize=False, return_tensors="np")
    np.testing.assert_array_equal(unpatch(raw["pixel_values"], 2, 3), np.asarray(image))
    with pytest.raises(ValueError, match="Image 1 of 2.*multiples of `patch_size`.*43x28"):
        image_processor([image, photo(43, 28)], do_resize=False)


def test_many_images_follow_each_other(image_processor):
    images = [photo(900, 700, 1), photo(100, 100, 2), photo(700, 300, 3)]
    together = image_processor(images, return_tensors="pt")
    alone = [image_processor(image, return_tensors="pt") for image in images]
    assert torch.equal(together["pixel_values"], torch.cat([one["pixel_values"] for one in alone]))
    assert torch.equal(together["image_grids"], torch.cat([one["image_grids"] for one in alone]))
    assert together["image_grids"].shape == (3, 3, 2)


def test_arrays_and_tensors_equal_pil_images(image_processor):
    image = photo(90, 60)
    expected = image_processor(image, return_tensors="np")["pixel_values"]
    array = np.asarray(image)
    for same in (
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array.copy()),
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        array.astype(np.float32),
        array.astype(np.int64),
        (array / 255).astype(np.float32),
        torch.from_numpy(array.copy()) / 255,
    ):
        np.testing.assert_array_equal(image_processor(same, return_tensors="np")["pixel_values"], expected)


def test_unit_range_floats_stay_in_unit_range_without_rescaling(image_processor):
    array = np.asarray(photo(336, 336)) / 255
    raw = image_processor(array, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(unpatch(raw, 24, 24), array, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_image_modes(image_processor, mode):
    image = photo(60, 40).convert("LA" if mode == "PA" else "RGB").convert(mode)
    expected = image.convert("RGBA").convert("RGB") if mode in ("LA", "PA") else image.convert("RGB")
    np.testing.assert_array_equal(
        image_processor(image, return_tensors="np")["pixel_values"],
        image_processor(expected, return_tensors="np")["pixel_values"],
    )


def test_transparency_is_laid_over_white(image_processor):
    transparent = Image.new("RGBA", (50, 50), (255, 0, 0, 0))
    white = Image.new("RGB", (50, 50), "white")
    np.testing.assert_array_equal(
        image_processor(transparent, return_tensors="np")["pixel_values"],
        image_processor(white, return_tensors="np")["pixel_values"],
    )


def test_exif_orientation_is_honoured_in_every_entry_path(image_processor, tmp_path):
    upright = photo(60, 30)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    path = tmp_path / "turned.png"
    turned.save(path, exif=exif)
    expected = image_processor(upright, return_tensors="np")["pixel_values"]
    for entry in (Image.open(path), str(path)):
        np.testing.assert_array_equal(image_processor(entry, return_tensors="np")["pixel_values"], expected)


BAD_IMAGES = {
    "no pixels": (Image.new("RGB", (0, 5)), "0x5 pixels"),
    "empty array": (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
    "NaN": (np.full((8, 8, 3), np.nan), "finite"),
    "infinite": (np.full((8, 8, 3), np.inf), "finite"),
    "negative": (np.full((8, 8, 3), -1.0), "-1.0"),
    "too bright": (np.full((8, 8, 3), 300), "300"),
}


@pytest.mark.parametrize(("image", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_name_themselves(image_processor, image, message):
    with pytest.raises(ValueError, match=f"Image 1 of 2 .*{message}"):
        image_processor([photo(20, 20), image])


@pytest.mark.parametrize("as_path", [True, False])
@pytest.mark.parametrize("format", ["jpeg", "png"])
def test_truncated_files(image_processor, tmp_path, format, as_path):
    path = tmp_path / f"truncated.{format}"
    photo(200, 200).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"truncated\.|Image 0 of 1 cannot be processed: .*truncated"):
        image_processor(str(path) if as_path else Image.open(path))


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_files_that_are_no_images(image_processor, tmp_path, content):
    path = tmp_path / "file.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.png.* cannot be read"):
        image_processor(str(path))


def test_too_thin_for_the_pre_resize(image_processor):
    with pytest.raises(ValueError, match="Image 0 of 1 cannot be sliced: .*3000x1 .*too thin"):
        image_processor(photo(3000, 1), pre_resize_longest_edge=1024)


def test_save_and_load(image_processor, tmp_path):
    LlavaUhdImageProcessorPil(max_slices=4, pre_resize_longest_edge=512).save_pretrained(tmp_path)
    loaded = LlavaUhdImageProcessorPil.from_pretrained(tmp_path)
    assert (loaded.max_slices, loaded.pre_resize_longest_edge, loaded.base_size) == (4, 512, 336)


def test_patches_of_views_row_by_row():
    pixels = np.arange(4 * 4).reshape(4, 4, 1)
    patches = to_patches(pixels, rows=2, columns=1, patch_size=2)
    assert patches[:, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
