import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import normalizers
from transformers import LlamaTokenizer

from llava_family import LlavaUhdImageProcessorPil, LlavaUhdProcessor, MoeLlavaProcessor, plan_slices
from llava_family.llava_mole.image_processing_pil_llava_mole import LlavaMoleImageProcessorPil
from llava_family.llava_mole.processing_llava_mole import CHAT_TEMPLATES, LlavaMoleProcessor
from llava_family.llava_uhd.processing_llava_uhd import CHAT_TEMPLATE
from llava_family.moe_llava.tokenization_moe_llava import load_original_tokenizer


ROOT = Path(__file__).parents[1] / "fixtures"
FIXTURES = ROOT / "llava_mole"
VICUNA = FIXTURES / "original_checkpoint" / "vicuna-7b-v1.5"
METADATA = json.loads((FIXTURES / "expected.json").read_text())
CASES = METADATA["cases"]
NUM_IMAGE_TOKENS = 18  # of the goldens: 16 patches, the start and the end
PLACEHOLDER = 99999  # of the original
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
SQUARE, WIDE = Image.new("RGB", (50, 50), "red"), Image.new("RGB", (672, 336), "blue")
IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def make_processor(prompt_style="original", num_image_tokens=NUM_IMAGE_TOKENS, **kwargs):
    image_processor = LlavaMoleImageProcessorPil(size={"shortest_edge": 56}, crop_size=56, base_size=56, **kwargs)
    return LlavaMoleProcessor(
        image_processor,
        LlamaTokenizer.from_pretrained(VICUNA),
        num_image_tokens=num_image_tokens,
        num_queries=4,
        prompt_style=prompt_style,
    )


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def expand(processor, ids):
    """The original's ids with what its model puts in for the placeholder."""
    image = [processor.image_token_id] * processor.num_image_tokens
    return [new for token in ids for new in (image if token == PLACEHOLDER else [token])]


def with_image(messages, image=SQUARE):
    """The original puts its one image in front of the first message."""
    first, *others = messages
    return [{**first, "content": [text(first["content"]), {"type": "image", "image": image}]}, *others]


@pytest.fixture
def original_tokenizer():
    """The tokenizer that transformers 4.37 makes of the Vicuna folder."""
    tokenizer = LlamaTokenizer.from_pretrained(VICUNA)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return tokenizer


def original_ids(tokenizer, prompt):
    ids = []
    for index, chunk in enumerate(prompt.split("<image>\n")):
        ids += [PLACEHOLDER] * (index > 0) + tokenizer(chunk, add_special_tokens=False)["input_ids"]
    return ids


PROMPTS = [
    *[(case["messages"], case["prompt"], case["input_ids"]) for case in [*CASES, *METADATA["prompt_only"]]],
    # The third sample's ids are of single turns, which is not how the original makes a prompt.
    *[
        (sample["messages"], None, ids)
        for sample, ids in zip(METADATA["train"]["samples"][:2], METADATA["train"]["instruction_ids"], strict=False)
    ],
]


@pytest.mark.parametrize(("messages", "prompt", "ids"), PROMPTS)
def test_prompts_and_ids_are_those_of_the_original(processor, messages, prompt, ids):
    messages = with_image(messages)
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt in (None, rendered)
    inputs = processor(images=SQUARE, text=rendered, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == expand(processor, ids)
    same = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert set(same) == set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(same[name], inputs[name]) for name in inputs)


def test_a_batch_of_all_cases(processor):
    goldens = load_file(FIXTURES / "expected.safetensors")
    images = [Image.open(FIXTURES / case["image"]) for case in CASES]
    prompts = [case["prompt"] for case in CASES]
    inputs = processor(images=images, text=prompts, padding=True, padding_side="left", return_tensors="pt")
    for index, case in enumerate(CASES):
        ids = expand(processor, case["input_ids"])
        assert len(ids) == case["seq_len"]
        assert inputs["input_ids"][index, -len(ids) :].tolist() == ids
        assert inputs["attention_mask"][index].sum() == len(ids)
        assert torch.equal(inputs["pixel_values"][index], goldens[f"c{index}.pixel_values"])


def test_ids_of_any_prompt_are_those_of_the_original(processor, original_tokenizer):
    generator = random.Random(0)
    pieces = ["<image>\n", "</s>", "<s>", "<unk>", " ", "  ", "\n", "USER:", " a b", "\u2581", "hi", "é", "."]
    for _ in range(300):
        prompt = "".join(generator.choices(pieces, k=generator.randint(1, 12)))
        images = [SQUARE] * prompt.count("<image>")
        actual = processor(images=images or None, text=prompt)["input_ids"][0]
        assert actual == expand(processor, original_ids(original_tokenizer, prompt)), prompt
    assert original_ids(original_tokenizer, CASES[2]["prompt"]) == CASES[2]["input_ids"]


