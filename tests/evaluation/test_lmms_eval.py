"""The plugin, found and run by lmms-eval itself, which `make test` installs without the most of what it asks for."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("lmms_eval")

MODEL = "llava_family.evaluation.lmms_eval_model.LlavaFamilyChat"


@pytest.mark.slow
def test_lmms_eval_runs_all_families(tmp_path):
    """lmms-eval finds the class by the entry point, asks the miniatures in batches and in rounds, and scores them."""
    # In a process of its own: importing it changes loggers, `datasets` and `ssl`.
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_lmms_eval.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["manifest"] == dict.fromkeys(("llava_uhd", "moe_llava", "llava_mole"), MODEL)
    # 93, 60, 73 and 29 are right, and the last question has a wrong truth: 4 of 5
    assert found["gqa"]["answers"] == [["93"], ["60"], ["73"], ["29"], ["49"]]
    assert found["gqa"]["scores"]["exact_match,none"] == pytest.approx(0.8)
    # Two rounds each, of which 3 of 4 requests have both right
    assert found["local_moe"]["answers"] == [[[answer] * 2] for answer in ("52", "green", "circle", "2")]
    assert found["local_moe"]["scores"]["rounds,none"] == pytest.approx(0.75)
    # The penalty of repetition, 10, keeps 66 and 88 from being said; 25 and 94 are right: 2 of 4
    assert found["local_mole"]["answers"] == [["25"], ["62"], ["94"], ["82"]]
    assert found["local_mole"]["scores"]["exact_match,none"] == pytest.approx(0.5)
    # Another batch size and the paper's decoding give the same answers to these questions.
    assert found["paper"] == found["gqa"]["answers"]
    assert found["refused"] == [
        "`batch_size` must be a whole number of at least 1, but is 'auto'.",
        '`decoding` must be "task" or "paper", but is \'greedy\'.',
        "The models of llava-family generate; choose tasks of the type `generate_until`.",
        "The models take text and images, but a task has image, text, video.",
    ]
    assert found["settings"] == {
        # Of a known benchmark: what the task says wins, or else the paper
        "gqa, task": [1, 16, 1.0, {"pre_resize_longest_edge": 1024}, {}],
        "gqa_lite, nothing": [3, 128, 1.0, {"pre_resize_longest_edge": 1024}, {}],
        "gqa, paper": [3, 128, 1.0, {"pre_resize_longest_edge": 1024}, {}],
        "mmbench_en_dev, nothing": [1, 1024, 1.0, {}, {}],
        # Of others, that start alike: lmms-eval's
        "mme_realworld, paper": [1, 1024, 1.0, {}, {}],
        "mme, nothing": [5, 128, 1.0, {"pre_resize_longest_edge": 1024}, {}],
        "chartqa, sampling": [1, 7, 1.0, {}, {"do_sample": True, "temperature": 0.2, "top_p": 0.9}],
    }


def test_entry_point_names_what_exists():
    """Without importing lmms-eval: `setup.py` and the registered path lead to the function and the class."""
    setup = (Path(__file__).parents[2] / "setup.py").read_text("utf-8")
    assert "llava_family.evaluation.lmms_eval_plugin:model_manifests" in setup
    spec = importlib.util.find_spec(MODEL.rpartition(".")[0])
    assert f"class {MODEL.rpartition('.')[2]}(lmms)" in Path(spec.origin).read_text("utf-8")
