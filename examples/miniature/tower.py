"""A vision tower for the miniatures: what CLIP is to the papers.

It learns to say, for every patch, which shape, colour or digit has its centre there. Views have many shapes and sizes,
and things are cut at their borders, as slices cut them.
"""

import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import trange
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from world import COLOURS, DIGITS, INKS, SHAPES, Picture

from llava_family import LlavaUhdVisionConfig
from llava_family.llava_uhd.image_processing_pil_llava_uhd import to_patches
from llava_family.llava_uhd.modeling_llava_uhd import LlavaUhdVisionModel


BASE_SIZE, PATCH_SIZE = 64, 8
VISION_CONFIG = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": BASE_SIZE,
    "patch_size": PATCH_SIZE,
}
# (rows, columns) of patches, all of about 64 patches, as `plan_slices` gives them
GRIDS = ((8, 8), (8, 8), (7, 9), (9, 7), (6, 10), (10, 6), (5, 12), (12, 5), (4, 16), (16, 4))
# What a patch may show: digits, shapes, the colours of both, and a digit's place in its number
NAMES = (("", *DIGITS), ("", *SHAPES), ("", *COLOURS), ("", "first", "second", "third", "fourth"))
VISIBLE = 0.5  # least part of a thing that is to be recognised
CROP = 16
NOTHING_WEIGHT = 0.2  # most patches show nothing


def draw_view(rng: random.Random, rows: int, columns: int) -> tuple[Image.Image, np.ndarray]:
    """A view, and `(4, rows * columns)` labels: the index in NAMES of what has its centre in each patch, by kind."""
    width, height = columns * PATCH_SIZE, rows * PATCH_SIZE
    picture = Picture(width + 2 * CROP, height + 2 * CROP, rng, dark=rng.random() < 0.25)
    for _ in range(rng.choice((0, 1, 2, 3))):
        picture.add_shape(rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.randint(8, 28))
    for _ in range(rng.choice((1, 3, 6, 9))):
        text_height = round(math.exp(rng.uniform(math.log(7), math.log(36))))
        number, ink = "".join(rng.choices(DIGITS, k=rng.randint(1, 4))), rng.choice((None, *INKS))
        picture.add_number(number, text_height, ink)
    labels = np.zeros((len(NAMES), rows, columns), dtype=np.int64)
    digits_seen: Counter[int] = Counter()
    for thing in picture.things:
        left, top, right, bottom = (edge - CROP for edge in thing.box)
        seen = (max(left, 0), max(top, 0), min(right, width), min(bottom, height))
        if seen[2] - seen[0] < VISIBLE * (right - left) or seen[3] - seen[1] < VISIBLE * (bottom - top):
            continue
        digits_seen[thing.group] += 1
        place = NAMES[3][digits_seen[thing.group]] if thing.name in DIGITS else None
        row = int(min((seen[1] + seen[3]) / 2, height - 1)) // PATCH_SIZE
        column = int(min((seen[0] + seen[2]) / 2, width - 1)) // PATCH_SIZE
        for kind, name in enumerate((thing.name, thing.name, thing.colour, place)):
            if name in NAMES[kind]:
                labels[kind, row, column] = NAMES[kind].index(name)
    view = picture.image.crop((CROP, CROP, CROP + width, CROP + height))
    return view, labels.reshape(len(NAMES), -1)


def draw_batch(rng: random.Random, size: int) -> tuple[torch.Tensor, list[tuple[int, int]], torch.Tensor]:
    """Patches of `size` views of one shape, their grids, and `(4, patches)` labels."""
    grid = rng.choice(GRIDS)
    mean, std = (np.array(values, dtype=np.float32) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    patches, labels = [], []
    for _ in range(size):
        view, view_labels = draw_view(rng, *grid)
        pixels = (np.asarray(view, dtype=np.float32) / 255 - mean) / std
        patches.append(to_patches(pixels, 1, 1, PATCH_SIZE).reshape(grid[0] * grid[1], -1))
        labels.append(view_labels)
    return torch.from_numpy(np.concatenate(patches)), [grid] * size, torch.from_numpy(np.concatenate(labels, axis=1))


def train_tower(output: Path, steps: int = 10_000, batch_size: int = 32, learning_rate: float = 2e-3) -> None:
    """Trains a tower of 0.32 million parameters, and saves it as a CLIP."""
    torch.manual_seed(0)
    rng = random.Random(0)
    tower = LlavaUhdVisionModel(LlavaUhdVisionConfig(**VISION_CONFIG, vision_feature_layer=-1))
    heads = nn.ModuleList([nn.Linear(VISION_CONFIG["hidden_size"], len(names)) for names in NAMES])
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    weights = [torch.tensor([NOTHING_WEIGHT] + [1.0] * (len(names) - 1)) for names in NAMES]
    progress = trange(steps, desc="Vision tower")
    for _ in progress:
        patches, grids, labels = draw_batch(rng, batch_size)
        features = tower(patches, grids).last_hidden_state
        losses = [
            nn.functional.cross_entropy(head(features), kind, weight=weight)
            for head, kind, weight in zip(heads, labels, weights, strict=True)
        ]
        loss = sum(losses)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(losses=" ".join(f"{each.item():.3f}" for each in losses), refresh=False)
    as_clip(tower).save_pretrained(output)


@torch.no_grad()
def as_clip(tower: LlavaUhdVisionModel) -> CLIPVisionModel:
    """A CLIP with one layer more, that changes nothing: some models take features below the last layer, some above."""
    clip = CLIPVisionModel(
        CLIPVisionConfig(**{**VISION_CONFIG, "num_hidden_layers": VISION_CONFIG["num_hidden_layers"] + 1})
    )
    clip.load_state_dict(tower.state_dict(), strict=False)
    last = clip.encoder.layers[-1]
    for linear in (last.self_attn.out_proj, last.mlp.fc2):
        linear.weight.zero_()
        linear.bias.zero_()
    return clip.eval()
