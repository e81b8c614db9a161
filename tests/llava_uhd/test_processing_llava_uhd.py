import copy

import pytest
import torch
from PIL import Image
from transformers import LlamaTokenizer

from llava_family import LlavaUhdImageProcessorPil, LlavaUhdProcessor, plan_slices

from .conftest import ORIGINAL
from .tiny import tiny_processor


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
SQUARE, WIDE = Image.new("RGB", (50, 50), "red"), Image.new("RGB", (672, 336), "blue")


def text(value):
    return {"type": "text", "text": value}


IMAGE = {"type": "image"}


def test_chat_template_of_several_turns(processor):
    messages = [
        {"role": "user", "content": [text("What is this?"), IMAGE]},
        {"role": "assistant", "content": [text("A tree.")]},
        {"role": "user", "content": "Sure?"},
    ]
    prompt = f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT: A tree.</s>USER: Sure? ASSISTANT:"
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == prompt
    assert processor.apply_chat_template(messages) == prompt.removesuffix("ASSISTANT:")
    assert processor.apply_chat_template([messages, messages])[1] == prompt.removesuffix("ASSISTANT:")


def test_chat_template_of_several_images(processor):
    messages = [{"role": "user", "content": [IMAGE, text("Compare "), IMAGE, text("them.")]}]
    assert processor.apply_chat_template(messages) == f"{SYSTEM} USER: <image>\n<image>\nCompare them. "


def test_chat_template_takes_another_system_message(processor):
    messages = [{"role": "system", "content": [text("Be brief.")]}, {"role": "user", "content": "Hi"}]
    assert processor.apply_chat_template(messages) == "Be brief. USER: Hi "
    with pytest.raises(Exception, match="'user' and 'assistant'.* is tool"):
        processor.apply_chat_template([{"role": "tool", "content": "1"}])


