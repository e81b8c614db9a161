"""What stands beside the conversation, as HTML: the views of every image, and where its tokens were routed.

Source: no counterpart; the pictures are those of [`inspection`](../inspection).
"""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..inspection.explaining import open_one_image
from ..inspection.routing import RoutingRecorder
from ..inspection.routing_plots import plot_image_routing, plot_modality_loads, square_view
from ..inspection.routing_report import embed_picture
from ..inspection.slicing_plots import plot_slices


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Figures are drawn for a page's width; narrower ones have larger letters when the panel scales them.
PANEL_INCHES = 6.8


def _section(title: str, note: str, content: str = "") -> str:
    return f'<section class="panel"><h2>{escape(title)}</h2><p>{escape(note)}</p>{content}</section>'


# The panels before there is something to show
VIEWS_EMPTY = _section("What the model sees", "Shown when you have asked about an image.")
# As above, of a model with routers
ROUTING_EMPTY = _section("Routing", "Which experts the tokens went to; shown behind the first answer.")
# While an answer is generated
ROUTING_PENDING = _section("Routing", "Drawn when the answer is complete.")


def views_panel(images: Sequence[Image.Image], processor: Any) -> str:
    """The views that the vision tower gets of every image: slices and their overview, or one square.

    Args:
        images (`Sequence[PIL.Image.Image]`): Upright images of any mode, in the order of the conversation.
        processor (`ProcessorMixin`): Of the model that they are shown to.

    Returns:
        `str`: HTML.
    """
    is_sliced = getattr(processor.image_processor, "vision_encoding", "slices") == "slices"
    if is_sliced:
        note = "Slices in the order in which they are read, the separator behind each, and the overview last."
    else:
        note = "One square view of every image, as it is encoded."
    figures = []
    for index, image in enumerate(images):
        name = f"Image {index + 1}"
        if is_sliced:
            content = _fit(plot_slices(open_one_image(image), processor), f"{name}: its slices and its overview")
        else:
            view = square_view(image, processor.image_processor)
            size = f"{image.width}×{image.height} pixels, encoded as {view.width}×{view.height}"
            content = f"{embed_picture(view, f'{name} as the square view that is encoded', 'view')}<p>{size}</p>"
        figures.append(_figure(name if len(images) > 1 else "", content))
    content = "".join(figures)
    return _section("What the model sees", note, content if is_sliced else f'<div class="views">{content}</div>')


def routing_panel(images: Sequence[Image.Image], recorder: RoutingRecorder) -> str:
    """The experts of every layer: over each image, and their shares of text and image tokens.

    Args:
        images (`Sequence[PIL.Image.Image]`): Upright images of any mode, in the order of recording.
        recorder (`RoutingRecorder`): Which has recorded the answer.

    Returns:
        `str`: HTML.
    """
    figures = []
    for index, image in enumerate(images):
        name = f"Image {index + 1}"
        try:
            figure = plot_image_routing(open_one_image(image), recorder, index)
        except ValueError as error:  # tokens without a place in the image
            figures.append(_figure(name, f"<p>{escape(str(error))}</p>"))
            continue
        content = _fit(figure, f"{name}: map of the first-choice expert of every token, one for each layer")
        figures.append(_figure(f"{name}: first-choice expert of every token", content))
    loads = _fit(plot_modality_loads(recorder), "Stacked bars: share of each expert by layer, for text and images")
    figures.append(_figure("Share of the tokens whose first choice an expert is", loads))
    note = "Of all that was computed for the last answer: images, conversation and answer."
    if recorder.is_dense:
        note += " Routing is dense: all experts run, and what is shown is the one with the largest weight."
    return _section("Routing", note, "".join(figures))


def _figure(caption: str, content: str) -> str:
    caption = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{caption}{content}</figure>"


def _fit(figure: "Figure", description: str) -> str:
    width, height = figure.get_size_inches()
    if width > PANEL_INCHES:
        # Letters are not scaled, so titles and labels of several rows need more of the height.
        grid = figure.axes[0].get_gridspec()
        more = 0.5 * (grid.nrows - 1) if grid else 0
        figure.set_size_inches(PANEL_INCHES, max(height * PANEL_INCHES / width, 1.6) + more)
    return embed_picture(figure, description)


__all__ = ["ROUTING_EMPTY", "ROUTING_PENDING", "VIEWS_EMPTY", "routing_panel", "views_panel"]
