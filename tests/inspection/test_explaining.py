"""What `explain` says is what processors do, what FLOPs are counted, and what the documents print."""

import io
import re
import sys
from dataclasses import replace
from functools import cache
from html import escape
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_family import LlavaMoleProcessor, LlavaUhdImageProcessorPil, LlavaUhdProcessor, MoeLlavaProcessor
from llava_family.inspection.explaining import ImageExplanation, explain_image
from llava_family.inspection.flops import VICUNA, count_flops

from ..training.tiny import tiny_processor


ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
FAMILIES = ("llava_uhd", "moe_llava", "llava_mole")
ENCODINGS = [("llava_uhd", "slices"), *((family, each) for family in FAMILIES[1:] for each in ("square", "slices"))]
ORIENTATION, QUARTER_TURN = 0x0112, 6
TERA = 1e12


@cache
def processor_of(family, encoding="slices"):
    processor = tiny_processor(family)
    processor.num_queries = 4
    processor.image_processor.base_size = 56
    if family != "llava_uhd":
        processor.image_processor.vision_encoding = encoding
    return processor


def picture(width, height):
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def size_of(cell):
    return None if cell == "–" else tuple(int(side) for side in cell.split("×"))


def test_sizes_are_those_of_the_documentation():
    rows = [
        line.strip("| \n").split(" | ") for line in (ROOT / "docs" / "llava_uhd.md").read_text("utf-8").splitlines()
    ]
    rows = [row for row in rows if len(row) == 6 and re.fullmatch(r"\d+×\d+", row[0])]
    assert len(rows) >= 8
    for image, grid, slice_size, overview, views, tokens in rows:
        explanation = explain_image(Image.new("RGB", size_of(image)))
        assert explanation.image_size == size_of(image)
        assert explanation.grid == (size_of(grid) or (0, 0)), image
        assert (explanation.slice_size, explanation.overview_size) == (size_of(slice_size), size_of(overview)), image
        assert (explanation.num_views, explanation.num_tokens) == (int(views), int(tokens)), image
        assert explanation.num_separators == explanation.num_views - 1
        assert explanation.layout.count("[144]") == explanation.num_views


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "name"), [(144, "spatial/144"), (64, "perceiver/64")])
@pytest.mark.parametrize("size", [(672, 1088), (336, 336)])
def test_costs_are_those_of_the_benchmark(queries, name, size):
    explanation = explain_image(Image.new("RGB", size), num_queries=queries)
    assert [cost.model for cost in explanation.costs] == [f"LLaVA-UHD {name}", "LLaVA-1.5", "LLaVA-NeXT"]
    tables = (ROOT / "benchmarks" / "README.md").read_text("utf-8").split("text model of ")[1:3]
    for text_model, table in zip(("7B", "13B"), tables, strict=True):
        assert table.startswith(text_model)
        lines = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
        for cost in explanation.costs:
            image = "336x336" if cost.model == "LLaVA-1.5" else f"{size[0]}x{size[1]}"
            # model, image, views, tokens, vision, projector, text, lm_head, total, / 1.5
            (row,) = (line for line in lines if line[:2] == [cost.model, image])
            assert row[2:4] == [str(cost.num_views), str(cost.num_tokens)]
            assert row[8:10] == [f"{cost.flops[text_model] / TERA:.3f}", f"{cost.ratios[text_model]:.3f}"]


@pytest.mark.slow
def test_square_of_clip_costs_what_llava_does():
    cost, llava, _ = square("moe_llava", 336, 576).costs
    assert (cost.model, cost.num_tokens) == ("MoE-LLaVA square/576", 576)
    assert cost.flops == llava.flops and set(cost.ratios.values()) == {1.0}


@pytest.mark.slow
def test_square_of_siglip_and_boundaries():
    from transformers import LlavaConfig

    from llava_family.moe_llava.configuration_moe_llava import SIGLIP_SO400M_384

    tower = {"model_type": "siglip_vision_model", **SIGLIP_SO400M_384}
    report = count_flops(LlavaConfig(text_config=VICUNA["7B"], vision_config=tower), 384, 384)
    cost = square("moe_llava", 384, 728).costs[0]
    assert report.num_tokens == cost.num_tokens == 728
    assert cost.flops["7B"] == report.total
    # LLaVA-MoLE's two embeddings go through the text model, and through nothing before it.
    mole, llava, _ = square("llava_mole", 336, 578).costs
    assert mole.num_tokens == 578
    assert 1 < mole.ratios["7B"] == mole.flops["7B"] / llava.flops["7B"] < 1.005


def square(family, side, num_image_tokens):
    processor = tiny_processor(family)
    processor.num_image_tokens = num_image_tokens
    kwargs = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return processor.explain(picture(100, 50), **kwargs)


