"""Writes what a [`RoutingRecorder`] has recorded as one HTML file, pictures included.

Source: figures 4 to 6 of the MoE-LLaVA paper; the report itself has no counterpart in the original code.
"""

import base64
import os
from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import torch
from PIL import Image

from .routing import Modality, RoutingRecorder
from .routing_plots import (
    plot_domain_routing,
    plot_expert_loads,
    plot_image_routing,
    plot_modality_loads,
    plot_pathways,
)


if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.5rem 0 1.5rem; }
th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child { text-align: left; } caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
.facts td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } .note { color: #555; }
"""


def check_output_file(output: str | os.PathLike, overwrite: bool = False) -> Path:
    """Checks that a file can be written.

    Args:
        output (`str` or `os.PathLike`): The file.
        overwrite (`bool`, *optional*, defaults to `False`): Whether it may exist already.

    Returns:
        `Path`: Its absolute path.

    Raises:
        ValueError: if it is a folder, or exists and shall not be overwritten, or its folder does not exist.
    """
    path = Path(output).resolve()
    if path.is_dir():
        raise ValueError(f"The output must be a file, but {path} is a folder.")
    if path.exists() and not overwrite:
        raise ValueError(f"The output {path} exists already. Choose another name, or overwrite it with --force.")
    if not path.parent.is_dir():
        raise ValueError(f"The output's folder {path.parent} does not exist.")
    return path


def write_routing_report(
    recorder: RoutingRecorder,
    output: str | os.PathLike,
    images: Sequence[Image.Image] = (),
    facts: dict[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes figures and tables of all that was recorded; the file appears when it is complete.

    Args:
        recorder (`RoutingRecorder`): Which has recorded something.
        output (`str` or `os.PathLike`): HTML file to write.
        images (`Sequence[PIL.Image.Image]`, *optional*): The recorded images, in the order of recording.
        facts (`dict[str, str]`, *optional*): What to say about the run, such as model, prompt and answer.
        overwrite (`bool`, *optional*, defaults to `False`): Whether the file may exist already.

    Returns:
        `Path`: The file's absolute path.

    Raises:
        ValueError: if the output cannot be written, or nothing was recorded.
    """
    path = check_output_file(output, overwrite)
    document = build_routing_report(recorder, images, facts or {})
    # Beside it, since a rename is atomic within one file system only.
    incomplete = path.with_name(f".{path.name}.incomplete-{uuid4().hex[:8]}")
    try:
        incomplete.write_text(document, encoding="utf-8")
        check_output_file(path, overwrite)
        os.replace(incomplete, path)
    finally:
        incomplete.unlink(missing_ok=True)
    return path


def build_routing_report(recorder: RoutingRecorder, images: Sequence[Image.Image], facts: dict[str, str]) -> str:
    """Makes the HTML document as text; its arguments are as in [`write_routing_report`].

    Returns:
        `str`: The document.
    """
    counts = ", ".join(f"{recorder.num_tokens(name):,} {name}" for name in ("image", "text", "padding"))
    facts = {**facts, "Recorded tokens": counts}
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    sections = [
        _section(
            "Expert loads",
            "Share of the tokens whose first choice an expert is; on the right the modalities that each expert "
            "serves, with text and image tokens weighted to count alike.",
            embed_picture(plot_expert_loads(recorder), "Stacked bars: load of each expert per layer"),
        ),
        _section(
            "Loads by modality",
            "The same for text tokens and for image tokens.",
            embed_picture(plot_modality_loads(recorder), "Stacked bars: load of each expert per layer and modality"),
        ),
        _section(
            "Pathways",
            "Principal components of the tokens' ways through the layers.",
            embed_picture(plot_pathways(recorder), "Curves: expert per layer of the principal components"),
        ),
        *_domain_section(recorder),
        *(_image_section(recorder, image, index) for index, image in enumerate(images)),
        _section("Numbers", _numbers_note(recorder), _tables(recorder)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Routing report</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>Routing report</h1>\n"
        f'<table class="facts">{rows}</table>\n{"".join(sections)}</body>\n</html>\n'
    )


def _section(title: str, note: str, content: str) -> str:
    return f'<h2>{escape(title)}</h2>\n<p class="note">{escape(note)}</p>\n{content}\n'


def _domain_section(recorder: RoutingRecorder) -> list[str]:
    """Nothing where no domain was recorded."""
    if not recorder.domains:
        return []
    note = "Share of a domain's tokens whose first choice an expert is, for some of the layers."
    pictures = [embed_picture(plot_domain_routing(recorder), "Bars: load of each expert per domain and layer")]
    if recorder.is_dense:
        note += " Below, the mean weight that dense routing gives the experts."
        weights = plot_domain_routing(recorder, weights=True)
        pictures.append(embed_picture(weights, "Bars: mean weight of each expert per domain and layer"))
    return [_section("Loads by domain", note, "\n".join(pictures))]


def _numbers_note(recorder: RoutingRecorder) -> str:
    note = "Loads in percent; entropies of the router's probabilities in nats."
    if recorder.is_dense:
        note += " Under dense routing all experts run: loads count first choices, and weights are mean probabilities."
    return note


def _image_section(recorder: RoutingRecorder, image: Image.Image, index: int) -> str:
    title = f"Image {index + 1}"
    try:
        figure = plot_image_routing(image, recorder, index)
    except ValueError as error:  # tokens without a place in the image
        return _section(title, str(error), "")
    return _section(
        title, "First-choice expert of every image token.", embed_picture(figure, "Maps of experts per layer")
    )


def embed_picture(picture: "Figure | Image.Image", description: str, css_class: str = "") -> str:
    """An `img` element that holds a picture as a PNG.

    Args:
        picture (`matplotlib.figure.Figure` or `PIL.Image.Image`): The picture.
        description (`str`): Its alternative text.
        css_class (`str`, *optional*): Of the element.

    Returns:
        `str`: HTML.
    """
    buffer = BytesIO()
    write = picture.save if isinstance(picture, Image.Image) else picture.savefig
    write(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    of_class = f'class="{css_class}" ' if css_class else ""
    return f'<img {of_class}alt="{escape(description)}" src="data:image/png;base64,{data}">'


def _tables(recorder: RoutingRecorder) -> str:
    names: tuple[tuple[Modality | None, str], ...] = ((None, "All tokens"), ("text", "Text"), ("image", "Image"))
    tables = [
        _table(recorder, title, recorder.loads(name), recorder.entropies(name))
        for name, title in names
        if recorder.num_tokens(name)
    ]
    tables += [
        _table(recorder, f"Domain {name}", recorder.loads(domain=name), recorder.entropies(domain=name))
        for name in recorder.domains
        if recorder.num_tokens(domain=name)
    ]
    if recorder.is_dense:
        tables += [
            _table(recorder, f"{title}: weights", recorder.mean_probabilities(name), recorder.entropies(name))
            for name, title in names
            if recorder.num_tokens(name)
        ]
    return "\n".join(tables)


def _table(recorder: RoutingRecorder, title: str, shares: torch.Tensor, entropies: torch.Tensor) -> str:
    """Shares `(layers, experts)` and entropies `(layers,)`."""
    head = "".join(f"<th>{name}</th>" for name in ("Layer", *_expert_names(recorder), "Entropy"))
    body = "".join(
        f"<tr><th>{layer}</th>{''.join(f'<td>{share:.1%}</td>' for share in row)}<td>{entropy:.3f}</td></tr>\n"
        for layer, row, entropy in zip(recorder.layer_indices, shares.tolist(), entropies.tolist(), strict=True)
    )
    return f'<div class="scroll"><table><caption>{escape(title)}</caption><tr>{head}</tr>\n{body}</table></div>'


def _expert_names(recorder: RoutingRecorder) -> list[str]:
    return [f"Expert {expert}" for expert in range(recorder.num_experts)]


def routing_table(recorder: RoutingRecorder):
    """Makes a table for the terminal: loads of text and image tokens, and the entropy in nats, of every sparse layer.

    Args:
        recorder (`RoutingRecorder`): Which has recorded something.

    Returns:
        `rich.table.Table`: The table.
    """
    from rich.table import Table

    modalities: list[Modality] = [name for name in ("text", "image") if recorder.num_tokens(name)]  # type: ignore[misc]
    table = Table(title=f"Share of {' / '.join(modalities)} tokens per expert")
    for name in ("Layer", *_expert_names(recorder), "Entropy (nats)"):
        table.add_column(name, justify="right")
    loads = [recorder.loads(name).tolist() for name in modalities]
    for position, (layer, entropy) in enumerate(
        zip(recorder.layer_indices, recorder.entropies().tolist(), strict=True)
    ):
        cells = [
            " / ".join(f"{share:.0%}" for share in shares)
            for shares in zip(*(load[position] for load in loads), strict=True)
        ]
        table.add_row(str(layer), *cells, f"{entropy:.3f}")
    return table


__all__ = ["build_routing_report", "check_output_file", "embed_picture", "routing_table", "write_routing_report"]
