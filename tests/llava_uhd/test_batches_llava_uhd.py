"""Rows of a batch see nothing of each other: any number of images, any sizes, padding on either side."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from .tiny import tiny_model, tiny_processor


WORDS = ["a", "tree", "the sign,", "near\n", "road?", "What is", "red", "</s>USER: "]


def random_size(rng, max_side=4000, max_area=1_000_000):
    width = int(max_side ** rng.random())
    height = int(min(max_side, max_area / width) ** rng.random())
    return max(width, 1), max(height, 1)


def random_row(rng, max_images=4, **kwargs):
    images, text = [], rng.choice(WORDS)
    for _ in range(rng.randint(0, max_images)):
        width, height = random_size(rng, **kwargs)
        pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (height, width, 3), dtype=np.uint8)
        images.append(Image.fromarray(pixels))
        text += "<image>" + rng.choice(["", "\n", " and "]) + " ".join(rng.choices(WORDS, k=rng.randint(0, 3)))
    return images, text


def assert_rows_are_independent(model, processor, rows, padding_side):
    images = [images for images, _ in rows]
    arguments = {"padding": True, "padding_side": padding_side, "return_tensors": "pt"}
    inputs = processor(images=images if any(images) else None, text=[text for _, text in rows], **arguments)
    num_placeholders = (inputs["input_ids"] == processor.image_token_id).sum()
    with torch.no_grad():
        outputs = model(**inputs)
        num_features = 0 if outputs.image_hidden_states is None else len(outputs.image_hidden_states)
        assert num_features == num_placeholders
        for index, (row_images, text) in enumerate(rows):
            alone = processor(images=row_images or None, text=text, return_tensors="pt")
            logits = outputs.logits[index][inputs["attention_mask"][index].bool()]
            torch.testing.assert_close(logits, model(**alone).logits[0], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("seed", range(10))
def test_random_batches(processor, seed, padding_side):
    """25 batches each, 500 in all."""
    rng = random.Random(f"{seed} {padding_side}")
    model = tiny_model(seed, resampler_type=("spatial", "perceiver")[seed % 2])
    small_processor = tiny_processor(processor)
    for _ in range(25):
        rows = [random_row(rng) for _ in range(rng.randint(2, 4))]
        assert_rows_are_independent(model, small_processor, rows, padding_side)


@pytest.mark.slow
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_random_batches_of_the_golden_model(model, processor, padding_side):
    rng = random.Random(padding_side)
    for _ in range(3):
        rows = [random_row(rng, max_images=2) for _ in range(2)]
        assert_rows_are_independent(model, processor, rows, padding_side)
