"""A language model for the miniatures: what Vicuna is to the papers.

It learns to answer questions about pictures that are described in words, in the order in which a vision encoder would
see them, with separators between slices. Stage 1 then only has to teach a projector these words.
"""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world import COLOURS, DIGITS, SHAPES

from llava_family.llava_uhd.processing_llava_uhd import CHAT_TEMPLATE as VICUNA_TEMPLATE


END_OF_TURN, PADDING = "</s>", "<pad>"
NOTHING = " ."  # a part of a picture where nothing is
# Without Vicuna's system message, forty tokens that no one here learns from.
START, END = VICUNA_TEMPLATE.index("{%- set system = "), VICUNA_TEMPLATE.index("{%- set turns = messages -%}")
CHAT_TEMPLATE = VICUNA_TEMPLATE[:START] + '{%- set system = "A chat." -%}\n' + VICUNA_TEMPLATE[END:]

# Slices per row, rows of slices, and parts of a view
LAYOUTS = (
    (1, 1, 16),
    (1, 1, 16),
    (1, 1, 64),
    (2, 1, 16),
    (1, 3, 16),
    (2, 2, 16),
    (4, 1, 16),
    (1, 4, 16),
    (5, 1, 16),
    (1, 5, 16),
)

# Words and questions that the tokenizer of the trained base knows; no experiment asks about them yet
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
PLANTS = [
    "apple",
    "beech",
    "cedar",
    "daisy",
    "elm",
    "fern",
    "grape",
    "hazel",
    "iris",
    "juniper",
    "kale",
    "lilac",
    "mint",
    "nettle",
    "oak",
    "pine",
]
GOODS = [
    "axes",
    "books",
    "clocks",
    "drums",
    "eggs",
    "flutes",
    "gloves",
    "hats",
    "ink",
    "jars",
    "kites",
    "lamps",
    "maps",
    "nails",
    "oil",
    "pens",
]
ANIMALS = [
    "ant",
    "bear",
    "cat",
    "dog",
    "eel",
    "fox",
    "goat",
    "hare",
    "ibis",
    "jay",
    "koala",
    "lynx",
    "mole",
    "newt",
    "owl",
    "pony",
]
SUM, NEXT = "What is the sum of the digits?", "Which number comes next?"
FACTS = {
    "Who lives at this number?": PEOPLE,
    "What grows at this number?": PLANTS,
    "What is sold at this number?": GOODS,
    "Which animal is at this number?": ANIMALS,
}

READ, COLOUR_OF, SHAPE_OF, COUNT = (
    "What number is written?",
    "What colour is the {}?",
    "Which shape is {}?",
    "How many shapes are there?",
)


def caption_of(number: str, shapes: list[str]) -> str:
    """What is on a picture, such as `"47, red circle"`."""
    return ", ".join([number, *shapes])


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with one token for every word of this world and for every digit."""
    sentences = [READ, COUNT, SHAPE_OF, COLOUR_OF, SUM, NEXT, *FACTS, "A chat. USER: ASSISTANT:", NOTHING]
    words = [*COLOURS, *SHAPES, *PEOPLE, *PLANTS, *GOODS, *ANIMALS]
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


def describe(rng: random.Random, layout: tuple[int, int, int]) -> tuple[str, list[str], str]:
    """A picture in words: its description, the shapes on it as `"red circle"`, and its number."""
    columns, rows, cells = layout
    num_views = columns * rows + (columns * rows > 1)  # the overview of slices shows nothing that small
    places = rng.sample(range(max(columns * rows, 1) * cells - 1), 4)
    number = "".join(rng.choices(DIGITS, k=rng.randint(1, 3)))
    names = zip(rng.sample(list(COLOURS), 3), rng.sample(SHAPES, 3), strict=True)
    shapes = [f"{colour} {shape}" for colour, shape in names][: rng.randint(1, 3)]
    content = {place: f" {shape}" for place, shape in zip(places, shapes, strict=False)}
    if rng.random() < 0.5 or len(number) == 1:
        content[places[3]] = number
    else:
        content[places[3]] = number[:1]
        content[places[3] + 1] = number[1:] + content.get(places[3] + 1, "")
    views = ["".join(content.get(view * cells + cell, NOTHING) for cell in range(cells)) for view in range(num_views)]
    if num_views == 1:
        return views[0], shapes, number
    text = ""
    for view, description in enumerate(views[:-1]):
        text += description + ("," if (view + 1) % columns else "\n")
    return text + views[-1], shapes, number


def ask(rng: random.Random, shapes: list[str], number: str) -> tuple[str, str]:
    """A question and its answer."""
    kind = rng.random()
    if kind < 0.5:
        return READ, number
    shape = rng.choice(shapes).split()
    if kind < 0.7:
        return COLOUR_OF.format(shape[1]), shape[0]
    if kind < 0.85:
        return SHAPE_OF.format(shape[0]), shape[1]
    return COUNT, str(len(shapes))


def draw_sample(rng: random.Random, layout: tuple[int, int, int]) -> tuple[str, str]:
    """A text up to what is learned, and this: an answer, or a caption as in stage 1."""
    description, shapes, number = describe(rng, layout)
    if rng.random() < 0.2:
        return description, caption_of(number, shapes) + "\n"
    question, answer = ask(rng, shapes, number)
    return f"A chat. USER:{description}\n{question} ASSISTANT:", f" {answer}{END_OF_TURN}"


def draw_batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast, size: int) -> dict[str, torch.Tensor]:
    """Samples of one layout, so that there is little padding, which stands on the right."""
    layout = rng.choice(LAYOUTS)
    rows = []
    for _ in range(size):
        prompt, answer = (tokenizer(text)["input_ids"] for text in draw_sample(rng, layout))
        rows.append((torch.tensor(prompt + answer), torch.tensor([-100] * len(prompt) + answer)))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([ids for ids, _ in rows], batch_first=True, padding_value=tokenizer.pad_token_id)
    labels = pad([labels for _, labels in rows], batch_first=True, padding_value=-100)
    mask = pad([torch.ones_like(ids) for ids, _ in rows], batch_first=True)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def train_language_model(output: Path, steps: int = 3000, batch_size: int = 32, learning_rate: float = 2e-3) -> None:
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
        loss = model(**draw_batch(rng, tokenizer, batch_size)).loss
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
        batch = draw_batch(rng, tokenizer, 64)
        labels = batch.pop("labels")[:, 1:]
        predicted = model(**batch).logits.argmax(dim=-1)[:, :-1]
        right += ((predicted == labels) | (labels == -100)).all(dim=1).sum().item()
        total += len(labels)
    return right / total
