"""Times image processors: this package's, two of transformers that slice images too, and PIL's bare resizes.

    python benchmarks/image_processing.py [--rounds 15] [--threads 2] [--quick] [--json]

All take turns in one process. Lists of images go through `--threads` threads of this package; its peers use one each,
as they always do. One image against PIL's bare resizes has one thread on both sides. Exits with 1 where a claim fails.
"""

import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timing import Claim, measure, parse_arguments, report
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from llava_family import LlavaUhdImageProcessorPil, plan_slices


PICTURE = Path(__file__).parents[1] / "examples" / "images" / "rocket.jpg"
FULL_SIDE, QUICK_SIDE = 336, 56
# Multiples of the view's side, 336 pixels: (width, height)
SHAPES = {"672x1088": (2, 1088 / 336), "1344x2016": (4, 6)}
PHOTO_SHAPE = (4000 / 336, 3000 / 336)
NUM_IMAGES, MAX_SLICES = 4, 7
OURS, TORCH, MINICPM, NEXT = "ours", "ours by torch", "MiniCPM-V 4.6", "LLaVA-NeXT"
OURS_ALONE, BARE, UINT8 = "ours, 1 thread", "bare PIL", "ours, uint8"
PHOTO = "12 MP JPEG"


def at(name: str, size: str) -> str:
    return f"{name}, {size}"


# What is timed, what it is compared with, the limit, and whether that is the least; by the size of the image
LIMITS = {
    "672x1088": (
        (MINICPM, OURS, 2.5, True),
        (NEXT, OURS, 2.0, True),
        (MINICPM, TORCH, 5.0, True),
        (OURS_ALONE, BARE, 1.25),
        (OURS, UINT8),
    ),
    "1344x2016": (
        (MINICPM, OURS, 1.3, True),
        (NEXT, OURS, 1.3, True),
        (MINICPM, TORCH, 3.5, True),
        (OURS_ALONE, BARE, 1.25),
        (OURS, UINT8),
    ),
    PHOTO: (("full", "draft", 3.0, True), ("full", "by torch"), ("full", "draft by torch")),
}
CLAIMS = tuple(
    Claim(at(numerator, size), at(denominator, size), *limit)
    for size, limits in LIMITS.items()
    for numerator, denominator, *limit in limits
)


def picture(shape: tuple[float, float], side: int) -> Image.Image:
    width, height = (round(sides * side) for sides in shape)
    return Image.open(PICTURE).convert("RGB").resize((width, height))


def photograph(side: int) -> bytes:
    """A JPEG file of 12 megapixels and 3 to 4 MB, with the grain that photographs have; smaller for a smaller side."""
    pixels = np.asarray(picture(PHOTO_SHAPE, side), dtype=np.float32)
    grain = np.random.default_rng(0).normal(0, 8, pixels.shape).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


def processors(side: int) -> dict[str, Any]:
    """The compared processors, with views of one size and the same limit of slices."""
    square = {"height": side, "width": side}
    tiles = [[rows * side, columns * side] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    return {
        OURS: LlavaUhdImageProcessorPil(base_size=side, max_slices=MAX_SLICES),
        TORCH: LlavaUhdImageProcessorPil(base_size=side, max_slices=MAX_SLICES, resample_backend="torch"),
        MINICPM: MiniCPMV4_6ImageProcessorPil(scale_resolution=side, max_slice_nums=MAX_SLICES),
        NEXT: LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=tiles),
    }


def bare_pil(image: Image.Image, processor: LlavaUhdImageProcessorPil) -> list[np.ndarray]:
    """The least that PIL and numpy can do: both resizes, and normalising in place, `(height, width, 3)` each."""
    plan = plan_slices(*image.size, base_size=processor.base_size, max_slices=processor.max_slices)
    views = []
    for width, height in filter(None, (plan.refined_size, plan.overview_size)):
        pixels = np.asarray(image.resize((width, height), processor.resample))
        # Row by row, which numpy does several times as fast as three values at a time
        values = pixels.reshape(height, -1).astype(np.float32)
        values /= 255
        values -= np.tile(np.array(processor.image_mean, np.float32), width)
        values /= np.tile(np.array(processor.image_std, np.float32), width)
        views.append(values.reshape(height, width, 3))
    return views


def on_one_thread(function: Callable[[], Any]) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function()
    finally:
        torch.set_num_threads(threads)


def build_functions(side: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by its name in the claims."""
    compared = processors(side)
    functions: dict[str, Callable[[], Any]] = {}
    for size, shape in SHAPES.items():
        images = [picture(shape, side) for _ in range(NUM_IMAGES)]
        for name, processor in compared.items():
            functions[at(name, size)] = partial(processor, images, return_tensors="pt")
        raw = {"do_rescale": False, "do_normalize": False}
        functions[at(UINT8, size)] = partial(compared[OURS], images, return_tensors="pt", **raw)
        alone = partial(compared[OURS], images[0], return_tensors="np")
        functions[at(OURS_ALONE, size)] = partial(on_one_thread, alone)
        functions[at(BARE, size)] = partial(on_one_thread, partial(bare_pil, images[0], compared[OURS]))
    data = photograph(side)
    for name, processor, draft in (
        ("full", OURS, False),
        ("draft", OURS, True),
        ("by torch", TORCH, False),
        ("draft by torch", TORCH, True),
    ):
        functions[at(name, PHOTO)] = partial(compared[processor], data, use_jpeg_draft=draft, return_tensors="pt")
    return functions


def main() -> int:
    arguments = parse_arguments(__doc__.splitlines()[0], rounds=15, threads=2)
    functions = build_functions(QUICK_SIDE if arguments.quick else FULL_SIDE)
    title = f"Image processing, views of 336 pixels, lists of {NUM_IMAGES} images"
    return report(measure(functions, arguments.rounds), CLAIMS, title, arguments)


if __name__ == "__main__":
    sys.exit(main())
