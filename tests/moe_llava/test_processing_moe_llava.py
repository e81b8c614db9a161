import copy
import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlamaTokenizer

from llava_family import LlavaUhdImageProcessorPil, LlavaUhdProcessor, plan_slices
from llava_family.llava_uhd.processing_llava_uhd import CHAT_TEMPLATE
from llava_family.moe_llava.image_processing_pil_moe_llava import MoeLlavaImageProcessorPil
from llava_family.moe_llava.processing_moe_llava import MoeLlavaProcessor, chat_template
from llava_family.moe_llava.tokenization_moe_llava import load_original_tokenizer

from .conftest import FIXTURES, ROOT


LLAMA = ROOT / "tests" / "fixtures" / "llava_uhd" / "original_checkpoint"
PHI = FIXTURES / "phi_clip336"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
SQUARE, WIDE = Image.new("RGB", (50, 50), "red"), Image.new("RGB", (672, 336), "blue")
IMAGE_TOKEN_INDEX = -200  # of the original


@pytest.fixture
def processor(variant):
    return MoeLlavaProcessor.from_pretrained(variant.original)


def phi_processor(**kwargs):
    """With few features per view, for any vision encoding."""
    image_processor = MoeLlavaImageProcessorPil(base_size=56, **kwargs)
    tokenizer = load_original_tokenizer(PHI / "original_checkpoint")
    return MoeLlavaProcessor(image_processor, tokenizer, num_image_tokens=5, num_queries=4)


def expand(processor, ids, image=None):
    """The original's ids or labels with what the model puts in for every -200."""
    image = processor.image_token_id if image is None else image
    return [
        new
        for token in ids.tolist()
        for new in ([image] * processor.num_image_tokens if token == IMAGE_TOKEN_INDEX else [token])
    ]


def messages_of(conversation, images):
    """The data set's format; training moves the image to the front of its message."""
    messages = []
    for turn in conversation:
        text, has_image = turn["value"].replace("<image>", "").strip(), "<image>" in turn["value"]
        content = ([{"type": "image", "image": next(images)}] if has_image else []) + [{"type": "text", "text": text}]
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": content})
    return messages


def images_of(variant):
    return [Image.open(variant.folder / f"image_{index}.png") for index in range(2)]


def test_prompts_ids_and_pixels(variant, processor):
    for index, (image, prompt) in enumerate(zip(images_of(variant), variant.metadata["prompts"], strict=True)):
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == expand(processor, variant[f"input_ids.{index}"])
        assert torch.equal(inputs["pixel_values"][0], variant["pixel_values"][index])
        question = prompt.split("<image>\n")[1].removesuffix(" ASSISTANT:")
        content = [{"type": "text", "text": question}, {"type": "image", "image": image}]
        arguments = {"conversation": [{"role": "user", "content": content}], "add_generation_prompt": True}
        assert processor.apply_chat_template(**arguments) == prompt
        same = processor.apply_chat_template(**arguments, tokenize=True, return_dict=True, return_tensors="pt")
        assert all(torch.equal(same[name], inputs[name]) for name in inputs)


def test_number_of_image_tokens(variant, processor):
    assert processor.num_image_tokens == variant["projected_features"].shape[1]
    assert processor.image_token_id == variant.metadata["variant"]["tokenizer"]["len_tokenizer"]
    assert processor.tokenizer.padding_side == "left"
    counted = processor._get_num_multimodal_tokens(image_sizes=[(61, 83), (95, 57)])
    assert counted["num_image_tokens"] == [processor.num_image_tokens] * 2
    assert counted["num_image_patches"] == [1, 1]
    assert "num_image_tokens" not in processor._get_num_multimodal_tokens()


def assistant_labels(processor, conversations):
    batch = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": "right", "return_tensors": "pt"},
    )
    assistant = torch.as_tensor(batch.pop("assistant_masks")).bool()
    return batch, batch["input_ids"].masked_fill(~assistant, -100)


