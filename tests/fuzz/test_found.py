"""What the fuzzers found, one case each."""

import io
import json
import shutil
import struct

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoConfig, LlamaTokenizer

from llava_family import (
    LlavaMoleProcessor,
    LlavaUhdConfig,
    LlavaUhdForConditionalGeneration,
    LlavaUhdImageProcessorPil,
    LlavaUhdProcessor,
    MoeLlavaConfig,
    MoeLlavaImageProcessorPil,
    MoeLlavaProcessor,
)
from llava_family.llava_uhd import image_processing_pil_square_llava_uhd as square
from llava_family.llava_uhd.loading_llava_uhd import InvalidCheckpointError, loading

from .checkpoints import CLIP, LLAVA_UHD


UNKNOWN_DDS = (
    b"DDS "
    + struct.pack("<7I", 124, 0x1007, 8, 8, 0, 0, 0)
    + bytes(44)
    + struct.pack("<2I", 32, 4)
    + b"ABCD"
    + bytes(64)
)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("resample", square.FILTER_REACHES)
@pytest.mark.parametrize(
    ("size", "resized", "tolerance"),
    [
        ((301, 20), 56, 0),
        ((77, 76), 56, 0),
        ((20, 17), 33, 0),
        ((20, 301), 56, 2),
        ((7, 301), 400, 2),
        ((1, 150), 20, 2),
    ],
)
def test_the_square_around_a_long_image_is_not_made(monkeypatch, size, resized, tolerance, resample):
    monkeypatch.setattr(square, "MAX_SQUARE_SIDE", 100)
    image, color, resized = noise(*size), (10, 200, 30), (resized, resized)

    def resize(image, size):
        return image.resize(size, resample)

    expected = np.asarray(resize(square.pad_to(image, (max(size), max(size)), color), resized)).astype(int)
    padded = square.pad_for_resize(image, color, resized, resample, resize)
    assert padded.width == resized[0]
    assert abs(np.asarray(resize(padded, resized)).astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("size", [(20_000, 20), (20, 20_000)])
def test_long_images_take_little_memory(monkeypatch, size):
    made, new = [], Image.new
    monkeypatch.setattr(Image, "new", lambda mode, size, *args: made.append(size) or new(mode, size, *args))
    MoeLlavaImageProcessorPil()(new("RGB", size), return_tensors="np")
    assert len(made) >= 1 and max(width * height for width, height in made) < 2e7


def test_what_pil_raises_on_a_broken_file_is_a_value_error():
    with pytest.raises(NotImplementedError):
        Image.open(io.BytesIO(UNKNOWN_DDS))
    with pytest.raises(ValueError, match=r"Image 0 .* cannot be read: PIL cannot decode it: NotImplementedError"):
        LlavaUhdImageProcessorPil()(UNKNOWN_DDS)
    image = noise(9, 9).convert("P")
    image.palette = None
    with pytest.raises(ValueError, match="Image 0 of 1 cannot be processed: PIL cannot decode it: AssertionError"):
        LlavaUhdImageProcessorPil()(image)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_size": 10**6}, "`base_size` must be an integer of 1..4096"),
        ({"patch_size": 0}, "`patch_size` must be an integer of 1..4096"),
        ({"max_slices": 10**9}, "`max_slices` must be an integer of 1..1000"),
        ({"pre_resize_longest_edge": 10**9}, "`pre_resize_longest_edge` must be an integer of 1..8192"),
        ({"size": {"shortest_edge": 10**6}}, "`shortest_edge` of `size` must be an integer of 1..4096"),
        ({"size": {"height": -1, "width": 9}}, "`height` of `size` must be an integer of 1..4096"),
        ({"crop_size": {"height": 10**6, "width": 9}}, "`height` of `crop_size` must be an integer of 1..4096"),
    ],
)
def test_settings_that_would_fill_the_memory(settings, message):
    with pytest.raises(ValueError, match=message):
        MoeLlavaImageProcessorPil(**settings)(noise(9, 9))


