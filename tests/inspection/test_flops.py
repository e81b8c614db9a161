"""FLOP counts against formulas, against a real forward pass, and against what the paper and the README claim."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlavaConfig, LlavaNextConfig

from llava_family.inspection.flops import count_flops, count_layerwise, image_inputs
from llava_family.llava_uhd.configuration_llava_uhd import LlavaUhdConfig
from llava_family.llava_uhd.modeling_llava_uhd import LlavaUhdForConditionalGeneration
from llava_family.llava_uhd.slicing_llava_uhd import plan_slices


BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "flops.py"
TEXT_MODELS = {"7B": (4096, 32, 11008), "13B": (5120, 40, 13824)}  # hidden size, layers, intermediate size
VOCABULARY = 32000
PATCH_LENGTH, VISION_SIZE = 3 * 14 * 14, 1024
QUERIES = {"perceiver": 64, "spatial": 144}
# (rows, columns) of patches, and of samples of each of the released resampler's regions, of every view
VIEWS = {
    (336, 336): [(24, 24, 3, 3)],
    (672, 1088): [(24, 23, 3, 3)] * 6 + [(30, 18, 3, 2)],
}
TINY_TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}


@pytest.fixture(scope="module")
def benchmark_flops():
    pytest.importorskip("rich")
    specification = importlib.util.spec_from_file_location("benchmark_flops", BENCHMARK)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    yield module
    del sys.modules[specification.name]


def text_config(text_model):
    hidden_size, layers, intermediate_size = TEXT_MODELS[text_model]
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 128,
        "num_key_value_heads": hidden_size // 128,
        "intermediate_size": intermediate_size,
        "vocab_size": VOCABULARY,
    }


def text_flops(text_model, tokens):
    hidden_size, layers, intermediate_size = TEXT_MODELS[text_model]
    parameters = 4 * hidden_size**2 + 3 * hidden_size * intermediate_size
    return layers * (2 * parameters * tokens + 4 * tokens**2 * hidden_size)


def clip_flops(patches, layers):
    length = patches + 1  # the class embedding
    layer = 2 * 12 * VISION_SIZE**2 * length + 4 * length**2 * VISION_SIZE
    return layers * layer + 2 * PATCH_LENGTH * VISION_SIZE * patches


def resampler_flops(resampler_type, hidden_size, views):
    queries = QUERIES[resampler_type]
    patches = sum(rows * columns for rows, columns, *_ in views)
    to_width = 2 * VISION_SIZE * hidden_size * patches
    # queries are projected once for all views; then keys and values of all patches; then the output, twice
    projections = 2 * hidden_size**2 * (queries + 2 * patches + 2 * queries * len(views))
    if resampler_type == "perceiver":
        return to_width + projections + 4 * hidden_size * queries * patches
    attention = sum(4 * hidden_size * queries * height * width for *_, height, width in views)
    side = math.isqrt(queries)
    # keys and values are sampled along the rows, then along the columns
    sampling = sum(
        2 * 2 * hidden_size * side * height * columns * (rows + side * width) for rows, columns, height, width in views
    )
    return to_width + projections + sampling + attention


def tiny_config(resampler_type):
    vision_config = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlavaUhdConfig(
        text_config=TINY_TEXT,
        vision_config={**vision_config, "image_size": 56},
        resampler_type=resampler_type,
        num_queries=4,
    )


@pytest.mark.slow
@pytest.mark.parametrize("resampler_type", QUERIES)
@pytest.mark.parametrize(
    ("text_model", "size"), [("7B", (672, 1088)), ("13B", (672, 1088)), ("13B", (336, 336))], ids=str
)
def test_llava_uhd_equals_the_closed_form(text_model, resampler_type, size):
    report = count_flops(LlavaUhdConfig(text_config=text_config(text_model), resampler_type=resampler_type), *size)
    views, hidden_size = VIEWS[size], TEXT_MODELS[text_model][0]
    tokens = len(views) * QUERIES[resampler_type] + len(views) - 1

    assert (report.num_views, report.num_tokens) == (len(views), tokens)
    vision = sum(clip_flops(rows * columns, layers=23) for rows, columns, *_ in views)
    projector = resampler_flops(resampler_type, hidden_size, views)
    text, lm_head = text_flops(text_model, tokens), 2 * hidden_size * VOCABULARY * tokens
    assert report.vision_tower == vision
    assert report.projector == projector
    # rotary embeddings are a product of frequencies and positions, hence not exactly
    assert report.language_model == pytest.approx(text, rel=1e-6)
    assert report.lm_head == lm_head
    assert report.total == pytest.approx(vision + projector + text + lm_head, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("text_model", TEXT_MODELS)
def test_llava_equals_the_closed_form(text_model):
    report = count_flops(LlavaConfig(text_config=text_config(text_model)), 1234, 567)
    hidden_size = TEXT_MODELS[text_model][0]

    assert (report.num_views, report.num_tokens) == (1, 576)
    assert report.vision_tower == clip_flops(576, layers=24)
    assert report.projector == 2 * 576 * (VISION_SIZE * hidden_size + hidden_size**2)
    assert report.language_model == pytest.approx(text_flops(text_model, 576), rel=1e-6)
    assert report.lm_head == 2 * hidden_size * VOCABULARY * 576


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "tiles", "rows", "columns"),
    [((672, 1088), 4, 48, 30), ((1008, 336), 3, 24, 72), ((336, 336), 2, 24, 24)],
)
def test_llava_next_equals_the_closed_form(size, tiles, rows, columns):
    report = count_flops(LlavaNextConfig(text_config=text_config("13B")), *size)
    tokens = 576 + rows * (columns + 1)  # base image, then the unpadded features with a newline behind every row

    assert (report.num_views, report.num_tokens) == (tiles + 1, tokens)
    assert report.vision_tower == (tiles + 1) * clip_flops(576, layers=24)
    assert report.projector == (tiles + 1) * 2 * 576 * (VISION_SIZE * 5120 + 5120**2)
    assert report.language_model == pytest.approx(text_flops("13B", tokens), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(56, 56), (112, 168), (50, 130)])
@pytest.mark.parametrize("resampler_type", QUERIES)
def test_count_is_that_of_a_real_forward_pass(resampler_type, size):
    config = tiny_config(resampler_type)
    plan = plan_slices(*size, base_size=56)
    # torch counts nothing for SDPA on the CPU
    model = LlavaUhdForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    features = [config.image_token_id] * config.num_queries
    input_ids = torch.tensor([([*features, 5]) * plan.num_slices + features])
    slice_grid = plan.view_grids[0] if plan.num_slices else (0, 0)
    image_grids = torch.tensor([[(plan.rows, plan.columns), slice_grid, plan.view_grids[-1]]])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, pixel_values=torch.randn(plan.num_patches, PATCH_LENGTH), image_grids=image_grids)

    report = count_flops(config, *size)
    assert report.num_tokens == input_ids.shape[1]
    assert report.total == counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(56, 56), (112, 168)])
@pytest.mark.parametrize("family", ["llava_uhd", "llava", "llava_next", "siglip"])
def test_layerwise_count_is_the_same(family, size):
    text = {**TINY_TEXT, "num_hidden_layers": 5}
    vision = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 7, "num_attention_heads": 2}
    vision |= {"image_size": 56, "patch_size": 14}
    config = {
        "llava_uhd": lambda: LlavaUhdConfig(text_config=text, vision_config=vision, num_queries=4),
        "llava": lambda: LlavaConfig(text_config=text, vision_config={**vision, "model_type": "clip_vision_model"}),
        "llava_next": lambda: LlavaNextConfig(
            text_config=text,
            vision_config={**vision, "model_type": "clip_vision_model"},
            image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
        ),
        "siglip": lambda: LlavaConfig(text_config=text, vision_config={**vision, "model_type": "siglip_vision_model"}),
    }[family]()
    before = config.to_dict()
    assert count_layerwise(config, image_inputs(config, *size)) == count_flops(config, *size)
    assert config.to_dict() == before


@pytest.mark.slow
def test_unsliced_image_costs_less_than_a_sliced_one():
    config = LlavaUhdConfig(text_config=text_config("7B"))
    small, large = count_flops(config, 336, 336), count_flops(config, 337, 336)
    assert (small.num_views, large.num_views) == (1, 3)
    assert small.total < large.total / 2


@pytest.mark.slow
def test_printed_claims(benchmark_flops):
    claim = benchmark_flops.paper_claim()
    print(claim)
    assert 0.93 <= claim["as_implemented"] <= 0.98  # the paper says 0.94
    assert claim["as_implemented"] < claim["all_vision_layers"] <= 0.98
    assert 1.85 <= claim["spatial"] <= 2.05


@pytest.mark.slow
def test_benchmark_rows_agree_with_the_claim(benchmark_flops):
    rows = {row.model: row for row in benchmark_flops.measure("13B", ((672, 1088),))}
    llava, llava_next = rows["LLaVA-1.5"].report, rows["LLaVA-NeXT"].report
    paper, released = rows["LLaVA-UHD perceiver/64"], rows["LLaVA-UHD spatial/144"]
    assert paper.ratio_to_llava == paper.report.total / llava.total
    assert 0.93 <= paper.ratio_to_llava <= 0.98
    assert 1.85 <= released.ratio_to_llava <= 2.05
    assert paper.ratio_to_llava_next == paper.report.total / llava_next.total < 0.3
    assert llava.total == pytest.approx(15.50e12, rel=0.01)  # the paper's number for LLaVA-1.5


@pytest.mark.slow
def test_benchmark_prints(benchmark_flops, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_flops, "VICUNA", {"13B": {**TINY_TEXT, "hidden_size": 256}})
    monkeypatch.setattr(benchmark_flops, "IMAGE_SIZES", ((336, 336), (672, 1008)))
    monkeypatch.setattr(sys, "argv", ["flops.py", "--json"])
    benchmark_flops.main()
    printed = json.loads(capsys.readouterr().out)
    rows = printed["rows"]
    parts = ("vision_tower", "projector", "language_model", "lm_head")
    assert len(rows) == 1 + 3 * 2
    assert all(row["total"] == sum(row[part] for part in parts) for row in rows)

    monkeypatch.setattr(sys, "argv", ["flops.py", "--width", "400", "--height", "300"])
    benchmark_flops.main()
    table = capsys.readouterr().out
    assert "spatial/144" in table and "400x300" in table and "672x1008" not in table
    assert f"{printed['paper_claim']['as_implemented']:.1%}" in table
    assert max(map(len, table.splitlines())) <= 119

    monkeypatch.setattr(sys, "argv", ["flops.py", "--width", "400"])
    with pytest.raises(SystemExit):
        benchmark_flops.main()


@pytest.mark.parametrize(("resampler_type", "total"), [("spatial", 137_840_640), ("perceiver", 137_021_440)])
def test_resampler_parameters(resampler_type, total):
    config = LlavaUhdConfig(text_config={**text_config("13B"), "num_hidden_layers": 1}, resampler_type=resampler_type)
    with torch.device("meta"):
        resampler = LlavaUhdForConditionalGeneration(config).model.resampler
    position_table = QUERIES[resampler_type] * 5120
    assert resampler.pos_embed.numel() == position_table
    assert sum(parameter.numel() for parameter in resampler.parameters()) + position_table == total
    assert sum(map(math.prod, (tensor.shape for tensor in resampler.state_dict().values()))) == total


def test_config_is_left_unchanged():
    config = tiny_config("spatial")
    before = config.to_dict()
    count_flops(config, 112, 168)
    assert config.to_dict() == before
    assert config._attn_implementation_internal is None


def test_refuses_what_it_cannot_count():
    with pytest.raises(TypeError, match="LlamaConfig"):
        count_flops(LlamaConfig(), 336, 336)
    with pytest.raises(ValueError, match="0 and 336"):
        count_flops(tiny_config("spatial"), 0, 336)
