"""2,000 mixed batches for each family: placeholders match image features; a tenth unless `make fuzz` runs all."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlamaTokenizer

from llava_family import (
    LlavaMoleForCausalLM,
    LlavaMoleImageProcessorPil,
    LlavaMoleProcessor,
    LlavaUhdForConditionalGeneration,
    LlavaUhdImageProcessorPil,
    LlavaUhdProcessor,
    MoeLlavaForCausalLM,
    MoeLlavaImageProcessorPil,
    MoeLlavaProcessor,
    plan_slices,
)
from llava_family.llava_mole.configuration_llava_mole import LlavaMoleConfig
from llava_family.llava_uhd.configuration_llava_uhd import LlavaUhdConfig
from llava_family.moe_llava.configuration_moe_llava import MoeLlavaConfig

from .checkpoints import LLAVA_UHD
from .watching import STRIDE


BATCHES = 2_000
BASE_SIZE, NUM_QUERIES = 28, 4
SQUARE = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
FAMILIES = ("llava_uhd", "moe_llava", "llava_mole", "moe_llava, slices", "llava_mole, slices")
WORDS = st.sampled_from(["", "a", " tree", "the sign,", "near\n", "What is", "\n", ",", "</s>", "<unk>", "é"])


@st.composite
def images(draw):
    width, height = draw(st.integers(1, 120)), draw(st.integers(1, 120))
    mode = draw(st.sampled_from(["RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "array"]))
    if mode == "array":
        return np.full((height, width, 3), draw(st.integers(0, 255)), np.uint8)
    return Image.new(mode, (width, height))


@st.composite
def rows(draw):
    """A text with a placeholder for each of its images, and these."""
    row_images = draw(st.lists(images(), max_size=3))
    return draw(WORDS) + "".join("<image>" + draw(WORDS) for _ in row_images), row_images


BATCH = st.tuples(
    st.lists(rows(), min_size=1, max_size=4),
    st.booleans(),  # nested lists of images
    st.sampled_from(["left", "right"]),
    st.integers(-1, 1),  # images too few or too many, in some batches
)


@functools.cache
def family(name):
    """The processor and a model whose experts and layers are few."""
    name, _, encoding = name.partition(", ")
    encoding = {"vision_encoding": encoding} if encoding else {}
    tokenizer = LlamaTokenizer.from_pretrained(LLAVA_UHD)
    classes = {
        "llava_uhd": (LlavaUhdConfig, LlavaUhdForConditionalGeneration, LlavaUhdProcessor, LlavaUhdImageProcessorPil),
        "moe_llava": (MoeLlavaConfig, MoeLlavaForCausalLM, MoeLlavaProcessor, MoeLlavaImageProcessorPil),
        "llava_mole": (LlavaMoleConfig, LlavaMoleForCausalLM, LlavaMoleProcessor, LlavaMoleImageProcessorPil),
    }
    text = {"llava_uhd": "llama", "moe_llava": "moe_llava_llama_text", "llava_mole": "llava_mole_text"}
    is_sliced = name == "llava_uhd" or encoding
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config_class, model_class, processor_class, image_processor_class = classes[name]
    config = config_class(
        text_config={"model_type": text[name], "vocab_size": len(tokenizer), "num_key_value_heads": 2, **sizes},
        vision_config={
            "model_type": "llava_uhd_vision" if is_sliced else "clip_vision_model",
            "image_size": BASE_SIZE,
            **sizes,
            "patch_size": 14,
            **({"vision_feature_layer": -1} if is_sliced else {}),
        },
        num_queries=NUM_QUERIES,
        resampler_num_attention_heads=2,
        **({} if name == "llava_uhd" else {"vision_feature_layer": -1}),
        **encoding,
    )
    torch.manual_seed(0)
    num_image_tokens = {} if name == "llava_uhd" else {"num_image_tokens": num_features(name, None)}
    square = {} if name == "llava_uhd" else SQUARE
    processor = processor_class(
        image_processor_class(base_size=BASE_SIZE, **square, **encoding),
        tokenizer,
        num_queries=NUM_QUERIES,
        **num_image_tokens,
    )
    return processor, model_class(config).eval()


def num_features(name, image):
    """How many features an image has, by arithmetic: of a square 2x2 patches, or `NUM_QUERIES` of every view."""
    borders = 2 * name.startswith("llava_mole")
    if name in ("moe_llava", "llava_mole"):
        return (BASE_SIZE // 14) ** 2 + borders
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
    return plan_slices(width, height, base_size=BASE_SIZE).num_views * NUM_QUERIES + borders


@pytest.mark.slow
@pytest.mark.timeout(1800)  # of all batches
@pytest.mark.parametrize("name", FAMILIES)
def test_batches(name):
    processor, model = family(name)
    counts = {"batches": 0, "images": 0, "errors": 0, "forward": 0}

    # 2,000 of each family: the two encodings of a family share them.
    @settings(
        max_examples=BATCHES // (1 if name == "llava_uhd" else 2) // STRIDE,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(BATCH)
    def check(batch):
        batch_rows, nested, padding_side, surplus = batch
        texts, images_of_rows = [text for text, _ in batch_rows], [row_images for _, row_images in batch_rows]
        flat = [image for row_images in images_of_rows for image in row_images]
        arguments = {"text": texts, "padding": True, "padding_side": padding_side, "return_tensors": "pt"}
        counts["batches"] += 1
        if surplus and (flat or surplus > 0) and len(texts) % 2:
            wrong = [*flat, Image.new("RGB", (9, 9))] if surplus > 0 else flat[:-1]
            counts["errors"] += 1
            with pytest.raises(ValueError, match="image"):
                processor(images=wrong or None, **arguments)
            return
        inputs = processor(images=(images_of_rows if nested else flat) if flat else None, **arguments)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        expected = [sum(num_features(name, image) for image in row_images) for row_images in images_of_rows]
        assert (ids == processor.image_token_id).sum(1).tolist() == expected
        assert set(mask.unique().tolist()) <= {0, 1} and ((ids == processor.image_token_id) <= mask.bool()).all()
        # Padding is on one side alone, and one row has none.
        ordered = mask if padding_side == "right" else mask.flip(1)
        assert (ordered.diff(dim=1) <= 0).all() and mask.sum(1).max() == mask.shape[1]
        counts["images"] += len(flat)
        assert ("pixel_values" in inputs) == bool(flat)
        if flat and counts["batches"] % 20 == 0:
            counts["forward"] += 1
            with torch.no_grad():
                outputs = model(**inputs)  # which refuses other numbers of features and placeholders
            assert len(outputs.image_hidden_states) == sum(expected)
            assert outputs.logits.isfinite().all()

    check()
    print(f"\n{name}: {counts}")
    assert counts["forward"] and counts["errors"] and counts["images"] > counts["batches"] / 2
