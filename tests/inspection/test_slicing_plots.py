"""The drawing of slices is that of the plan: as many, in their order, where they are, with their separators."""

import numpy as np
import pytest
from PIL import Image

from llava_family import LlavaUhdImageProcessorPil, plan_slices
from llava_family.inspection.slicing_plots import plot_slices


QUERIES = 4
# An EXIF orientation that turns an image by a quarter
ORIENTATION, QUARTER_TURN = 0x0112, 6


class Processor:
    """What the drawing needs of one."""

    image_processor = LlavaUhdImageProcessorPil(base_size=56, patch_size=14)
    num_queries = QUERIES


def picture(width, height):
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def plan_of(width, height):
    return plan_slices(width, height, base_size=56, patch_size=14)


def labels_of(figure):
    """Numbers of the slices, and the separators, each with its position in the picture."""
    texts = figure.axes[0].texts
    numbers = [text for text in texts if text.get_text().isdigit()]
    return numbers, [text for text in texts if text not in numbers]


def boxes_of(figure):
    """`(left, top, right, bottom)` of the borders, in pixels of the picture."""
    lines = [line.get_xydata() for line in figure.axes[0].lines]
    return [(*line.min(axis=0), *line.max(axis=0)) for line in lines]


@pytest.mark.parametrize(
    ("width", "height"), [(168, 56), (50, 300), (112, 112), (140, 120), (110, 500)], ids=lambda side: str(side)
)
def test_slices_are_those_of_the_plan(width, height):
    plan, figure = plan_of(width, height), plot_slices(picture(width, height), Processor)
    assert plan.num_slices > 1
    numbers, separators = labels_of(figure)
    assert [text.get_text() for text in numbers] == [str(index + 1) for index in range(plan.num_slices)]
    assert "".join(text.get_text() for text in separators) == ("," * (plan.columns - 1) + "↵") * plan.rows
    assert f"{plan.columns}×{plan.rows} slices" in figure.axes[0].get_title()
    assert figure.axes[1].get_title().startswith(f"{plan.num_views}. overview")
    boxes = boxes_of(figure)
    # Row by row, all of one size, together the whole picture
    expected = [
        (column * width / plan.columns, row * height / plan.rows)
        for row in range(plan.rows)
        for column in range(plan.columns)
    ]
    for (left, top, right, bottom), (x, y), number, separator in zip(
        boxes, expected, numbers, separators, strict=True
    ):
        assert (left, top) == pytest.approx((x - 0.5, y - 0.5))
        assert (right - left, bottom - top) == pytest.approx((width / plan.columns, height / plan.rows))
        for text, (horizontal, vertical) in ((number, (left, top)), (separator, (right, bottom))):
            text_x, text_y = text.get_position()
            assert left < text_x < right and top < text_y < bottom
            assert abs(text_x - horizontal) < (right - left) / 4 and abs(text_y - vertical) < (bottom - top) / 4


def test_pictures_are_shown():
    image = picture(168, 56)
    figure = plot_slices(image, Processor)
    shown, overview = (axes.images[0].get_array() for axes in figure.axes)
    assert np.array_equal(shown, np.asarray(image))
    width, height = plan_of(168, 56).overview_size
    assert overview.shape[:2] == (height, width)


def test_title_counts_tokens():
    plan = plan_of(168, 56)
    title = plot_slices(picture(168, 56), Processor).get_suptitle()
    assert title.startswith("168×56 pixels: ")
    assert f"{plan.num_views} views of {QUERIES} tokens, {plan.num_slices} separators" in title
    assert title.endswith(f", {plan.num_tokens(QUERIES)} tokens")


def test_small_picture_is_the_overview_alone():
    figure = plot_slices(picture(56, 50), Processor)
    assert not figure.axes[0].texts and not figure.axes[0].lines
    assert figure.axes[0].get_title().startswith("not sliced")
    assert figure.axes[1].get_title().startswith("overview")
    assert "1 views of 4 tokens, 0 separators, 4 tokens" in figure.get_suptitle()


def test_camera_orientation_counts():
    """An image is drawn as it is seen, and as the processor cuts it."""
    image = picture(168, 56)
    exif = image.getexif()
    exif[ORIENTATION] = QUARTER_TURN
    image.info["exif"] = exif.tobytes()
    figure = plot_slices(image, Processor)
    plan = plan_of(56, 168)
    assert figure.get_suptitle().startswith("56×168 pixels: ")
    assert figure.axes[0].images[0].get_array().shape[:2] == (168, 56)
    assert f"{plan.columns}×{plan.rows} slices" in figure.axes[0].get_title() and plan.rows > plan.columns


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_any_mode_is_drawn(mode):
    assert len(plot_slices(picture(168, 56).convert(mode), Processor).axes[0].lines) == plan_of(168, 56).num_slices


@pytest.mark.parametrize("size", [(320, 64), (64, 320), (60, 60)])
def test_png_is_written(tmp_path, size):
    path = tmp_path / "slices.png"
    plot_slices(picture(*size), Processor, path)
    with Image.open(path) as written:
        assert written.format == "PNG" and min(written.size) > 200
        written.load()
        assert len(written.convert("RGB").getcolors(10**6)) > 50


def test_needs_matplotlib(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"llava-family\[plot\]"):
        plot_slices(picture(168, 56), Processor)
