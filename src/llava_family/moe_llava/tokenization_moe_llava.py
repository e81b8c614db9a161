# Copyright 2026 The llava-family authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Tokenizers of the original MoE-LLaVA releases as fast ones with the same ids; their own classes are remote code."""

import base64
import binascii
import os
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, normalizers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.codegen.tokenization_codegen import CodeGenTokenizer
from transformers.models.llama.tokenization_llama import LlamaTokenizer
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast
from transformers.utils import cached_file

from ..llava_uhd.loading_llava_uhd import read_json_object


# Both tiktoken tokenizers cut text alike; numbers fall into single digits.
TIKTOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Stands where an id has no token. It is no added token, and since the pattern cuts it, no text becomes this id.
HOLE_TOKEN = "<|hole|>"

# Arguments of `from_pretrained` that say where and how to look for a file
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# The merges of a token are searched at all its cuts. The longest of Qwen has 128 bytes.
MAX_TOKEN_BYTES = 1024


@dataclass(frozen=True)
class TiktokenFamily:
    """What a `.tiktoken` file does not say: the special tokens behind its ranks, and which of them pads."""

    special_tokens: tuple[str, ...]
    pad_token: str
    num_holes: int = 0


TIKTOKEN_FAMILIES = {
    "arcade100k.tiktoken": TiktokenFamily(
        special_tokens=(
            "<|endoftext|>",
            "<|fim_prefix|>",
            "<|fim_middle|>",
            "<|fim_suffix|>",
            "<|fim_pad|>",
            "<gh_stars>",
            "<filename>",
            "<issue_start>",
            "<issue_comment>",
            "<issue_closed>",
            "<jupyter_start>",
            "<jupyter_text>",
            "<jupyter_code>",
            "<jupyter_output>",
            "<empty_output>",
            "<commit_before>",
            "<commit_msg>",
            "<commit_after>",
            "<reponame>",
            "<|endofprompt|>",
            "<|im_start|>",
            "<|im_end|>",
            "<|pause|>",
            *(f"<|reg{index}|>" for index in range(8)),
            "<|extra0|>",
        ),
        # As in training. The original class pads with `<|endoftext|>` once it is reloaded, which masks the same.
        pad_token="<|reg0|>",
        num_holes=1,
    ),
    "qwen.tiktoken": TiktokenFamily(
        special_tokens=(
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            *(f"<|extra_{index}|>" for index in range(205)),
        ),
        pad_token="<|extra_0|>",
    ),
}


def read_tiktoken_ranks(path: str | os.PathLike) -> dict[bytes, int]:
    """Reads a `.tiktoken` file: one `<base64 of a token's bytes> <rank>` per line.

    Returns:
        `dict[bytes, int]`: rank by token, of all 256 single bytes and any longer tokens; the ranks are `0..n-1`.

    Raises:
        ValueError: naming file and line, if the file is anything else.
    """
    ranks: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                encoded, rank_text = line.split()
                token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
            except (ValueError, binascii.Error):
                raise ValueError(
                    f"Line {number} of {path} must be a token in base64 and its rank, but is {line[:80]!r}."
                ) from None
            if not 0 < len(token) <= MAX_TOKEN_BYTES:
                raise ValueError(
                    f"Line {number} of {path} must hold a token of 1 to {MAX_TOKEN_BYTES} bytes, but has {len(token)}."
                )
            if rank in line_of_rank:
                raise ValueError(f"Lines {line_of_rank[rank]} and {number} of {path} both have rank {rank}.")
            if token in ranks:
                raise ValueError(
                    f"Lines {line_of_rank[ranks[token]]} and {number} of {path} both have token {token!r}."
                )
            ranks[token] = rank
            line_of_rank[rank] = number
    # The ids of special tokens follow from the number of ranks.
    for rank, number in line_of_rank.items():
        if not 0 <= rank < len(ranks):
            raise ValueError(
                f"Line {number} of {path} has rank {rank}, but its {len(ranks)} tokens must have ranks from 0 to "
                f"{len(ranks) - 1}."
            )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{path} must have all single bytes as tokens, but {len(missing)} are missing: {missing[:8]}."
        )
    return ranks


