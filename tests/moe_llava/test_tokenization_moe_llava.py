import base64
import json
import random
import shutil
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import torch
from transformers import AutoTokenizer, LlamaTokenizer

from llava_family.moe_llava.tokenization_moe_llava import (
    HOLE_TOKEN,
    TIKTOKEN_FAMILIES,
    TIKTOKEN_PATTERN,
    load_original_tokenizer,
    read_tiktoken_ranks,
)

from .conftest import FIXTURES, ROOT


QWEN = FIXTURES / "qwen_clip336" / "original_checkpoint"
STABLELM = FIXTURES / "stablelm_clip336" / "original_checkpoint"
LLAMA = ROOT / "tests" / "fixtures" / "llava_uhd" / "original_checkpoint"
NUM_RANKS = 346
IMAGE_TOKEN_INDEX = -200  # of the original


@pytest.fixture(scope="module", params=[QWEN, STABLELM], ids=["qwen", "stablelm"])
def tiktoken_folder(request):
    return request.param


def with_image_token(tokenizer):
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def test_ids_are_those_of_the_original(variant):
    tokenizer = with_image_token(load_original_tokenizer(variant.original))
    image = tokenizer.convert_tokens_to_ids("<image>")
    for index, prompt in enumerate(variant.metadata["prompts"]):
        ids = [IMAGE_TOKEN_INDEX if token == image else token for token in tokenizer(prompt)["input_ids"]]
        assert ids == variant[f"input_ids.{index}"].tolist()


def test_ids_of_a_prompt_without_image(variant):
    tokenizer = load_original_tokenizer(variant.original)
    prompt = variant.metadata["prompts"][1].replace("<image>\n", "")
    assert torch.equal(tokenizer(prompt, return_tensors="pt")["input_ids"], variant["text_only.input_ids"])


def test_special_tokens(variant):
    tokenizer = load_original_tokenizer(variant.original)
    expected = variant.metadata["variant"]["tokenizer"]
    assert len(tokenizer) == expected["len_tokenizer"]
    for role in ("pad", "eos", "unk", "bos"):
        assert getattr(tokenizer, f"{role}_token") == expected[role]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (expected["pad_id"], expected["eos_id"])
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (2048, "right")
    assert tokenizer.clean_up_tokenization_spaces is False
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert tokenizer("<|endoftext|>")["input_ids"] == [expected["eos_id"]]
    assert tokenizer.decode([expected["eos_id"], expected["pad_id"]], skip_special_tokens=True) == ""


def test_names_of_all_special_tokens():
    """With the numbers of ranks that the released files have."""
    stablelm, qwen = TIKTOKEN_FAMILIES["arcade100k.tiktoken"], TIKTOKEN_FAMILIES["qwen.tiktoken"]
    assert len(stablelm.special_tokens) == 32 and len(qwen.special_tokens) == 208
    assert 100256 + stablelm.num_holes + stablelm.special_tokens.index("<|reg0|>") == 100280
    assert 151643 + qwen.num_holes + qwen.special_tokens.index("<|extra_1|>") == 151647


def test_every_id_can_be_decoded(variant):
    tokenizer = with_image_token(load_original_tokenizer(variant.original))
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    assert all(texts)
    assert len(tokenizer.batch_decode([list(range(len(tokenizer)))])[0]) >= len(tokenizer) // 2


def test_the_hole_is_kept_and_no_text_reaches_it():
    tokenizer = load_original_tokenizer(STABLELM)
    assert tokenizer.convert_ids_to_tokens(NUM_RANKS) == HOLE_TOKEN
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == NUM_RANKS + 1
    for text in (HOLE_TOKEN, f"a {HOLE_TOKEN}b", f"\n{HOLE_TOKEN}\n"):
        assert NUM_RANKS not in tokenizer(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert load_original_tokenizer(QWEN).convert_tokens_to_ids("<|endoftext|>") == NUM_RANKS


ALPHABET = [
    *map(chr, range(0x00, 0x180)),
    *"\u0301\u0308\u1100\u1161\u212b\u00a0\u2003\u3000日本語한국어עבריתالعربية😀👍🏽\u200d\ufeff\U0010ffff",
    *["'s", "'LL", "  ", "\r\n", "\n\n", "123", "<|", "|>", " the", "answer", " user's", "<image", "im_start"],
]


def random_texts(number, seed=0):
    generator = random.Random(seed)
    return ["".join(generator.choices(ALPHABET, k=generator.randrange(40))) for _ in range(number)]


def test_texts_survive_in_nfc(tiktoken_folder):
    tokenizer = load_original_tokenizer(tiktoken_folder)
    for text in random_texts(500):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_digits_are_single(tiktoken_folder):
    splitter = load_original_tokenizer(tiktoken_folder).backend_tokenizer.pre_tokenizer
    pieces = [piece for piece, _ in splitter.pre_tokenize_str("in 2024\n")]
    assert pieces == ["in", "\u0120", "2", "0", "2", "4", "\u010a"]


def reference_encode(text, ranks):
    """tiktoken's algorithm: in every piece, the adjacent pair of lowest rank is merged, the leftmost one first."""
    ids = []
    for piece in regex.findall(TIKTOKEN_PATTERN, unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in piece.encode()]
        while len(parts) > 1:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
            best = min(pairs)
            if best == len(ranks):
                break
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_ids_are_those_of_tiktoken_s_algorithm(tiktoken_folder):
    tokenizer = load_original_tokenizer(tiktoken_folder)
    ranks = read_tiktoken_ranks(next(tiktoken_folder.glob("*.tiktoken")))
    for text in [
        *random_texts(500, seed=1),
        "A chat between a curious user",
        "aaaaaaa",
        " " * 9,
        "user's  answers\n\n 42",
    ]:
        assert tokenizer(text)["input_ids"] == reference_encode(text, ranks)


def test_round_trip(variant, tmp_path):
    tokenizer = load_original_tokenizer(variant.original)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token, loaded.eos_token, loaded.bos_token) == (
        tokenizer.pad_token,
        tokenizer.eos_token,
        tokenizer.bos_token,
    )
    assert (loaded.model_max_length, loaded.padding_side) == (2048, "right")
    for text in [*random_texts(100), *variant.metadata["prompts"], "<|endoftext|>USER: \t\t\t x      y"]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert set(loaded(text)) == {"input_ids", "attention_mask"}


