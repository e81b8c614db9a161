"""Draws the views of an image: slices in their order, separators between them and overview; or the one square view.

Source: the LLaVA-UHD paper's sections 3.2 and 3.4.
"""

import os
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from ..llava_uhd.slicing_llava_uhd import SlicePlan
from .routing_plots import _figure, _save


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito's palette, which readers of any colour vision tell apart
BORDER, LABEL = "#D55E00", "#0072B2"
FRAME = "#5F5F5F"


def plot_slices(image: Image.Image, processor: Any, path: str | os.PathLike | None = None) -> "Figure":
    """The slices of an image in the order in which a language model reads them, and its overview.

    A comma follows every slice, a return arrow the last one of a row. The overview is last.

    Args:
        image (`PIL.Image.Image`): The image, as it is given to the processor.
        processor ([`LlavaUhdProcessor`]): Or that of another family under the vision encoding `"slices"`.
        path (`str` or `os.PathLike`, *optional*): PNG file to write.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    image = ImageOps.exif_transpose(image).convert("RGB")
    plan = processor.image_processor.slice_plan(*image.size)
    return draw_slices(image, plan, processor.num_queries, plan.num_tokens(processor.num_queries), path)


def draw_slices(
    image: Image.Image, plan: SlicePlan, num_queries: int, num_tokens: int, path: str | os.PathLike | None = None
) -> "Figure":
    """The slices of an image as planned, and its overview.

    Args:
        image (`PIL.Image.Image`): The image as it is shown: upright, RGB.
        plan (`SlicePlan`): How it is cut.
        num_queries (`int`): Features of every view.
        num_tokens (`int`): Positions that it takes in the text model's sequence.
        path (`str` or `os.PathLike`, *optional*): PNG file to write.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure, panels = _two_panels(image)
    _draw_slices(panels[0], image, plan)
    panels[1].imshow(image.resize(plan.overview_size, Image.Resampling.BICUBIC))
    number = f"{plan.num_views}. " if plan.num_slices else ""
    panels[1].set_title(f"{number}overview, as encoded: {plan.overview_size[0]}×{plan.overview_size[1]}", fontsize=10)
    _label_pixels(panels[0], image.size, max(plan.columns, 1), max(plan.rows, 1))
    _label_pixels(panels[1], plan.overview_size)
    views = f"{plan.num_views} views of {num_queries} tokens"
    figure.suptitle(
        f"{image.width}×{image.height} pixels: {views}, {plan.num_slices} separators, {num_tokens} tokens",
        fontsize=11,
    )
    if plan.num_slices:
        _add_legend(figure, plan)
    return _save(figure, path)


def draw_square(
    image: Image.Image, view: Image.Image, num_tokens: int, path: str | os.PathLike | None = None
) -> "Figure":
    """An image, and the one square view of it that a vision tower sees.

    Args:
        image (`PIL.Image.Image`): The image as it is shown: upright, RGB.
        view (`PIL.Image.Image`): The view, as grey levels.
        num_tokens (`int`): Positions that it takes in the text model's sequence.
        path (`str` or `os.PathLike`, *optional*): PNG file to write.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure, panels = _two_panels(image)
    panels[0].imshow(image)
    panels[0].set_title("not sliced: one view shows all of it", fontsize=10)
    panels[1].imshow(view)
    panels[1].set_title(f"view, as encoded: {view.width}×{view.height}", fontsize=10)
    _label_pixels(panels[0], image.size)
    _label_pixels(panels[1], view.size)
    figure.suptitle(f"{image.width}×{image.height} pixels: 1 square view, {num_tokens} tokens", fontsize=11)
    return _save(figure, path)


def _two_panels(image: Image.Image) -> tuple["Figure", Any]:
    aspect = image.width / image.height
    beside = aspect < 2  # an elongated image has its other view below
    # Panels are 3.9 inches wide beside each other, 7 below each other; titles, labels and legend need the rest.
    figure = _figure((9.0, min(1.6 + 3.9 / aspect, 7.4)) if beside else (8.4, min(3.2 + 2 * 7.0 / aspect, 7.0)))
    return figure, figure.subplots(1, 2) if beside else figure.subplots(2, 1)


def _draw_slices(axes: "Axes", image: Image.Image, plan: SlicePlan) -> None:
    axes.imshow(image)
    if plan.refined_size is None or plan.slice_size is None:
        axes.set_title("not sliced: it is no larger than one view", fontsize=10)
        return
    axes.set_title(
        f"{plan.columns}×{plan.rows} slices, each encoded at {plan.slice_size[0]}×{plan.slice_size[1]}", fontsize=10
    )
    scale = (image.width / plan.refined_size[0], image.height / plan.refined_size[1])
    tag = {"boxstyle": "round,pad=0.25", "edgecolor": "none"}
    fontsize = 9 if plan.num_slices <= 12 else 6
    for index, box in enumerate(plan.slice_boxes()):
        # Pixels are drawn around their coordinates.
        left, right = (edge * scale[0] - 0.5 for edge in box[::2])
        top, bottom = (edge * scale[1] - 0.5 for edge in box[1::2])
        axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=BORDER, linewidth=1.6)
        inset = (0.06 * (right - left), 0.06 * (bottom - top))
        position = (left + inset[0], top + inset[1])
        axes.text(
            *position,
            str(index + 1),
            color="white",
            fontsize=fontsize,
            va="top",
            ha="left",
            bbox={**tag, "facecolor": BORDER},
        )
        separator = "," if (index + 1) % plan.columns else "↵"
        position = (right - inset[0], bottom - inset[1])
        axes.text(
            *position,
            separator,
            color="white",
            fontsize=fontsize,
            fontweight="bold",
            va="bottom",
            ha="right",
            bbox={**tag, "facecolor": LABEL},
        )


def _label_pixels(axes: "Axes", size: tuple[int, int], columns: int = 1, rows: int = 1) -> None:
    """Pixels at the edges of a grid over an image of `size`, `(width, height)`."""
    width, height = size
    x, y = (
        [length * index / parts for index in range(parts + 1)] for length, parts in ((width, columns), (height, rows))
    )
    axes.set_xticks([edge - 0.5 for edge in x], [f"{edge:.0f}" for edge in x], fontsize=8)
    axes.set_yticks([edge - 0.5 for edge in y], [f"{edge:.0f}" for edge in y], fontsize=8)
    axes.set_xlabel("width (pixels)", fontsize=8)
    axes.set_ylabel("height (pixels)", fontsize=8)
    axes.tick_params(color=FRAME, labelcolor=FRAME, length=3)
    for spine in axes.spines.values():
        spine.set_color(FRAME)
        spine.set_linewidth(0.6)


def _add_legend(figure: "Figure", plan: SlicePlan) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=BORDER, label="number: reading order")]
    if plan.columns > 1:
        handles.append(Patch(facecolor=LABEL, label="“,”: comma behind a slice"))
    handles.append(Patch(facecolor=LABEL, label="“↵”: newline behind a row"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


__all__ = ["draw_slices", "draw_square", "plot_slices"]