def test_chat_template_survives_saving(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = LlavaUhdProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == processor.chat_template
    assert loaded.image_token_id == processor.image_token_id
    assert loaded.num_queries == 144
    inputs = {"images": [WIDE], "text": "<image>\nWhat?", "return_tensors": "pt"}
    for name, tensor in processor(**inputs).items():
        assert torch.equal(loaded(**inputs)[name], tensor)


@pytest.mark.parametrize("images", [[SQUARE, WIDE, SQUARE], [[SQUARE], [WIDE, SQUARE], []]])
def test_batches(processor, images):
    small = tiny_processor(processor)
    texts = ["<image> one", "two <image><image> more", "none"]
    inputs = small(images=images, text=texts, padding=True, return_tensors="pt")
    plans = [plan_slices(*image.size, base_size=56) for image in (SQUARE, WIDE, SQUARE)]
    features = [plan.num_features(4) for plan in plans]
    is_image = inputs["input_ids"] == small.image_token_id
    assert is_image.sum(1).tolist() == [features[0], features[1] + features[2], 0]
    assert inputs["image_grids"].shape == (3, 3, 2)
    assert len(inputs["pixel_values"]) == sum(plan.num_patches for plan in plans)


def test_spatial_schema(processor):
    small = tiny_processor(processor)
    ids = small(images=Image.new("RGB", (112, 168)), text="<image>")["input_ids"][0][1:]
    views = "".join({small.image_token_id: "I", 13: "n", processor.column_separator_id: ","}[token] for token in ids)
    assert views == "IIII,IIIIn" * 3 + "IIII"


def test_separators_are_looked_up(processor, goldens):
    assert processor.column_separator_id == goldens.metadata["comma_token_id"]
    assert processor.row_separator_id == goldens.metadata["newline_token_id"] == 13
    legacy = LlamaTokenizer.from_pretrained(ORIGINAL, legacy=True)
    if legacy.tokenize("</s>,")[1] != ",":
        with pytest.raises(ValueError, match="legacy=False"):
            LlavaUhdProcessor(LlavaUhdImageProcessorPil(), legacy)


def test_text_around_images_is_tokenized_as_by_the_original(processor):
    """Every chunk by itself, hence with a space in front of it; `</s>` has none behind it."""
    encode = processor.tokenizer

    def chunk(value):
        return encode(value, add_special_tokens=False)["input_ids"]

    image = [processor.image_token_id] * 144
    for prompt, expected in {
        "<image>\nHi": [1, *image, *chunk("\nHi")],
        "Hi <image>": [1, *chunk("Hi "), *image],
        "<image><image>x": [1, *image, *image, *chunk("x")],
        "<image></s>": [1, *image, 2],
        "<image>": [1, *image],
    }.items():
        images = [SQUARE] * prompt.count("<image>")
        assert processor(images=images, text=prompt)["input_ids"][0] == expected


def test_token_type_ids_and_offsets(processor):
    inputs = processor(
        images=[WIDE], text=["a <image> b"], return_mm_token_type_ids=True, return_text_replacement_offsets=True
    )
    ids, types = inputs["input_ids"][0], inputs["mm_token_type_ids"][0]
    assert [int(token == processor.image_token_id) for token in ids] == types
    assert sum(types) == processor._get_num_multimodal_tokens(image_sizes=[(336, 672)])["num_image_tokens"][0]
    (offset,) = inputs["text_replacement_offsets"][0]
    assert offset["span"] == (2, 9)
    assert offset["replacement"].count("<image>") == sum(types)


def test_settings_reach_the_image_processor_and_the_count(processor):
    plan = plan_slices(300, 1024, max_slices=3)
    inputs = processor(
        images=Image.new("RGB", (150, 512)),
        text="<image>",
        images_kwargs={"max_slices": 3, "pre_resize_longest_edge": 1024},
        return_tensors="pt",
    )
    assert len(inputs["pixel_values"]) == plan.num_patches
    assert inputs["input_ids"].shape[1] == 1 + plan.num_tokens(144)
    counted = processor._get_num_multimodal_tokens(
        image_sizes=[(512, 150)], max_slices=3, pre_resize_longest_edge=1024
    )
    assert counted["num_image_tokens"] == [plan.num_features(144)]
    assert counted["num_image_patches"] == [plan.num_patches]


@pytest.mark.parametrize(
    ("images", "prompt", "message"),
    [
        ([SQUARE, SQUARE], "<image>", "1 <image> tokens and 2 images"),
        ([SQUARE], "<image> <image>", "2 <image> tokens and 1 images"),
        (None, "<image>", "no images were passed"),
        ([SQUARE], "nothing", "0 <image> tokens and 1 images"),
        (None, None, "at least one input"),
    ],
)
def test_placeholders_and_images_must_match(processor, images, prompt, message):
    with pytest.raises(ValueError, match=message):
        processor(images=images, text=prompt)


def test_truncation_that_would_cut_image_tokens(processor):
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        processor(images=[SQUARE], text="<image> and a long text", truncation=True, max_length=100)
    ids = processor(images=[SQUARE], text="<image> and a long text", truncation=True, max_length=148)["input_ids"][0]
    assert len(ids) == 148


def test_text_alone(processor):
    assert processor(text="Hi there")["input_ids"][0] == processor.tokenizer("Hi there")["input_ids"]
    assert "pixel_values" not in processor(text=["Hi", "there"], padding=True, return_tensors="pt")


def test_images_alone(processor):
    inputs = processor(images=[SQUARE], return_tensors="pt")
    assert set(inputs) == {"pixel_values", "image_grids"}


def test_original_tokenizer_is_given_the_image_token(processor):
    tokenizer = LlamaTokenizer.from_pretrained(ORIGINAL)
    size = len(tokenizer)
    built = LlavaUhdProcessor(LlavaUhdImageProcessorPil(), copy.deepcopy(tokenizer))
    assert built.image_token_id == processor.image_token_id == size
    assert processor.tokenizer.padding_side == "left"
