"""10,000 broken image files: pixel values, or a `ValueError` or `OSError`; a tenth unless `make fuzz` runs all."""

import numpy as np
import pytest
from transformers import LlamaTokenizer

from llava_family import (
    LlavaMoleImageProcessorPil,
    LlavaMoleProcessor,
    LlavaUhdImageProcessorPil,
    LlavaUhdProcessor,
    MoeLlavaImageProcessorPil,
    MoeLlavaProcessor,
)

from .checkpoints import LLAVA_UHD
from .mutations import mutate_bytes
from .pictures import seed_files
from .watching import run_cases


CASES, PIECES = 10_000, 10
SQUARE = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
OPTIONS = (
    {},
    {},
    {},
    {"use_jpeg_draft": True},
    {"resample_backend": "torch"},
    {"vision_encoding": "slices"},
    {"max_slices": 3},
    {"do_rescale": False, "do_normalize": False},
)


@pytest.fixture(scope="module")
def processors():
    tokenizer = LlamaTokenizer.from_pretrained(LLAVA_UHD)
    image_processors = (
        LlavaUhdImageProcessorPil(base_size=56),
        MoeLlavaImageProcessorPil(base_size=56, **SQUARE),
        LlavaMoleImageProcessorPil(base_size=56, **SQUARE),
    )
    classes = (LlavaUhdProcessor, MoeLlavaProcessor, LlavaMoleProcessor)
    return [
        processor_class(image_processor, tokenizer, num_queries=4)
        for processor_class, image_processor in zip(classes, image_processors, strict=True)
    ]


def check(outputs, is_square):
    pixel_values = outputs["pixel_values"]
    assert np.isfinite(pixel_values).all()
    if is_square:
        assert pixel_values.shape == (1, 3, 56, 56)
        return
    (slices, slice_grid, overview_grid) = outputs["image_grids"][0]
    num_patches = slices.prod() * slice_grid.prod() + overview_grid.prod()
    assert pixel_values.shape == (num_patches, 3 * 14 * 14)
    assert overview_grid.min() >= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PIL's, of broken files
@pytest.mark.parametrize("piece", range(PIECES))
def test_images(processors, tmp_path, piece):
    seeds = seed_files()

    def run_case(rng):
        processor, options = rng.choice(processors), rng.choice(OPTIONS)
        is_uhd = processor is processors[0]
        if is_uhd:
            options = {name: value for name, value in options.items() if name != "vision_encoding"}
        image = mutate_bytes(rng, rng.choice(seeds), seeds)
        if rng.random() < 0.1:
            path = tmp_path / "image"
            path.write_bytes(image)
            image = rng.choice((path, str(path)))
        if rng.random() < 0.1:
            outputs = processor(images=image, text="a <image> b", return_tensors="np", **options)
        else:
            outputs = processor.image_processor(image, return_tensors="np", **options)
        check(outputs, not is_uhd and "vision_encoding" not in options)
        return "pixel values"

    outcomes = run_cases("images", piece, PIECES, CASES, run_case)
    # Both ends of the code are reached.
    assert outcomes["pixel values"] > 0.15 * outcomes.total() and outcomes["ValueError"] > 0.15 * outcomes.total()
