import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from llava_family import LlavaUhdImageProcessorPil, plan_slices
from llava_family.llava_uhd.image_processing_pil_llava_uhd import image_grid
from llava_family.llava_uhd.modeling_llava_uhd import view_grids_of
from llava_family.llava_uhd.slicing_llava_uhd import SlicePlan, pre_resize_size

from .conftest import FIXTURES


GOLDEN_SLICING = json.loads((FIXTURES / "slicing.json").read_text())["cases"]


def as_golden(plan):
    return {
        "grid": [plan.columns, plan.rows] if plan.num_slices else None,
        "slice": list(plan.slice_size) if plan.slice_size else None,
        "overview": list(plan.overview_size),
    }


def test_every_golden_entry():
    matched = 0
    for case in GOLDEN_SLICING:
        assert as_golden(plan_slices(case["width"], case["height"])) == {
            key: case[key] for key in ("grid", "slice", "overview")
        }
        expected = case["pre1024"]
        if "size" in expected:
            size = pre_resize_size(case["width"], case["height"], 1024)
            assert as_golden(plan_slices(*size)) | {"size": list(size)} == expected
        else:
            with pytest.raises(ValueError, match="too thin"):
                pre_resize_size(case["width"], case["height"], 1024)
        matched += 1
    assert matched == 520


def brute_force_grids(width, height, max_slices):
    """All candidate `(columns, rows)` of the paper, in the original's order, with their errors."""
    ideal = min(math.ceil(width * height / 336**2), max_slices)
    return [
        (abs(math.log(width / height) - math.log(columns / rows)), (columns, rows))
        for count in (ideal - 1, ideal, ideal + 1)
        for columns in range(1, count + 1)
        for rows in range(1, count + 1)
        if columns * rows == count and 1 < count <= max_slices
    ]


@cache
def tiles_exactly_once(plan):
    width, height = (side // 14 for side in plan.refined_size)
    painted = np.zeros((height, width), dtype=int)
    for left, top, right, bottom in plan.slice_boxes():
        painted[top // 14 : bottom // 14, left // 14 : right // 14] += 1
    return bool((painted == 1).all())


@pytest.mark.slow
@pytest.mark.parametrize("max_slices", [1, 4, 6, 7, 9, 12])
def test_every_size(processor, max_slices):
    sizes = [(width, height) for width in range(1, 2001, 7) for height in range(1, 2001, 7)]
    plans = [plan_slices(width, height, max_slices=max_slices) for width, height in sizes]
    for (width, height), plan in zip(sizes, plans, strict=True):
        assert plan.num_slices <= max_slices
        for side in (*plan.overview_size, *(plan.slice_size or ())):
            assert side > 0
            assert side % 14 == 0
        if plan.num_slices:
            candidates = brute_force_grids(width, height, max_slices)
            assert (plan.columns, plan.rows) == min(candidates, key=lambda candidate: candidate[0])[1]
            assert tiles_exactly_once(plan)
        else:
            assert max_slices == 1 or width * height <= 336**2

    counted = processor._get_num_multimodal_tokens(
        image_sizes=[(height, width) for width, height in sizes], max_slices=max_slices
    )
    seen_by_model = view_grids_of(torch.tensor([image_grid(plan) for plan in plans]))
    for plan, tokens, patches, view_grids in zip(
        plans, counted["num_image_tokens"], counted["num_image_patches"], seen_by_model, strict=True
    ):
        assert tokens == plan.num_features(144) == 144 * len(view_grids)
        assert plan.num_tokens(144) == tokens + plan.num_slices
        assert patches == plan.num_patches == sum(rows * columns for rows, columns in view_grids)


@pytest.mark.parametrize("size", [(336, 336), (672, 1008), (10, 400), (1344, 336), (1, 1)])
def test_processor_follows_the_plan(processor, size):
    plan = plan_slices(*size)
    inputs = processor(images=Image.new("RGB", size), text="<image>", return_tensors="pt")
    ids = inputs["input_ids"][0, 1:]  # behind <s>
    assert len(ids) == plan.num_tokens(144)
    assert (ids == processor.image_token_id).sum() == plan.num_features(144)
    assert len(inputs["pixel_values"]) == plan.num_patches
    is_separator = ids != processor.image_token_id
    row = [processor.column_separator_id] * (plan.columns - 1) + [processor.row_separator_id]
    assert ids[is_separator].tolist() == row * plan.rows


def test_large_square_is_cut_three_by_two():
    # |ln(2/3)| and |ln(3/2)| differ in the last bit of a double; the released weights were trained with this tie-break
    assert (plan_slices(1008, 1008).columns, plan_slices(1008, 1008).rows) == (3, 2)


def test_an_image_that_is_not_sliced_has_no_grid():
    plan = plan_slices(300, 200)
    assert plan == SlicePlan(columns=0, rows=0, slice_size=None, overview_size=plan.overview_size)
    assert plan.refined_size is None and not list(plan.slice_boxes())
    assert plan.view_grids == [(plan.overview_size[1] // 14, plan.overview_size[0] // 14)]


def test_one_plan_serves_the_image_processor():
    image_processor = LlavaUhdImageProcessorPil(max_slices=4, base_size=224)
    expected = plan_slices(900, 700, base_size=224, max_slices=4)
    assert image_processor.slice_plan(900, 700) == expected
    assert image_processor.get_number_of_image_patches(700, 900) == expected.num_patches
    assert (
        image_processor.get_number_of_image_patches(700, 900, {"max_slices": 1})
        == plan_slices(900, 700, base_size=224, max_slices=1).num_patches
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"width": 0, "height": 5}, "width"),
        ({"width": 5, "height": -1}, "height"),
        ({"width": 5.0, "height": 5}, "width"),
        ({"width": True, "height": 5}, "width"),
        ({"width": 5, "height": 5, "max_slices": 0}, "max_slices"),
        ({"width": 5, "height": 5, "patch_size": 0}, "patch_size"),
        ({"width": 5, "height": 5, "base_size": 7}, "base_size"),
    ],
)
def test_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        plan_slices(**arguments)