def test_llama():
    tokenizer = load_original_tokenizer(LLAMA)
    assert isinstance(tokenizer, LlamaTokenizer)
    assert tokenizer("Hi there")["input_ids"] == LlamaTokenizer.from_pretrained(LLAMA)("Hi there")["input_ids"]


def test_arguments_for_the_hub_alone_are_passed_on():
    tokenizer = load_original_tokenizer(QWEN, trust_remote_code=True, local_files_only=True, num_image_tokens=3)
    assert len(tokenizer) == NUM_RANKS + 208


def test_without_tokenizer_files(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="qwen.tiktoken, vocab.json"):
        load_original_tokenizer(tmp_path)


def test_without_configuration_files(tmp_path):
    for folder, pad in ((QWEN, "<|extra_0|>"), (STABLELM, "<|reg0|>")):
        target = tmp_path / folder.parent.name
        target.mkdir()
        shutil.copy(next(folder.glob("*.tiktoken")), target)
        tokenizer = load_original_tokenizer(target)
        assert (tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token) == (pad, pad, "<|endoftext|>")
        assert (tokenizer.bos_token, tokenizer.model_max_length) == (None, 2048)


def edited(lines, number, line):
    """`lines` with the one of this number, counted from 1, replaced."""
    return [*lines[: number - 1], line, *lines[number:]]


def encode(token):
    return base64.b64encode(token)


BROKEN = {
    "one column": (lambda lines: edited(lines, 7, b"YQ=="), "Line 7 of .*base64 and its rank.*YQ=="),
    "three columns": (lambda lines: edited(lines, 7, b"YQ== 6 6"), "Line 7 of "),
    "no base64": (lambda lines: edited(lines, 300, b"en!p6 299"), "Line 300 of .*base64"),
    "no rank": (lambda lines: edited(lines, 9, b"YQ== eight"), "Line 9 of .*rank"),
    "empty token": (lambda lines: edited(lines, 300, b"= 299"), "Line 300 of "),
    "long token": (lambda lines: [*lines, encode(b"a" * 2000) + b" 346"], "Line 347 of .*1024 bytes, but has 2000"),
    "same rank": (lambda lines: [*lines, encode(b"zzz") + b" 3"], "Lines 4 and 347 of .* rank 3"),
    "same token": (lambda lines: [*lines, lines[300].split()[0] + b" 346"], "Lines 301 and 347 of .* token"),
    "gap": (lambda lines: [*lines, encode(b"zzz") + b" 347"], "Line 347 of .* has rank 347.*0 to 346"),
    "negative": (lambda lines: [*lines, encode(b"zzz") + b" -1"], "Line 347 of .* has rank -1"),
    "missing byte": (lambda lines: edited(lines, 66, encode(b"zzz") + b" 65"), r"1 are missing: \[65\]"),
    "special token": (lambda lines: [*lines, encode(b"<|im_end|>") + b" 346"], "special tokens, but has .*im_end"),
    "empty": (lambda lines: [], "256 are missing"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_ranks_are_named(tmp_path, damage, message):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(b"\n".join(damage((QWEN / path.name).read_bytes().splitlines())))
    with pytest.raises(ValueError, match=message) as error:
        load_original_tokenizer(tmp_path)
    assert str(path) in str(error.value)


def test_blank_lines_and_windows_line_ends_are_fine(tmp_path):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes((QWEN / path.name).read_bytes().replace(b"\n", b"\r\n") + b"\r\n\n")
    assert read_tiktoken_ranks(path) == read_tiktoken_ranks(QWEN / path.name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "tokenizer_config.json is no JSON"),
        ("[1]", "tokenizer_config.json must hold a JSON object, but holds a list"),
        (json.dumps({"pad_token": "<pad>"}), "`pad_token` of .* special tokens, but is '<pad>'"),
        (json.dumps({"eos_token": ["x"]}), "`eos_token` of .* special tokens, but is"),
    ],
)
def test_broken_configuration_files(tmp_path, content, message):
    shutil.copy(QWEN / "qwen.tiktoken", tmp_path)
    Path(tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_original_tokenizer(tmp_path)
