"""Draws how LLaVA-UHD cuts an image: the slices in their order, the separators between them, and the overview."""

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


def plot_slices(image: Image.Image, processor: Any, path: str | os.PathLike | None = None) -> "Figure":
    """The slices of an image in the order in which a language model reads them, and its overview.

    A comma follows every slice, a return arrow the last one of a row. The overview is last.

    Source: the paper's sections 3.2 and 3.4.

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
    aspect = image.width / image.height
    beside = aspect < 2  # an elongated image has its overview below
    size = (9.0, 4.6) if beside else (11.0, min(2.6 + 2 * 9.0 / aspect, 7.0))
    figure = _figure(size)
    panels = figure.subplots(1, 2) if beside else figure.subplots(2, 1)
    _draw_slices(panels[0], image, plan)
    panels[1].imshow(image.resize(plan.overview_size, Image.Resampling.BICUBIC))
    number = f"{plan.num_views}. " if plan.num_slices else ""
    panels[1].set_title(f"{number}overview, as encoded: {plan.overview_size[0]}×{plan.overview_size[1]}", fontsize=10)
    for axes in panels:
        axes.set_xticks([])
        axes.set_yticks([])
    views = f"{plan.num_views} views of {processor.num_queries} tokens"
    figure.suptitle(
        f"{image.width}×{image.height} pixels: {views}, {plan.num_slices} separators, "
        f"{plan.num_tokens(processor.num_queries)} tokens",
        fontsize=11,
    )
    return _save(figure, path)


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
            fontsize=9,
            va="top",
            ha="left",
            bbox={**tag, "facecolor": BORDER},
        )
        separator = "," if (index + 1) % plan.columns else "↵"
        position = (right - inset[0], bottom - inset[1])
        axes.text(
            *position, separator, color="white", fontsize=9, va="bottom", ha="right", bbox={**tag, "facecolor": LABEL}
        )


__all__ = ["plot_slices"]
