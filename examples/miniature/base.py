"""Makes what the miniatures begin with: a vision tower and a language model, in `examples/miniature/base`.

They stand for CLIP and Vicuna. Together they take about half an hour on two cores, and are in the repository.
"""

import argparse
import multiprocessing
from pathlib import Path

import torch
from language import train_language_model
from tower import train_tower


BASE = Path(__file__).resolve().parent / "base"


def _make(part: str, output: Path) -> None:
    torch.set_num_threads(1)
    {"vision_tower": train_tower, "language_model": train_language_model}[part](output / part)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=BASE)
    options = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_make, [("vision_tower", options.output), ("language_model", options.output)])