def test_training_labels(variant, processor):
    images = iter(images_of(variant))
    conversations = [messages_of(conversation, images) for conversation in variant.metadata["train_conversations"]]
    batch, labels = assistant_labels(processor, conversations)
    for row, ids in enumerate(variant["train.input_ids"]):
        assert batch["input_ids"][row].tolist() == expand(processor, ids)
        expected = torch.where(ids == IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, variant["train.labels"][row])
        assert labels[row].tolist() == expand(processor, expected, image=-100)
        mask = torch.where(ids == IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, variant["train.attention_mask"][row].long())
        assert batch["attention_mask"][row].tolist() == expand(processor, mask, image=1)
    assert (labels != -100).any(dim=1).all()


def test_training_labels_of_text(variant, processor):
    ids, labels = variant["train_text.input_ids"], variant["train_text.labels"]
    prompt = processor.decode(ids)
    question, answer = prompt.split("USER: ")[1].removesuffix("<|endoftext|>").split(" ASSISTANT: ")
    conversation = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert processor.apply_chat_template(conversation) == prompt
    batch, actual = assistant_labels(processor, [conversation])
    assert torch.equal(batch["input_ids"][0], ids)
    assert torch.equal(actual[0], labels)


def test_first_stage_labels(variant, processor):
    """`<image>`, caption and newline; everything behind the image is learned."""
    ids, labels = variant["stage1_plain.input_ids"], variant["stage1_plain.labels"]
    caption = processor.decode(ids[1:])
    assert caption.endswith("\n")
    batch = processor(images=images_of(variant)[0], text="<image>" + caption, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == expand(processor, ids)
    actual = batch["input_ids"].masked_fill(batch["input_ids"] == processor.image_token_id, -100)[0]
    assert actual.tolist() == [-100] * (processor.num_image_tokens - 1) + labels.tolist()


@pytest.mark.parametrize("end_of_turn", ["<|endoftext|>", "<|end_of_turn|>", "</s>", "'\"\\"])
def test_chat_template_of_several_turns(end_of_turn):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image"}]},
        {"role": "assistant", "content": "A tree."},
        {"role": "user", "content": "Sure?"},
    ]
    processor = phi_processor()
    prompt = processor.apply_chat_template(
        messages, chat_template=chat_template(end_of_turn), add_generation_prompt=True
    )
    assert prompt == f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT: A tree.{end_of_turn}USER: Sure? ASSISTANT:"


def test_chat_template_follows_the_tokenizer():
    tokenizer = LlamaTokenizer.from_pretrained(LLAMA)
    image_processor = MoeLlavaImageProcessorPil()
    answers = [{"role": "assistant", "content": "A"}]
    assert MoeLlavaProcessor(image_processor, tokenizer).apply_chat_template(answers) == (f"{SYSTEM} ASSISTANT: A</s>")
    assert chat_template("</s>") != CHAT_TEMPLATE  # which is quoted differently, so something was replaced
    openchat = copy.deepcopy(tokenizer)
    openchat.add_tokens(["<|end_of_turn|>"], special_tokens=True)
    assert MoeLlavaProcessor(image_processor, openchat).chat_template == chat_template("<|end_of_turn|>")
    assert MoeLlavaProcessor(image_processor, tokenizer, chat_template="{{ 1 }}").chat_template == "{{ 1 }}"
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        MoeLlavaProcessor(image_processor, tokenizer)


def test_text_around_images_is_tokenized_as_by_the_original(processor):
    """Every chunk by itself; a space before `<image>` or a newline behind it is not merged with anything."""

    def chunk(value):
        return processor.tokenizer(value)["input_ids"]

    image = [processor.image_token_id] * processor.num_image_tokens
    for prompt, expected in {
        "USER: <image>\nHi": [*chunk("USER: "), *image, *chunk("\nHi")],
        "<image> <image>  x": [*image, *chunk(" "), *image, *chunk("  x")],
        "<image><image>x": [*image, *image, *chunk("x")],
        "a\n\n<image>\n\nb": [*chunk("a\n\n"), *image, *chunk("\n\nb")],
        "<image><|endoftext|>": [*image, *chunk("<|endoftext|>")],
    }.items():
        images = [SQUARE] * prompt.count("<image>")
        assert processor(images=images, text=prompt)["input_ids"][0] == expected