def test_other_special_tokens_are_followed_by_a_space_too(original_tokenizer):
    processor = make_processor()
    for tokenizer in (processor.tokenizer, original_tokenizer):
        tokenizer.add_tokens(["<image>", "<box>", "<box>es"], special_tokens=True)
    processor.tokenizer.add_tokens(["tree"])
    for prompt in ("a<box>b<box>es c", "<box>esc</s><box>"):
        assert processor(text=prompt)["input_ids"][0] == original_ids(original_tokenizer, prompt)
    assert processor.get_text_with_replacements(["tree x"])[0] == ["tree x"]


def test_truncation(processor, original_tokenizer):
    golden = METADATA["truncation"]
    assert golden["content"] == "'word ' * 4000"
    messages = with_image([{"role": "user", "content": "word " * 4000}])
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    max_length = golden["input_ids_len"] - 1 + processor.num_image_tokens
    ids = processor(images=SQUARE, text=prompt, truncation=True, max_length=max_length)["input_ids"][0]
    assert ids == expand(processor, original_ids(original_tokenizer, prompt)[: golden["input_ids_len"]])
    assert ids[-5:] == golden["last5"]
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        processor(images=SQUARE, text=prompt, truncation=True, max_length=40)


def test_a_beginning_of_sequence_can_be_asked_for(processor):
    assert processor(text="Hi")["input_ids"][0] == processor.tokenizer("Hi", add_special_tokens=False)["input_ids"]
    for kwargs in ({"add_special_tokens": True}, {"text_kwargs": {"add_special_tokens": True}}):
        assert processor(text="Hi", **kwargs)["input_ids"][0] == processor.tokenizer("Hi")["input_ids"]
    assert make_processor("v1")(text="Hi")["input_ids"][0][0] == processor.tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([("user", "Hi ")], "USER: Hi "),
        ([("user", "  Hi <image>\nyou"), ("assistant", " Yes ")], "USER: Hi \nyou ASSISTANT:  Yes </s>"),
        ([("user", "a"), ("assistant", "b"), ("user", " c ")], "USER: a ASSISTANT: b</s> USER:  c  "),
        ([("user", "a"), ("assistant", ""), ("user", "")], "USER: a ASSISTANT: USER: "),
        ([("user", "a"), ("assistant", None)], "USER: a ASSISTANT: "),
        ([("user", [IMAGE])], "USER: <image>\n "),
        ([("user", [IMAGE, text("a "), IMAGE, text("b")])], "USER: <image>\n<image>\na b "),
        (
            [("user", [text(" a <image>"), IMAGE]), ("assistant", [text("b")]), ("user", [text(" c "), IMAGE])],
            "USER: <image>\na ASSISTANT: b</s> USER: <image>\n c  ",
        ),
    ],
)
def test_chat_template(processor, messages, prompt):
    messages = [{"role": role, "content": content} for role, content in messages]
    assert processor.apply_chat_template(messages) == f"{SYSTEM} {prompt}"
    system = {"role": "system", "content": [text("Be brief.")]}
    assert processor.apply_chat_template([system, *messages]) == f"Be brief. {prompt}"
    separator = " " if prompt.endswith("</s>") else ""
    to_answer = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert to_answer == f"{SYSTEM} {prompt}{separator}ASSISTANT: "


def test_roles(processor):
    with pytest.raises(Exception, match="'user' and 'assistant'.* is tool"):
        processor.apply_chat_template([{"role": "tool", "content": "1"}])


def test_an_answer_can_be_begun(processor):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is"}]
    prompt = processor.apply_chat_template(messages, continue_final_message=True)
    assert prompt == f"{SYSTEM} USER: a ASSISTANT: It is"


def labels_of(processor, messages):
    batch = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"return_tensors": "pt"},
    )
    assistant = torch.as_tensor(batch["assistant_masks"]).bool()
    return batch["input_ids"].masked_fill(~assistant, -100)[0]


def test_training_labels_are_those_of_the_original(processor):
    labels = load_file(FIXTURES / "expected.safetensors")["train.labels"]
    for sample, expected in zip(METADATA["train"]["samples"], labels, strict=True):
        messages = [*sample["messages"], {"role": "assistant", "content": sample["answer"]}]
        actual = labels_of(processor, messages if sample["text_only"] else with_image(messages))
        assert actual[actual != -100].tolist() == expected[expected != -100].tolist()


