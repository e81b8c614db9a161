"""The `llava-family` command."""

from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="LLaVA models in transformers."
)


@app.callback()
def main_options() -> None:
    """LLaVA research models as transformers families."""


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Folder or Hub repository of a checkpoint, converted or original.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[list[str] | None, typer.Option(help="Image file or URL; repeat for several.")] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="Folder of the CLIP checkpoint, for an original one that does not say it.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 decodes greedily.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Device, by default the GPU where there is one.")] = None,
) -> None:
    """Ask a model about images; the answer is written while it is generated."""
    try:
        images = [_open_image(file) for file in image or []]
        _stream_answer(model, prompt, images, vision_tower, max_new_tokens, temperature, dtype, device)
    except (OSError, ValueError) as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


def _open_image(file: str):
    """An opened image file, or a URL for the processor to fetch; wrong ones fail before the model is loaded."""
    from PIL import Image

    if file.startswith(("http://", "https://")):
        return file
    if not Path(file).is_file():
        raise ValueError(f"The image {file!r} is neither a file nor a URL.")
    return Image.open(file)


def _stream_answer(
    model_name: str,
    prompt: str,
    images: list,
    vision_tower: str | None,
    max_new_tokens: int,
    temperature: float,
    dtype: str,
    device: str | None,
) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

    original = {"mm_vision_tower": vision_tower} if vision_tower else {}
    model = AutoModelForImageTextToText.from_pretrained(model_name, dtype=dtype, **original)
    processor = AutoProcessor.from_pretrained(model_name, **original)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": prompt}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)
    # The released generation configuration samples; what was asked for here replaces it.
    if temperature:
        model.generation_config.update(do_sample=True, temperature=temperature)
    else:
        model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    model.generation_config.max_length = None  # `max_new_tokens` counts
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
