"""`make demo`: converts the embedded tiny checkpoint, loads it with the Auto classes and asks it about two images."""

import importlib.util
import tempfile
import time
from pathlib import Path

from PIL import Image
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import llava_family  # noqa: F401  registers the family with the Auto classes


ROOT = Path(__file__).parents[1]
ORIGINAL = ROOT / "tests" / "fixtures" / "llava_uhd"
IMAGES = [ROOT / "examples" / "images" / name for name in ("rocket.jpg", "wide_text.png")]
QUESTION = "What is in this picture?"


def convert(output: Path) -> None:
    """Runs the conversion script on a checkpoint in the original release's layout, 3 MB instead of 27 GB."""
    script = ROOT / "conversion_scripts" / "convert_llava_uhd_weights_to_hf.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.convert_llava_uhd_checkpoint(
        str(ORIGINAL / "original_checkpoint"), str(output), vision_tower=str(ORIGINAL / "clip_vision_tower")
    )


def describe(image: Image.Image, name: str, processor) -> list[str]:
    """What the slicing plan says about an image: the cells of a table row."""
    plan = processor.image_processor.slice_plan(*image.size)
    slices = f"{plan.columns}x{plan.rows} of {plan.slice_size[0]}x{plan.slice_size[1]}" if plan.slice_size else "none"
    overview = f"{plan.overview_size[0]}x{plan.overview_size[1]}"
    tokens = plan.num_tokens(processor.num_queries)
    return [name, f"{image.width}x{image.height}", slices, overview, str(plan.num_views), str(tokens)]


def main() -> None:
    console = Console(width=100)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "llava-uhd-tiny"
        start = time.perf_counter()
        convert(checkpoint)
        console.print(f"converted the original layout in {time.perf_counter() - start:.2f} s")
        processor = AutoProcessor.from_pretrained(checkpoint)
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="float32")
        model.generation_config.max_length = None  # the release's 4096; `max_new_tokens` counts here
        ask = pipeline("image-text-to-text", model=model, processor=processor)

        table = Table("image", "pixels", "slices", "overview", "views", "tokens", "seconds", box=SIMPLE)
        for path in IMAGES:
            image = Image.open(path).convert("RGB")
            messages = [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}],
                }
            ]
            start = time.perf_counter()
            output = ask(
                text=messages, return_full_text=False, generate_kwargs={"do_sample": False, "max_new_tokens": 16}
            )
            seconds = f"{time.perf_counter() - start:.2f}"
            table.add_row(*describe(image, path.name, processor), seconds)
            console.print(f"{path.name}: {QUESTION} {output[0]['generated_text']!r}")
        console.print(table)
    console.print(
        "The answers are noise: this checkpoint is tiny and its weights are random. It shows that conversion, "
        "loading, slicing and generation work; the released 13B checkpoint converts with the same command."
    )


if __name__ == "__main__":
    main()