@pytest.mark.parametrize(("side", "tokens"), [(336, 400), (336, 500), (336, 728), (14, 400), (384, 575)])
def test_unknown_tower_is_not_counted(side, tokens):
    explanation = square("moe_llava", side, tokens)
    assert explanation.costs[0].flops == explanation.costs[0].ratios == {}
    assert explanation.costs[0].num_tokens == tokens
    assert "unknown" in str(explanation) and "unknown" in explanation._repr_html_()


def test_nothing_is_counted_before_it_is_asked_for(monkeypatch):
    def count(*arguments):
        raise AssertionError("counted")

    monkeypatch.setattr("llava_family.inspection.flops.count_layerwise", count)
    explanation = explain_image(picture(123, 321), num_queries=25)
    assert explanation.layout == "[25]"
    with pytest.raises(AssertionError, match="counted"):
        _ = explanation.costs


def layout_of(ids, processor):
    """What stands in ids: numbers for runs of image tokens, and the text between them."""
    parts = []
    for is_image, run in groupby(ids, key=lambda token: token == processor.image_token_id):
        tokens = list(run)
        parts.append(f"[{len(tokens)}]" if is_image else processor.tokenizer.decode(tokens).replace("\n", "↵"))
    return " ".join(part.strip() for part in parts if part.strip())


