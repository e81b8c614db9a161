"""Not how fast the benchmark's functions are, but that they do the same work."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch

from llava_family.llava_uhd.image_processing_pil_llava_uhd import to_patches

from .conftest import ROOT


BENCHMARK = ROOT / "benchmarks" / "image_processing.py"


@pytest.fixture(scope="module")
def benchmark():
    return runpy.run_path(str(BENCHMARK))


@pytest.mark.parametrize("size", ["672x1088", "1344x2016"])
def test_compared_processors_make_as_many_views(benchmark, size):
    image = benchmark["picture"](benchmark["SHAPES"][size], benchmark["FULL_SIDE"])
    assert f"{image.width}x{image.height}" == size
    processors = benchmark["processors"](benchmark["FULL_SIDE"])
    outputs = {name: processor(image, return_tensors="np") for name, processor in processors.items()}
    assert outputs["ours"]["image_grids"][0, 0].prod() + 1 == 7
    assert len(outputs["MiniCPM-V 4.6"]["target_sizes"]) == 7
    assert outputs["LLaVA-NeXT"]["pixel_values"].shape == (1, 5, 3, 336, 336)
    plan = benchmark["plan_slices"](*image.size)
    refined, overview = benchmark["bare_pil"](image, processors["ours"])
    patches = [to_patches(refined, plan.rows, plan.columns, 14), to_patches(overview, 1, 1, 14)]
    expected = outputs["ours"]["pixel_values"]
    np.testing.assert_array_equal(np.concatenate(patches).reshape(expected.shape), expected)


def test_one_thread_is_one_thread(benchmark):
    before = torch.get_num_threads()
    assert benchmark["on_one_thread"](torch.get_num_threads) == 1
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_it_runs():
    command = [sys.executable, str(BENCHMARK), "--quick", "--rounds", "2", "--threads", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "12 MP JPEG" in result.stdout and "too small to check claims" in result.stdout
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True, timeout=120)
    records = json.loads(result.stdout)
    assert len(records) == 13
    assert all(record["ratio"] > 0 and record["seconds"] > 0 for record in records)
