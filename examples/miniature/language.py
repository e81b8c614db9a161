"""A language model for the miniatures: what Vicuna is to the papers.

It learns to answer questions about pictures that are described in words, patch by patch in the order in which a vision
encoder would see them, with separators between slices. A patch is one position, with the sum of its words' embeddings.
Stage 1 then only has to teach a projector these sums.
"""

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world import COLOURS, DIGITS, INKS, SHAPES

from llava_family.llava_uhd.processing_llava_uhd import CHAT_TEMPLATE as VICUNA_TEMPLATE


END_OF_TURN, PADDING = "</s>", "<pad>"
NOTHING = " ."  # a part of a picture where nothing is
# Without Vicuna's system message, forty tokens that no one here learns from.
START, END = VICUNA_TEMPLATE.index("{%- set system = "), VICUNA_TEMPLATE.index("{%- set turns = messages -%}")
CHAT_TEMPLATE = VICUNA_TEMPLATE[:START] + '{%- set system = "A chat." -%}\n' + VICUNA_TEMPLATE[END:]

# Slices per row, rows of slices, and parts of a view
LAYOUTS = (
    (1, 1, 36),
    (1, 1, 64),
    (1, 1, 64),
    (2, 1, 36),
    (1, 2, 36),
    (3, 1, 36),
    (1, 3, 36),
    (4, 1, 36),
    (1, 4, 36),
)

# Who lives at a number is nothing that this model is told; the words are for those who are.
PEOPLE = (
    "Ada",
    "Bo",
    "Cleo",
    "Dan",
    "Eve",
    "Finn",
    "Gus",
    "Hana",
    "Ivo",
    "Jun",
    "Kai",
    "Lea",
    "Mia",
    "Noa",
    "Oda",
    "Pia",
)
READ, COLOUR_OF, SHAPE_OF, COUNT, LIVES = (
    "What number is written?",
    "What colour is the {}?",
    "Which shape is {}?",
    "How many shapes are there?",
    "Who lives at this number?",
)

Part = tuple[str, ...]  # what is in one patch, in words, such as `(" red", " circle")`


