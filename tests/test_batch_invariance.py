"""A row of a batch says what it says alone, however it is padded, attended to, cached and decoded.

200 random batches of every family. Padded on either side, each must give every row's logits. Then it is decoded in one
of `WAYS`, in turn, and must give every row's tokens.
"""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image

from .families import FAMILIES, steady_model
from .training.tiny import WORDS, tiny_processor


ATTENTIONS = ("sdpa", "eager")
MODES = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "beam search": {"num_beams": 3},
    "embeddings": {},
    "assistant": {},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
ONE_BY_ONE = ("assistant", "prompt lookup")  # transformers decodes no batch with them
SIDES = ("left", "right")
WAYS = list(itertools.product(MODES, ATTENTIONS, SIDES))  # 24: each decodes 8 or 9 batches
NUM_BATCHES = 200
TOLERANCE = 1e-5
# Of batches where nothing is a tie but for rounding, which the test makes sure of
SEEDS = {"llava_uhd": 0, "moe_llava": 0, "llava_mole": 1}
# Any of these ends an answer, so that rows of a batch end at different times.
ENDS = range(2, 60)
SETTINGS = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": list(ENDS)}


def random_row(rng):
    """Words and up to three images, the smallest of 8 pixels, the most elongated of 1:30."""
    images, text = [], rng.choice(WORDS)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        width, height = (int(8 * 30 ** rng.random()) for _ in range(2))
        pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (height, width, 3), dtype=np.uint8)
        images.append(Image.fromarray(pixels))
        text += "<image>\n" + " ".join(rng.choices(WORDS, k=rng.randint(0, 4)))
    return images, text + " " + " ".join(rng.choices(WORDS, k=rng.randint(0, 8)))


def encode(processor, rows, padding_side="left"):
    images = [images for images, _ in rows]
    arguments = {"padding": True, "padding_side": padding_side, "return_tensors": "pt"}
    return processor(images=images if any(images) else None, text=[text for _, text in rows], **arguments)


def decode(model, inputs, mode, assistant=None):
    """New tokens of every row, to its end."""
    settings, length = {**SETTINGS, **MODES[mode]}, inputs["input_ids"].shape[1]
    if mode == "embeddings":
        inputs, length = embed(model, inputs), 0
    if mode == "assistant":
        settings["assistant_model"] = assistant
    generated = model.generate(**inputs, **settings)[:, length:]
    return [until_end(row) for row in generated.tolist()]


def until_end(tokens):
    ends = [index for index, token in enumerate(tokens) if token in ENDS]
    return tokens[: ends[0] + 1] if ends else tokens


def embed(model, inputs):
    """The same prompts as embeddings."""
    is_image = inputs["input_ids"] == model.config.image_token_id
    embeddings = model.get_input_embeddings()(inputs["input_ids"].masked_fill(is_image, 0))
    if "pixel_values" in inputs:
        images = {name: inputs[name] for name in ("pixel_values", "image_grids") if name in inputs}
        embeddings[is_image] = torch.cat(list(model.get_image_features(**images).pooler_output))
    return {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}


def margin(scores, chosen=1):
    """How far what is chosen is from what is not."""
    best = scores.flatten(0, -2).topk(chosen + 1).values
    return (best[:, -2] - best[:, -1]).min().item()


def assert_rows_have_their_logits(model, batch, expected):
    for logits, mask, alone in zip(model(**batch).logits, batch["attention_mask"], expected, strict=True):
        torch.testing.assert_close(logits[mask.bool()], alone.logits[0], atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_are_as_they_are_alone(family):
    rng, processor = random.Random(SEEDS[family]), tiny_processor(family)
    model, assistant = steady_model(family), steady_model(family, seed=1)
    routing = {"moe_llava": {"output_router_logits": True}, "llava_mole": {"output_router_logits": True}}
    num_chosen = 2 if family == "moe_llava" else 1
    token_margins, expert_margins = [], []
    for number in range(NUM_BATCHES):
        mode, attention, side = WAYS[number % len(WAYS)]
        rows = [random_row(rng) for _ in range(rng.choice([1, 2, 2, 3, 5]))]
        alone = [encode(processor, [row]) for row in rows]
        batches = {side: encode(processor, rows, side) for side in SIDES}
        for each in (model, assistant):
            each.set_attn_implementation(attention)

        expected = [model(**inputs, **routing.get(family, {})) for inputs in alone]
        for batch in batches.values():
            assert_rows_have_their_logits(model, batch, expected)
        token_margins += [margin(outputs.logits[:, -1]) for outputs in expected]
        expert_margins += [margin(logits, num_chosen) for o in expected for logits in o.get("router_logits") or ()]

        reference = mode if mode == "beam search" else "greedy"
        tokens = [decode(model, inputs, reference)[0] for inputs in alone]
        if mode in ONE_BY_ONE:
            found = [decode(model, inputs, mode, assistant)[0] for inputs in alone]
        else:
            found = decode(model, batches[side], mode)
        assert found == tokens, (number, mode, attention, side)
    # None of it hangs on rounding, on whatever processor this runs.
    assert min(token_margins) > 2 * TOLERANCE and min(expert_margins, default=1) > TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prompt_padded_on_the_right_comes_back_padded_on_the_left(family, caplog):
    processor, model = tiny_processor(family), steady_model(family)
    rows = [([], "what is this"), ([Image.new("RGB", (40, 90))], "<image>\nwhat")]
    left, right = (encode(processor, rows, side) for side in SIDES)
    assert not torch.equal(left["input_ids"], right["input_ids"])
    assert torch.equal(model.generate(**left, **SETTINGS), model.generate(**right, **SETTINGS))
    assert "right-padding" not in caplog.text