@pytest.mark.parametrize(("family", "encoding"), ENCODINGS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(width=st.integers(1, 400), height=st.integers(1, 400))
def test_tokens_are_those_that_the_processor_makes(family, encoding, width, height):
    processor = processor_of(family, encoding)
    image = picture(width, height)
    inputs = processor(images=[image], text=[processor.image_token], add_special_tokens=False)
    explanation = processor.explain(image)
    ids = [int(token) for token in inputs["input_ids"][0]]
    assert explanation.num_tokens == len(ids)
    assert explanation.layout == layout_of(ids, processor)
    assert explanation.num_separators == sum(token != processor.image_token_id for token in ids)
    if encoding == "slices":
        (rows, columns), slice_grid, overview = np.asarray(inputs["image_grids"])[0].tolist()
        patch = processor.image_processor.patch_size
        assert explanation.grid == (columns, rows)
        assert explanation.overview_size == (overview[1] * patch, overview[0] * patch)
        assert (explanation.slice_size or (0, 0)) == (slice_grid[1] * patch, slice_grid[0] * patch)


@pytest.mark.parametrize(("family", "encoding"), ENCODINGS)
def test_prompt_is_what_the_model_reads(family, encoding):
    processor, question = processor_of(family, encoding), "what is on this sign?"
    image = picture(150, 100)
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    ids = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    explanation = processor.explain(image, prompt=question)
    assert explanation.prompt_layout == layout_of(ids, processor)
    assert explanation.layout in explanation.prompt_layout and question in explanation.prompt_layout
    assert explanation.facts()["prompt"] == explanation.prompt_layout
    assert processor.explain(image).prompt_layout is None


def test_layout_of_every_family():
    layouts = {
        (family, encoding): processor_of(family, encoding).explain(picture(112, 168)).layout
        for family, encoding in ENCODINGS
    }
    rows = "[4] , [4] ↵ [4] , [4] ↵ [4] , [4] ↵ [4]"
    assert layouts == {
        ("llava_uhd", "slices"): rows,
        ("moe_llava", "square"): "[16]",
        ("moe_llava", "slices"): rows,
        ("llava_mole", "square"): "[18]",
        ("llava_mole", "slices"): f"[5]{rows[3:-3]}[5]",  # with the embeddings for start and end
    }


def test_settings_of_a_call_count():
    processor = processor_of("moe_llava", "square")
    image = picture(112, 168)
    assert processor.explain(image, vision_encoding="slices").grid == (2, 3)
    assert processor.explain(image, vision_encoding="slices", max_slices=1).grid == (0, 0)
    with pytest.raises(ValueError, match="max_slices"):
        processor.explain(image, vision_encoding="slices", max_slices=0)


def test_square_view_is_what_the_tower_sees():
    processor = tiny_processor("moe_llava")
    image = picture(150, 60)
    pixels = processor.image_processor(images=[image], return_tensors="np")["pixel_values"][0]
    explanation = processor.explain(image)
    mean, std = (
        np.reshape(getattr(processor.image_processor, name), (3, 1, 1)) for name in ("image_mean", "image_std")
    )
    seen = np.asarray(explanation.square_view).transpose(2, 0, 1)
    assert explanation.overview_size == (56, 56) and seen.std() > 10
    assert np.abs(seen / 255 - (pixels * std + mean)).max() < 1e-5


IMAGE = picture(150, 60)
PIXELS = np.asarray(IMAGE)


def turned(image):
    exif = Image.Exif()
    exif[ORIENTATION] = QUARTER_TURN
    return Image.open(io.BytesIO(png(image.transpose(Image.Transpose.ROTATE_90), exif=exif)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "image",
    [
        png(IMAGE),
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        PIXELS[..., 0],
        PIXELS / 255,
        torch.from_numpy(PIXELS.transpose(2, 0, 1).copy()),
        IMAGE.convert("L"),
        turned(IMAGE),
    ],
    ids=["bytes", "array", "channels first", "no channels", "floats", "tensor", "grey", "camera orientation"],
)
def test_images_of_all_kinds(family, image):
    processor = tiny_processor(family)
    explanation, expected = processor.explain(image), processor.explain(IMAGE)
    assert explanation.facts() == expected.facts()
    assert np.array_equal(explanation.image, expected.image)


def test_files(tmp_path):
    file = tmp_path / "picture.png"
    file.write_bytes(png(IMAGE))
    for path in (file, str(file)):
        assert np.array_equal(explain_image(path).image, PIXELS)


def test_transparency_is_the_families_own():
    red = Image.new("RGBA", (60, 60), (255, 0, 0, 0))
    shown = {family: tiny_processor(family).explain(red).image.getpixel((0, 0)) for family in FAMILIES}
    white = (255, 255, 255)
    assert shown == {"llava_uhd": white, "moe_llava": white, "llava_mole": (255, 0, 0)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([IMAGE, IMAGE], "a list of 2"),
        ([], "a list of 0"),
        ((IMAGE,), "a tuple of 1"),
        ({"image": IMAGE}, "a dict of 1"),
        (None, "NoneType"),
        (7, "int"),
        ("no/such/picture.png", "no/such/picture.png"),
        (b"no picture", "10 bytes"),
        (np.zeros((2, 3, 4, 3), np.uint8), r"\(2, 3, 4, 3\)"),
        (np.zeros(4, np.uint8), r"\(4,\)"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (np.full((4, 4, 3), np.nan), "nan"),
        (np.full((4, 4, 3), -1), "-1"),
        (np.zeros((5, 6, 7), np.uint8), "channel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_images_are_one_clear_error(family, image, message):
    with pytest.raises(ValueError, match=f"^`image` must be .*{message}"):
        tiny_processor(family).explain(image)


@pytest.mark.slow
def test_text_fits_a_terminal():
    explanation = replace(explain_image(Image.new("RGB", (672, 1088))), prompt_layout="<s> " + 40 * "what is this ")
    text = str(explanation)
    assert max(map(len, text.splitlines())) <= 100
    words = text.split()
    assert {"672×1088", "2×3", "322×336", "252×420", "1014", "LLaVA-NeXT"} <= set(words)
    assert explanation.layout in " ".join(words)
    html = explanation._repr_html_()
    assert "1014" in html and html.count("<tr>") == len(explanation.facts()) + 4
    assert escape(explanation.prompt_layout) in html


@pytest.mark.slow
@pytest.mark.parametrize(("family", "encoding"), ENCODINGS)
def test_picture(family, encoding, tmp_path):
    explanation, path = processor_of(family, encoding).explain(IMAGE), tmp_path / "picture.png"
    figure = explanation.plot(path)
    with Image.open(path) as written:
        assert written.format == "PNG" and min(written.size) > 400
    assert f"{explanation.num_tokens} tokens" in figure.get_suptitle()
    for axes in figure.axes:
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("width (pixels)", "height (pixels)")
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()][-1] == "150"
    second = [text.get_text() for text in figure.axes[1].get_xticklabels()]
    assert second == ["0", str(explanation.overview_size[0])]
    assert np.array_equal(figure.axes[0].images[0].get_array(), PIXELS)
    if encoding == "square":
        assert np.array_equal(figure.axes[1].images[0].get_array(), explanation.square_view)
    else:
        (legend,) = figure.legends
        assert any("↵" in text.get_text() for text in legend.get_texts())


def test_slices_are_those_of_the_image_processor():
    image_processor = LlavaUhdImageProcessorPil(max_slices=2, pre_resize_longest_edge=100)
    explanation = explain_image(picture(1000, 800), image_processor, num_queries=9)
    assert (explanation.grid, explanation.layout) == ((0, 0), "[9]")
    assert explain_image(picture(1000, 800), LlavaUhdImageProcessorPil(max_slices=2)).grid == (2, 1)


def test_is_frozen():
    explanation = explain_image(IMAGE)
    assert isinstance(explanation, ImageExplanation)
    with pytest.raises(AttributeError):
        explanation.num_boundaries = 3
    assert "PIL" not in repr(explanation)


@pytest.mark.parametrize("processor_class", [LlavaUhdProcessor, MoeLlavaProcessor, LlavaMoleProcessor])
def test_without_the_package(processor_class, monkeypatch):
    monkeypatch.setitem(sys.modules, "llava_family.inspection.explaining", None)
    with pytest.raises(ImportError, match="pip install llava-family"):
        processor_class.explain(None, IMAGE)


@pytest.mark.slow
def test_document_shows_what_is_printed():
    (shown,) = re.findall(r"```text\n(.*?)```", (ROOT / "docs" / "explain.md").read_text("utf-8"), flags=re.DOTALL)
    printed = str(explain_image(ROOT / "examples" / "images" / "wide_text.png"))
    assert len(shown.splitlines()) >= 10
    assert shown.strip() in printed
