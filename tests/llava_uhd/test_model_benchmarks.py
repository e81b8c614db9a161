"""Not how fast the benchmarks' functions are, but that they do what they are said to do."""

import json
import runpy
import subprocess
import sys

import pytest
import torch

from .conftest import ROOT


BENCHMARKS = ROOT / "benchmarks"


@torch.no_grad()
@pytest.mark.parametrize("original", ["ONE", "ONE_FUSED"])
def test_both_orders_of_work_have_one_output(original):
    benchmark = runpy.run_path(str(BENCHMARKS / "vision.py"))
    orders = benchmark["build_orders"](benchmark["QUICK_SIZE"])
    together, one = (orders[benchmark[name]]() for name in ("ALL", original))
    assert len(together) == len(one) == 8
    for expected, found in zip(one, together, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_sizes_are_mixed():
    benchmark = runpy.run_path(str(BENCHMARKS / "vision.py"))
    _, grids = benchmark["random_images"](benchmark["FULL_SIZE"]["base_size"])
    views = [grid for image in benchmark["view_grids_of"](grids) for grid in image]
    assert len(grids) == 8 and len(set(views)) >= 6


@pytest.mark.slow
@torch.no_grad()
def test_prefills_are_of_equal_text_models_and_one_image():
    benchmark = runpy.run_path(str(BENCHMARKS / "prefill.py"))
    configs = benchmark["configs"](benchmark["FULL_SIZE"])
    ours, other = (configs[benchmark[name]] for name in ("OURS", "NEXT"))
    assert ours.text_config.to_dict() == other.text_config.to_dict()
    flops = [benchmark["count_flops"](config, 672, 1088) for config in (ours, other)]
    assert [report.num_tokens for report in flops] == [454, 2064]
    # Fewer FLOPs by more than the claim asks of the time
    assert flops[1].total >= 2.5 * flops[0].total
    for prefill in benchmark["build"](benchmark["QUICK_SIZE"]).values():
        assert prefill().isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vision", "prefill"])
def test_they_run(name):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--rounds", "2", "--threads", "1", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    for record in json.loads(result.stdout):
        assert record["ratio"] > 0 and record["seconds"] > 0


@pytest.mark.slow
def test_benchmark_for_gpus_runs_without_one():
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--rounds", "2", "--json"]
    result = subprocess.run([*command, "--quick"], capture_output=True, text=True, check=True, timeout=280)
    found = json.loads(result.stdout)
    # Two of LLaVA-UHD and two in tree, each with prefill and decoding; dense and sparse; LoRA and its mixture
    assert len(found["records"]) % 8 == 4 and all(record["seconds"] > 0 for record in found["records"])
    assert [claim["what"] for claim in found["claims"]] == ["prefill", "prefill", "training step"]
    if not torch.cuda.is_available():
        result = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert result.returncode == 2 and "there is no CUDA device" in result.stderr