@pytest.mark.parametrize("value", [0, -1, 10**9, 4.0, "4", True, None])
def test_numbers_of_placeholders(value):
    tokenizer = LlamaTokenizer.from_pretrained(LLAVA_UHD)
    with pytest.raises(ValueError, match=r"`num_queries` must be an integer of 1..16384"):
        LlavaUhdProcessor(LlavaUhdImageProcessorPil(), tokenizer, num_queries=value)
    for processor_class in (MoeLlavaProcessor, LlavaMoleProcessor):
        with pytest.raises(ValueError, match=r"`num_image_tokens` must be an integer of 1..16384"):
            processor_class(MoeLlavaImageProcessorPil(), tokenizer, num_image_tokens=value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"text_config": {"num_hidden_layers": 10**6}}, r"`text_config.num_hidden_layers` must lie in 1..1000"),
        ({"text_config": {"vocab_size": -1}}, r"`text_config.vocab_size` must lie in 1.."),
        ({"text_config": {"hidden_size": "a"}}, "hidden_size"),
        ({"text_config": 5}, "cannot be loaded"),
        ({"dtype": "abc"}, "cannot be loaded: AttributeError"),
        ({"vision_config": {"num_attention_heads": 0}}, "num_attention_heads"),
    ],
)
def test_configurations(config, message):
    with pytest.raises(InvalidCheckpointError, match=message):
        LlavaUhdConfig.from_dict(config)


def test_vision_feature_layer_of_squares():
    with pytest.raises(StrictDataclassError, match=r"must lie in -25..24 for 24 layers, but is 25"):
        MoeLlavaConfig(vision_feature_layer=25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resample": [3]}, "`resample` must be one of `PIL.Image.Resampling`"),
        ({"resample": 9}, "`resample` must be one of `PIL.Image.Resampling`"),
        ({"rescale_factor": {"a": 1}}, "`rescale_factor` must be finite numbers"),
        ({"rescale_factor": 10**400}, "`rescale_factor` must be finite numbers"),
        ({"image_mean": [0.5, {}, 0.5]}, "`image_mean` must be finite numbers"),
        ({"image_std": float("nan")}, "`image_std` must be finite numbers"),
    ],
)
def test_settings_that_are_no_numbers_or_filters(settings, message):
    processor = MoeLlavaImageProcessorPil()
    for name, value in settings.items():  # as a file's, which are not checked when they are read
        setattr(processor, name, value)
    with pytest.raises(ValueError, match=message):
        processor(noise(9, 9))


def test_a_factor_may_be_a_large_integer():
    pixels = MoeLlavaImageProcessorPil(rescale_factor=10**30, do_normalize=False)(noise(9, 9))["pixel_values"][0]
    assert np.isfinite(pixels).all() and pixels.max() > 1e31


@pytest.mark.parametrize("config_class", [LlavaUhdConfig, MoeLlavaConfig])
def test_a_configuration_that_is_no_object(tmp_path, config_class):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must be a JSON object, but is a list"):
        config_class.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": [1]}')
    assert config_class.get_config_dict(tmp_path)[0]["model_type"] == [1]


def test_a_setting_of_the_tokenizer_that_is_an_argument_of_images():
    tokenizer = LlamaTokenizer.from_pretrained(LLAVA_UHD, size="large")
    with pytest.raises(ValueError, match="setting of its tokenizer, is wrong: .*'size'"):
        LlavaUhdProcessor(LlavaUhdImageProcessorPil(), tokenizer)(images=noise(9, 9), text="<image>")


def test_a_model_type_may_be_anything(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": 5}')
    with pytest.raises(ValueError, match="model type `5`"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("vocab_size", 10**9), ("intermediate_size", 10**9)])
def test_sizes_that_the_weights_do_not_have(tmp_path, name, value):
    shutil.copytree(LLAVA_UHD, tmp_path / "release")
    config = json.loads((LLAVA_UHD / "config.json").read_text())
    (tmp_path / "release" / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(
        InvalidCheckpointError, match=rf"have other sizes than the model: .* but \({value}, .*ignore_mism"
    ):
        LlavaUhdForConditionalGeneration.from_pretrained(tmp_path / "release", mm_vision_tower=CLIP)


@pytest.mark.parametrize("error", [MemoryError, ImportError, KeyboardInterrupt, OSError, RuntimeError])
def test_errors_that_are_not_the_files(error):
    with pytest.raises(error) as caught, loading("It"):
        raise error
    assert caught.type is error
