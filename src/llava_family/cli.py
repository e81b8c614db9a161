"""The `llava-family` command."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer


# Of typer, whose commands' docstrings and options' `help` are what `--help` prints
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="LLaVA models in transformers."
)


@app.callback()
def main_options() -> None:
    """LLaVA research models as transformers families."""


ModelOption = Annotated[str, typer.Option(help="Folder or Hub repository of a checkpoint, converted or original.")]
PromptOption = Annotated[str, typer.Option(help="What to ask.")]
ImageOption = Annotated[list[str] | None, typer.Option(help="Image file or URL; repeat for several.")]
VisionTowerOption = Annotated[
    str | None, typer.Option(help="Folder of the vision tower's checkpoint, for an original one that does not say it.")
]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
DeviceOption = Annotated[str | None, typer.Option(help="Device, by default the GPU where there is one.")]


OriginalTowerOption = Annotated[
    str | None,
    typer.Option(help="LLaVA-UHD, MoE-LLaVA: CLIP or SigLIP to take the vision tower from, not from the checkpoint."),
]
BaseOption = Annotated[
    str | None, typer.Option(help="MoE-LLaVA: language model of a first stage's mm_projector.bin, as microsoft/phi-2.")
]
LoraAlphaOption = Annotated[
    float | None, typer.Option(help="MoE-LLaVA, LLaVA-MoLE: alpha of LoRA adapters, where no file tells it.")
]
VicunaOption = Annotated[str | None, typer.Option(help="LLaVA-MoLE: language model that the training began with.")]
ClipOption = Annotated[str | None, typer.Option(help="LLaVA-MoLE: CLIP that the training began with.")]
RoutingOption = Annotated[str | None, typer.Option(help="LLaVA-MoLE: dense (the default) or top1.")]
MergeAttentionOption = Annotated[
    bool, typer.Option("--merge-attention-lora", help="LLaVA-MoLE: add the attention's adapters to its weights.")
]


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turns what users can get wrong into one message; bugs keep their traceback."""
    try:
        yield
    except (OSError, ValueError) as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


def _check_installed(what: str, extra: str, *packages: str) -> None:
    if any(find_spec(package) is None for package in packages):
        raise ValueError(f"{what} needs {' and '.join(packages)}: `pip install 'llava-family[{extra}]'`.")


@app.command()
def generate(
    model: ModelOption,
    prompt: PromptOption,
    image: ImageOption = None,
    vision_tower: VisionTowerOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 decodes greedily.")] = 0.0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Ask a model about images; the answer is written while it is generated."""
    with _clear_errors():
        images = [_open_image(file) for file in image or []]
        _stream_answer(model, prompt, images, vision_tower, max_new_tokens, temperature, dtype, device)


@app.command()
def routing(
    model: ModelOption,
    prompt: PromptOption,
    output: Annotated[Path, typer.Option(help="HTML file to write.")],
    image: ImageOption = None,
    vision_tower: VisionTowerOption = None,
    max_new_tokens: MaxNewTokensOption = 64,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
) -> None:
    """Report which experts a sparse model sends the tokens of images, prompt and answer to."""
    with _clear_errors():
        _check_installed("The report", "plot", "matplotlib")
        from .inspection.routing_report import check_output_file

        check_output_file(output, force)
        images = [_open_image(file) for file in image or []]
        _report_routing(model, prompt, images, output, vision_tower, max_new_tokens, dtype, device, force)


@app.command()
def explain(
    image: Annotated[str, typer.Option(help="Image file or URL.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub repository of a checkpoint; by default the released LLaVA-UHD's.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="PNG file to draw slices and overview into.")] = None,
    vision_tower: VisionTowerOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
) -> None:
    """Show how an image becomes tokens, and what that costs beside LLaVA-1.5 and LLaVA-NeXT; weights are not read."""
    with _clear_errors():
        if output:
            _check_installed("The picture", "plot", "matplotlib")
            from .inspection.routing_report import check_output_file

            check_output_file(output, force)
        _explain(_open_image(image), model, output, vision_tower)


@app.command()
def demo(
    model: ModelOption,
    vision_tower: VisionTowerOption = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes any that is free.")] = 7860,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Ask a model about images in the browser, and see what it does with them; Ctrl-C ends."""
    with _clear_errors(), suppress(KeyboardInterrupt):
        _check_installed("The demo", "demo", "gradio", "matplotlib")
        from .demo.chat import Chat
        from .demo.page import build_page, check_port, serve
        from .generating import load_model

        port = check_port(host, port)
        chat = Chat(*load_model(model, vision_tower, dtype, device))
        serve(build_page(chat, model), chat, host, port, report=typer.echo)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository of a checkpoint, converted or original.")],
    output: Annotated[Path, typer.Argument(help="New folder for the repository.")],
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the finished folder to this Hub repository.")
    ] = None,
    vision_tower: VisionTowerOption = None,
    card: Annotated[
        str | None,
        typer.Option(help="Name of a release's model card, or a Markdown file; by default found by itself."),
    ] = None,
) -> None:
    """Write a Hub repository that holds the model's code too, for users without this package."""
    with _clear_errors():
        from .hub import export_model

        export_model(model, output, push_to_hub, vision_tower, card, report=typer.echo)


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Option(help="Folder, file (LLaVA-MoLE) or Hub repository of the original.")],
    output: Annotated[Path | None, typer.Option(help="New folder for the converted checkpoint.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; by default the original's.")] = None,
    vision_tower: OriginalTowerOption = None,
    base: BaseOption = None,
    lora_alpha: LoraAlphaOption = None,
    vicuna: VicunaOption = None,
    clip: ClipOption = None,
    routing: RoutingOption = None,
    merge_attention_lora: MergeAttentionOption = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Hub repository to upload the finished folder to.")] = None,
    allow_nan: Annotated[bool, typer.Option("--allow-nan", help="Keep NaN and infinite values.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would become of every tensor.")] = False,
) -> None:
    """Convert an original checkpoint of any family; interrupted, run it again to go on."""
    from .conversion.comparing import key_report
    from .conversion.scripting import check_options
    from .converters.choosing import convert_checkpoint, open_checkpoint

    options = {"vision_tower": vision_tower, "base": base, "lora_alpha": lora_alpha, "vicuna": vicuna, "clip": clip}
    options |= {"routing": routing, "merge_attention_lora": merge_attention_lora, "dtype": dtype}
    with _clear_errors():
        if dry_run:
            check_options(dtype, push_to_hub)
            with open_checkpoint(checkpoint, options, typer.echo) as conversion:
                typer.echo("\n".join(key_report(conversion)))
        elif output is None:
            raise ValueError("`--output` is missing: the folder for the converted checkpoint.")
        else:
            convert_checkpoint(checkpoint, output, options, push_to_hub, typer.echo, allow_nan)