def caption_of(number: str, shapes: list[str], ink: str | None = None) -> str:
    """What is on a picture, such as `"47, red circle"`, or `"47 blue, red circle"` where the number is in colour."""
    return ", ".join([number + (f" {ink}" if ink else ""), *shapes])


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with one token for every word of this world and for every digit."""
    sentences = [
        READ,
        COUNT,
        SHAPE_OF,
        COLOUR_OF,
        COLOUR_OF.format("number"),
        LIVES,
        "A chat. USER: ASSISTANT:",
        NOTHING,
    ]
    words = [*COLOURS, *SHAPES, *PEOPLE]
    sentences += [f" {word}" for word in words]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        special_tokens=[PADDING, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PADDING,
        eos_token=END_OF_TURN,
        model_max_length=2048,
        padding_side="left",
    )


@dataclass(frozen=True)
class Description:
    """A picture in words: its views, patch by patch, and what is on it."""

    views: list[list[Part]]
    columns: int  # slices per row
    number: str
    ink: str | None
    shapes: list[str]


def describe(rng: random.Random, layout: tuple[int, int, int]) -> Description:
    """A random picture; its overview, behind more than one slice, shows everything again, or nothing that small."""
    columns, rows, cells = layout
    number, ink = "".join(rng.choices(DIGITS, k=rng.randint(1, 3))), rng.choice((None, *INKS))
    names = zip(rng.sample(list(COLOURS), 3), rng.sample(SHAPES, 3), strict=True)
    shapes = [(f" {colour}", f" {shape}") for colour, shape in names][: rng.randint(0, 3)]
    digits = [(digit, f" {ink}") if ink else (digit,) for digit in number]
    slices = _scatter(rng, columns * rows * cells, digits, shapes)
    views = [slices[start : start + cells] for start in range(0, len(slices), cells)]
    if len(views) > 1:
        views.append(_scatter(rng, cells, digits, shapes) if rng.random() < 0.5 else [(NOTHING,)] * cells)
    return Description(views, columns, number, ink, ["".join(shape).strip() for shape in shapes])


def _scatter(rng: random.Random, size: int, digits: list[Part], shapes: list[Part]) -> list[Part]:
    """Puts digits, near each other and in order, and shapes anywhere, on an empty place."""
    parts: list[Part] = [(NOTHING,)] * size
    step = rng.randint(1, 3)
    start = rng.randrange(size - step * (len(digits) - 1))
    taken = [start + step * index for index in range(len(digits))]
    free = [place for place in range(size) if place not in taken]
    for place, part in zip([*taken, *rng.sample(free, len(shapes))], [*digits, *shapes], strict=True):
        parts[place] = part
    return parts


def ask(rng: random.Random, described: Description) -> tuple[str, str]:
    """A question and its answer."""
    kind = rng.random()
    if kind < 0.15 and described.ink:
        return COLOUR_OF.format("number"), described.ink
    if kind < 0.3:
        return COUNT, str(len(described.shapes))
    if kind < 0.65 and described.shapes:
        colour, shape = rng.choice(described.shapes).split()
        return (COLOUR_OF.format(shape), colour) if kind < 0.48 else (SHAPE_OF.format(colour), shape)
    return READ, described.number


def draw_sample(rng: random.Random, layout: tuple[int, int, int]) -> tuple[list[Part], str]:
    """A prompt, whose patches may have several words each, and what is learned: an answer, or a caption."""
    described = describe(rng, layout)
    parts: list[Part] = []
    for index, view in enumerate(described.views):
        parts += view
        if index < len(described.views) - 1:
            parts.append(("," if (index + 1) % described.columns else "\n",))
    if rng.random() < 0.2:
        return parts, caption_of(described.number, described.shapes, described.ink) + "\n"
    question, answer = ask(rng, described)
    return [("A chat. USER:",), *parts, (f"\n{question} ASSISTANT:",)], f" {answer}{END_OF_TURN}"


@lru_cache(maxsize=4096)
def _ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def encode(tokenizer: PreTrainedTokenizerFast, prompt: list[Part]) -> list[list[int]]:
    """Token ids by position: a patch is one position, of as many tokens as it has words; a text has one token each."""
    positions = []
    for part in prompt:
        ids = [_ids_of(tokenizer, word) for word in part]
        positions += [[each for word in ids for each in word]] if len(part) > 1 else [[each] for each in ids[0]]
    return positions


def draw_batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast, size: int) -> dict[str, torch.Tensor]:
    """Samples of one layout, padded on the right: `input_ids` `(size, length, 2)`, up to two of a position."""
    layout = rng.choice(LAYOUTS)
    rows, padding = [], tokenizer.pad_token_id
    for _ in range(size):
        prompt, answer = draw_sample(rng, layout)
        positions, learned = encode(tokenizer, prompt), tokenizer(answer)["input_ids"]
        labels = [-100] * len(positions) + learned
        positions += [[token] for token in learned]
        rows.append((torch.tensor([[*ids, padding][:2] for ids in positions]), torch.tensor(labels)))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([ids for ids, _ in rows], batch_first=True, padding_value=padding)
    labels = pad([labels for _, labels in rows], batch_first=True, padding_value=-100)
    mask = pad([torch.ones(len(ids), dtype=torch.long) for ids, _ in rows], batch_first=True)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def embed(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch, with the sum of a position's words in the place of `input_ids`: what a projector is to give."""
    ids = batch["input_ids"]
    words = model.get_input_embeddings()(ids) * (ids != model.config.pad_token_id).unsqueeze(-1)
    return {"inputs_embeds": words.sum(-2), "labels": batch["labels"], "attention_mask": batch["attention_mask"]}


def train_language_model(output: Path, steps: int = 8000, batch_size: int = 16, learning_rate: float = 2e-3) -> None:
    """Trains a Llama of 0.38 million parameters, and saves it with its tokenizer."""
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    progress = trange(steps, desc="Language model")
    for _ in progress:
        loss = model(**embed(model, draw_batch(rng, tokenizer, batch_size))).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval().save_pretrained(output)
    tokenizer.save_pretrained(output)


@torch.no_grad()
def language_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batches: int = 10) -> float:
    """Part of new samples of which every learned token is the most probable one."""
    rng, right, total = random.Random(1), 0, 0
    for _ in range(batches):
        batch = embed(model, draw_batch(rng, tokenizer, 64))
        labels = batch.pop("labels")[:, 1:]
        predicted = model(**batch).logits.argmax(dim=-1)[:, :-1]
        right += ((predicted == labels) | (labels == -100)).all(dim=1).sum().item()
        total += len(labels)
    return right / total