def test_llama_gets_its_space_behind_an_image():
    tokenizer = LlamaTokenizer.from_pretrained(LLAMA)
    processor = MoeLlavaProcessor(MoeLlavaImageProcessorPil(), tokenizer, num_image_tokens=3)
    prompt = "A <image>\nHi"
    image = [processor.image_token_id] * 3
    behind = tokenizer("\nHi", add_special_tokens=False)["input_ids"]
    assert processor(images=SQUARE, text=prompt)["input_ids"][0] == [*tokenizer("A ")["input_ids"], *image, *behind]


@pytest.mark.parametrize("in_call", [True, False])
def test_slices_are_laid_out_as_by_llava_uhd(in_call):
    processor = phi_processor(**({} if in_call else {"vision_encoding": "slices"}))
    images_kwargs = {"vision_encoding": "slices"} if in_call else {}
    reference = LlavaUhdProcessor(LlavaUhdImageProcessorPil(base_size=56), processor.tokenizer, num_queries=4)
    inputs = {"images": [WIDE, SQUARE], "text": ["<image>\nWhat?", "<image>"]}
    actual = processor(**inputs, images_kwargs=images_kwargs, padding=True, return_tensors="pt")
    expected = reference(**inputs, padding=True, return_tensors="pt")
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    counted = processor._get_num_multimodal_tokens(image_sizes=[(336, 672), (50, 50)], **images_kwargs)
    plans = [plan_slices(*image.size, base_size=56) for image in (WIDE, SQUARE)]
    assert counted["num_image_tokens"] == [plan.num_features(4) for plan in plans]
    assert counted["num_image_patches"] == [plan.num_patches for plan in plans]
    assert (actual["input_ids"] == processor.image_token_id).sum(1).tolist() == counted["num_image_tokens"]