class _TiktokenConverter(TikTokenConverter):
    """transformers' converter without its dependency on `tiktoken`, and with a check of what is read."""

    load_tiktoken_bpe = staticmethod(read_tiktoken_ranks)

    def __init__(self, vocab_file: str, family: TiktokenFamily):
        super().__init__(vocab_file, pattern=TIKTOKEN_PATTERN, extra_special_tokens=list(family.special_tokens))
        self.num_holes = family.num_holes

    def extract_vocab_merges_from_model(self, tiktoken_url: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
        vocab, merges = super().extract_vocab_merges_from_model(tiktoken_url)
        names = [HOLE_TOKEN, *self.extra_special_tokens]
        taken = [name for name in names if name in vocab]
        if taken:
            raise ValueError(f"{self.vocab_file} must not hold special tokens, but has {taken}.")
        for _ in range(self.num_holes):
            vocab[HOLE_TOKEN] = len(vocab)
        return vocab, merges

    def converted(self) -> Tokenizer:
        tokenizer = super().converted()
        tokenizer.normalizer = normalizers.NFC()
        return tokenizer


def load_original_tokenizer(folder: str | os.PathLike, **kwargs) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of an original release, which is told by the files that it consists of.

    Source: the original releases' tokenizers, whose ids it gives; transformers' `AutoTokenizer`.

    Args:
        folder (`str` or `os.PathLike`): Folder or Hub name of the release.
        kwargs: Where and how to look on the Hub, as in `from_pretrained`; anything else is ignored.

    Returns:
        `PreTrainedTokenizerFast`: it encodes as the original, adds no token of its own and pads on the right.

    Raises:
        FileNotFoundError: if there are no files of a known tokenizer.
        ValueError: if one of them is malformed; the message names it.
    """

    kwargs = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}

    def find(name: str) -> str | None:
        return cached_file(folder, name, **kwargs, _raise_exceptions_for_missing_entries=False)

    for name, family in TIKTOKEN_FAMILIES.items():
        if (path := find(name)) is not None:
            return _load_tiktoken(path, family, find("tokenizer_config.json"), find("special_tokens_map.json"))
    if find("vocab.json") is not None and find("merges.txt") is not None:
        # The clean-up, which releases ask for, would drop spaces that the model wrote; transformers refuses it by now.
        return CodeGenTokenizer.from_pretrained(folder, **kwargs, clean_up_tokenization_spaces=False)
    if find("tokenizer.model") is not None or find("tokenizer.json") is not None:
        return LlamaTokenizer.from_pretrained(folder, **kwargs)
    raise FileNotFoundError(
        f"{folder} must hold the tokenizer of a MoE-LLaVA release: {', '.join(TIKTOKEN_FAMILIES)}, vocab.json with "
        "merges.txt, tokenizer.model or tokenizer.json."
    )


def _load_tiktoken(
    path: str, family: TiktokenFamily, config_path: str | None, special_tokens_path: str | None
) -> PreTrainedTokenizerFast:
    backend = _TiktokenConverter(path, family).converted()
    config = read_json_object(config_path) if config_path else {}
    special_tokens = read_json_object(special_tokens_path) if special_tokens_path else {}
    names: dict[str, Any] = {
        "eos_token": "<|endoftext|>",
        "pad_token": family.pad_token,
        "unk_token": family.pad_token,
    }
    for role in ("bos_token", *names):
        token = config.get(role, special_tokens.get(role, names.get(role)))
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            continue
        if token not in family.special_tokens:
            # It would be added, and the ids of all tokens that are added later would shift.
            raise ValueError(
                f"The `{role}` of {os.path.dirname(path)} must be one of its special tokens, but is {token!r}."
            )
        names[role] = token
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=config.get("model_max_length", 2048),
        padding_side=config.get("padding_side", "right"),
        clean_up_tokenization_spaces=False,
        **names,
    )


__all__ = ["load_original_tokenizer"]