@pytest.mark.parametrize("prompt_style", CHAT_TEMPLATES)
def test_answers_of_many_turns_are_masked(prompt_style):
    """Spaces that are put in before an answer must not shift its mask."""
    processor = make_processor(prompt_style)
    messages = []
    for turn in range(8):
        content = [text(f"What is {turn}?"), {"type": "image", "image": SQUARE}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": f"It is {turn}."}]
    labels = labels_of(processor, messages)
    answers = [processor.tokenizer(f" It is {turn}.</s>", add_special_tokens=False)["input_ids"] for turn in range(8)]
    assert labels[labels != -100].tolist() == [token for answer in answers for token in answer]


@pytest.mark.parametrize("images", [[SQUARE, WIDE, SQUARE], [[SQUARE], [WIDE, SQUARE], []]])
@pytest.mark.parametrize("prompt_style", CHAT_TEMPLATES)
def test_batches(images, prompt_style):
    processor = make_processor(prompt_style, num_image_tokens=5)
    texts = ["<image> 1", "2 <image>\n<image>\nmore", "none"]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [5, 10, 0]
    assert inputs["pixel_values"].shape == (3, 3, 56, 56)
    with pytest.raises(ValueError, match="1 <image> tokens and 2 images"):
        processor(images=[SQUARE, SQUARE], text="<image>")
    with pytest.raises(ValueError, match="no images were passed"):
        processor(text="<image>\nHi")


def test_without_replacements_placeholders_stay(processor):
    assert processor.get_text_with_replacements(["<image>\nHi"])[0] == ["<image> \nHi"]


def test_token_type_ids_and_offsets(processor):
    prompt = "a <image>\nb</s>c"
    inputs = processor(images=SQUARE, text=prompt, return_mm_token_type_ids=True, return_text_replacement_offsets=True)
    ids, types = inputs["input_ids"][0], inputs["mm_token_type_ids"][0]
    assert [int(token == processor.image_token_id) for token in ids] == types
    assert sum(types) == NUM_IMAGE_TOKENS
    placeholders = "<image>" * NUM_IMAGE_TOKENS
    image, after_end = inputs["text_replacement_offsets"][0]
    assert image == {
        "type": "image",
        "span": (2, 10),
        "new_span": (2, 3 + len(placeholders)),
        "text": "<image>\n",
        "replacement": placeholders + " ",
    }
    start = len(f"a {placeholders} b</s>")
    assert after_end == {
        "type": "text",
        "span": (15, 16),
        "new_span": (start, start + 2),
        "text": "c",
        "replacement": " c",
    }


def test_what_users_write_can_be_kept_from_being_special(processor):
    content = "x</s> y <image>"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    messages.append({"role": "user", "content": [{"type": "image", "image": SQUARE}, text(content)]})
    (ids,) = processor.apply_chat_template(messages, tokenize=True, sanitize_control_tokens=True)
    assert ids.count(processor.tokenizer.eos_token_id) == 1
    assert ids.count(processor.image_token_id) == NUM_IMAGE_TOKENS
    assert processor.tokenizer.decode(ids).endswith(content + " ")


@pytest.mark.parametrize("vision_encoding", ["square", "slices"])
def test_v1_is_the_prompt_of_llava(vision_encoding):
    processor = make_processor("v1", vision_encoding=vision_encoding)
    messages = [
        {"role": "user", "content": [IMAGE, text(" What is this? ")]},
        {"role": "assistant", "content": "A tree."},
        {"role": "user", "content": "Sure?"},
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == f"{SYSTEM} USER: <image>\n What is this?  ASSISTANT: A tree.</s>USER: Sure? ASSISTANT:"
    reference = MoeLlavaProcessor(
        processor.image_processor, processor.tokenizer, num_image_tokens=NUM_IMAGE_TOKENS, num_queries=4
    )
    actual, expected = (one(images=SQUARE, text=prompt)["input_ids"][0] for one in (processor, reference))
    if vision_encoding == "slices":
        first, image = expected.index(processor.image_token_id), [processor.image_token_id]
        last = len(expected) - expected[::-1].index(processor.image_token_id)
        expected = [*expected[:first], *image, *expected[first:last], *image, *expected[last:]]
    assert actual == expected


@pytest.mark.parametrize("in_call", [True, False])
def test_slices_lie_between_the_start_and_the_end(in_call):
    processor = make_processor(**({} if in_call else {"vision_encoding": "slices"}))
    images_kwargs = {"vision_encoding": "slices"} if in_call else {}
    uhd = LlavaUhdProcessor(LlavaUhdImageProcessorPil(base_size=56), processor.tokenizer, num_queries=4)
    images, image = [WIDE, SQUARE], [processor.image_token_id]
    actual = processor(images=images, text=["<image>\nHi", "<image>\n"], images_kwargs=images_kwargs)
    expected = uhd(images=images, text=["<image>", "<image>"], add_special_tokens=False)
    question = processor.tokenizer("Hi", add_special_tokens=False)["input_ids"]
    layouts = [[*image, *layout, *image] for layout in expected["input_ids"]]
    assert actual["input_ids"] == [[*layouts[0], *question], layouts[1]]
    assert actual["image_grids"].tolist() == expected["image_grids"].tolist()
    counted = processor._get_num_multimodal_tokens(image_sizes=[(336, 672), (50, 50)], **images_kwargs)
    plans = [plan_slices(*image.size, base_size=56) for image in images]
    assert counted["num_image_tokens"] == [2 + plan.num_features(4) for plan in plans]
    assert counted["num_image_tokens"] == [ids.count(processor.image_token_id) for ids in actual["input_ids"]]
    assert counted["num_image_patches"] == [plan.num_patches for plan in plans]


def test_number_of_image_tokens(processor):
    counted = processor._get_num_multimodal_tokens(image_sizes=[(61, 83), (95, 57)])
    assert counted["num_image_tokens"] == [NUM_IMAGE_TOKENS] * 2
    assert counted["num_image_patches"] == [1, 1]
    assert "num_image_tokens" not in processor._get_num_multimodal_tokens()
    default = LlavaMoleProcessor(LlavaMoleImageProcessorPil(), processor.tokenizer)
    assert (default.num_image_tokens, default.num_queries, default.prompt_style) == (578, 144, "original")


@pytest.mark.parametrize("prompt_style", CHAT_TEMPLATES)
def test_save_and_load(prompt_style, tmp_path):
    processor = make_processor(prompt_style)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["prompt_style"] == prompt_style
    loaded = LlavaMoleProcessor.from_pretrained(tmp_path)
    assert type(loaded.image_processor) is LlavaMoleImageProcessorPil
    assert (loaded.prompt_style, loaded.num_image_tokens, loaded.num_queries) == (prompt_style, NUM_IMAGE_TOKENS, 4)
    assert loaded.chat_template == processor.chat_template == CHAT_TEMPLATES[prompt_style]
    inputs = {"images": SQUARE, "text": CASES[2]["prompt"], "return_tensors": "pt"}
    expected = processor(**inputs)
    assert all(torch.equal(loaded(**inputs)[name], expected[name]) for name in expected)


def test_the_template_follows_the_style_unless_it_was_given(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert LlavaMoleProcessor.from_pretrained(tmp_path, prompt_style="v1").chat_template == CHAT_TEMPLATE
    arguments = {"prompt_style": "v1", "chat_template": CHAT_TEMPLATES["original"]}
    assert LlavaMoleProcessor.from_pretrained(tmp_path, **arguments).chat_template == CHAT_TEMPLATES["original"]
    arguments = {"prompt_style": "original", "chat_template": CHAT_TEMPLATE}
    LlavaMoleProcessor(processor.image_processor, processor.tokenizer, **arguments).save_pretrained(tmp_path)
    assert LlavaMoleProcessor.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATE
    own = LlavaMoleProcessor(processor.image_processor, processor.tokenizer, chat_template="{{ 1 }}")
    assert own.chat_template == "{{ 1 }}"
    own.save_pretrained(tmp_path)
    assert LlavaMoleProcessor.from_pretrained(tmp_path, prompt_style="v1").chat_template == "{{ 1 }}"


def test_unknown_style(processor):
    with pytest.raises(ValueError, match='`prompt_style` must be "original" or "v1", but is \'v0\'.'):
        LlavaMoleProcessor(processor.image_processor, processor.tokenizer, prompt_style="v0")


def test_tokenizers_without_a_leading_space_are_given_none():
    tokenizer = load_original_tokenizer(ROOT / "moe_llava" / "phi_clip336" / "original_checkpoint")
    processor = LlavaMoleProcessor(LlavaMoleImageProcessorPil(), tokenizer, num_image_tokens=3)
    expected = [*tokenizer(" a")["input_ids"], *[processor.image_token_id] * 3, *tokenizer("b")["input_ids"]]
    assert processor(images=SQUARE, text=" a<image>\nb")["input_ids"][0] == expected