@app.command()
def verify(
    original: Annotated[str, typer.Argument(help="Folder, file (LLaVA-MoLE) or Hub repository of the original.")],
    converted: Annotated[str, typer.Argument(help="Folder of the converted checkpoint.")],
    vision_tower: OriginalTowerOption = None,
    base: BaseOption = None,
    lora_alpha: LoraAlphaOption = None,
    vicuna: VicunaOption = None,
    clip: ClipOption = None,
    routing: RoutingOption = None,
    merge_attention_lora: MergeAttentionOption = False,
) -> None:
    """Compare a converted checkpoint with its original, tensor by tensor, bit by bit; exit with 1 if they differ."""
    from .converters.choosing import verify_checkpoint

    options = {"vision_tower": vision_tower, "base": base, "lora_alpha": lora_alpha, "vicuna": vicuna, "clip": clip}
    options |= {"routing": routing, "merge_attention_lora": merge_attention_lora}
    with _clear_errors():
        found = verify_checkpoint(original, converted, options, typer.echo)
    typer.echo("\n".join(found) or "Equal: every tensor, bit by bit.")
    if found:
        typer.echo(f"{len(found)} tensors differ.")
        raise typer.Exit(1)


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
    from transformers import TextStreamer

    from .generating import decoding_config, load_model, prepare_inputs, user_message

    model, processor = load_model(model_name, vision_tower, dtype, device)
    inputs = prepare_inputs(model, processor, user_message(prompt, images))
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    config = decoding_config(model, max_new_tokens, temperature)
    model.generate(**inputs, generation_config=config, streamer=streamer)


def _explain(image: Any, model_name: str | None, output: Path | None, vision_tower: str | None) -> None:
    from rich.console import Console

    from .generating import load_processor
    from .inspection.explaining import explain_image

    if model_name is None:
        explanation = explain_image(image)
    else:
        explanation = load_processor(model_name, vision_tower).explain(image)
    console = Console(highlight=False)
    console.print(explanation)
    if output:
        explanation.plot(output)
        console.print(f"Wrote {output.resolve()}", markup=False, soft_wrap=True)


def _report_routing(
    model_name: str,
    prompt: str,
    images: list,
    output: Path,
    vision_tower: str | None,
    max_new_tokens: int,
    dtype: str,
    device: str | None,
    force: bool,
) -> None:
    from rich.console import Console
    from transformers.image_utils import load_image

    from .generating import decoding_config, load_model, prepare_inputs, user_message
    from .inspection.routing import RoutingRecorder
    from .inspection.routing_report import routing_table, write_routing_report

    images = [load_image(image) for image in images]  # the report shows them, so URLs are fetched here
    model, processor = load_model(model_name, vision_tower, dtype, device)
    recorder = RoutingRecorder(model, processor)
    inputs = prepare_inputs(model, processor, user_message(prompt, images))
    with recorder:
        generated = model.generate(**inputs, generation_config=decoding_config(model, max_new_tokens, 0.0))
    answer = processor.tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    facts = {"Model": model_name, "Prompt": prompt, "Answer": answer}
    path = write_routing_report(recorder, output, images, facts, overwrite=force)
    console = Console()
    console.print(answer, markup=False, highlight=False)
    console.print(routing_table(recorder))
    console.print(f"Wrote {path}", markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Runs the `llava-family` command with the arguments of the process.

    Source: no counterpart: the original codes have a script for each purpose.
    """
    app()


__all__ = ["app", "main"]


if __name__ == "__main__":
    main()