@pytest.mark.parametrize("images", [[SQUARE, WIDE, SQUARE], [[SQUARE], [WIDE, SQUARE], []]])
def test_batches(images):
    processor = phi_processor()
    inputs = processor(
        images=images, text=["<image> 1", "2 <image><image> more", "none"], padding=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [5, 10, 0]
    assert inputs["pixel_values"].shape == (3, 3, 336, 336)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    with pytest.raises(ValueError, match="1 <image> tokens and 2 images"):
        processor(images=[SQUARE, SQUARE], text="<image>")
    types = processor(images=SQUARE, text="a <image>", return_mm_token_type_ids=True)["mm_token_type_ids"][0]
    assert sum(types) == 5


def test_save_and_load(variant, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = MoeLlavaProcessor.from_pretrained(tmp_path)
    assert type(loaded.image_processor) is MoeLlavaImageProcessorPil
    assert (loaded.num_image_tokens, loaded.num_queries) == (processor.num_image_tokens, 144)
    assert loaded.chat_template == processor.chat_template
    assert loaded.image_token_id == processor.image_token_id
    assert loaded.tokenizer.padding_side == "left"
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == processor.tokenizer.get_vocab()
    inputs = {"images": images_of(variant), "text": variant.metadata["prompts"], "padding": True}
    expected, actual = (one(**inputs, return_tensors="pt") for one in (processor, loaded))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def original_folder(tmp_path, source="phi_clip336", **config):
    """A copy of an original folder without its tower, with changes to `config.json`."""
    folder = tmp_path / "release"
    shutil.copytree(
        FIXTURES / source / "original_checkpoint", folder, ignore=shutil.ignore_patterns("*.safe*", "*.bin")
    )
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


@pytest.mark.parametrize(
    ("tower", "size", "mean", "num_image_tokens"),
    [
        ("openai/clip-vit-large-patch14-336", {"shortest_edge": 336}, 0.48145466, 576),
        ("laion/something", {"shortest_edge": 336}, 0.48145466, 576),
        ("google/siglip-so400m-patch14-384", {"height": 384, "width": 384}, 0.5, 728),
    ],
)
def test_towers_of_releases_need_no_files(tmp_path, tower, size, mean, num_image_tokens):
    folder = original_folder(tmp_path, mm_image_tower=tower, mm_hidden_size=1152 if "google" in tower else 1024)
    processor = MoeLlavaProcessor.from_pretrained(folder)
    assert processor.num_image_tokens == num_image_tokens
    assert dict(processor.image_processor.size) == size
    assert processor.image_processor.image_mean[0] == mean
    pixels = processor.image_processor(WIDE, return_tensors="pt")["pixel_values"]
    side = 384 if "google" in tower else 336
    assert pixels.shape == (1, 3, side, side)


def test_feature_selection_counts(tmp_path):
    for index, (source, expected) in enumerate({"phi_clip336": 17, "stablelm_siglip384": 16}.items()):
        folder = original_folder(tmp_path / str(index), source, mm_vision_select_feature="cls_patch")
        shutil.copytree(
            FIXTURES / source, folder.parent, dirs_exist_ok=True, ignore=lambda *_: ["original_checkpoint"]
        )
        assert MoeLlavaProcessor.from_pretrained(folder).num_image_tokens == expected


def test_tower_is_found_in_the_folder_or_passed(tmp_path, monkeypatch):
    folder, name = original_folder(tmp_path), "openai/clip-vit-tiny-patch14-56"
    processor = MoeLlavaProcessor.from_pretrained(folder, mm_image_tower=PHI / name)
    assert processor.num_image_tokens == 16
    assert dict(processor.image_processor.size) == {"shortest_edge": 56}
    auto = AutoProcessor.from_pretrained(folder, mm_image_tower=PHI / name)
    assert type(auto) is MoeLlavaProcessor and auto.num_image_tokens == 16
    monkeypatch.chdir(PHI)
    assert MoeLlavaProcessor.from_pretrained(folder).num_image_tokens == 16
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PHI / name, folder / name)
    assert dict(MoeLlavaProcessor.from_pretrained(folder).image_processor.crop_size) == {"height": 56, "width": 56}


def test_settings_of_the_tower_are_read(tmp_path, monkeypatch):
    folder, name = original_folder(tmp_path), "openai/clip-vit-tiny-patch14-56"
    shutil.copytree(PHI / name, tmp_path / name)  # beside the release
    path = tmp_path / name / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "image_std": [1, 1, 1]}))
    assert MoeLlavaProcessor.from_pretrained(folder).image_processor.image_std == (1, 1, 1)
    monkeypatch.chdir(tmp_path)
    passed = MoeLlavaProcessor.from_pretrained(folder, mm_image_tower=PHI / name)
    assert passed.image_processor.image_std == tuple(settings["image_std"])
    path.write_text(json.dumps({**settings, "size": {"depth": 3}}))
    with pytest.raises(ValueError, match="preprocessor_config.json has image processor settings"):
        MoeLlavaProcessor.from_pretrained(folder)
    path.unlink()
    assert MoeLlavaProcessor.from_pretrained(folder).image_processor.to_dict() == passed.image_processor.to_dict()


def test_files_of_a_processor_come_first(tmp_path):
    folder, tower = original_folder(tmp_path), PHI / "openai" / "clip-vit-tiny-patch14-56"
    processor = MoeLlavaProcessor.from_pretrained(folder, mm_image_tower=tower, num_image_tokens=7)
    processor.save_pretrained(folder)
    assert MoeLlavaProcessor.from_pretrained(folder, mm_image_tower=tower).num_image_tokens == 7


def test_unknown_towers(tmp_path):
    folder = original_folder(tmp_path, mm_image_tower="facebook/dinov2")
    with pytest.raises(ValueError, match="'facebook/dinov2' is not of"):
        MoeLlavaProcessor.from_pretrained(folder)


def test_padding_follows_the_release(tmp_path):
    folder = original_folder(tmp_path, image_aspect_ratio="square")
    processor = MoeLlavaProcessor.from_pretrained(folder, mm_image_tower=PHI / "openai/clip-vit-tiny-patch14-56")
    assert processor.image_processor.do_pad is False


def test_arguments_override_what_is_found():
    arguments = {"num_image_tokens": 3, "chat_template": "{{ 1 }}"}
    processor = MoeLlavaProcessor.from_pretrained(PHI / "original_checkpoint", **arguments)
    assert (processor.num_image_tokens, processor.chat_template) == (3, "{{ 1 }}")
