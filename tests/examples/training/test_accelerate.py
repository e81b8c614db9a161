"""accelerate reads the settings for several GPUs, and two processes train by DDP and by FSDP2, on CPUs.

DeepSpeed is not installed here: its settings are read, and their names compared with those that accelerate knows.
"""

import json
import os
import socket
import subprocess
import sys

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from llava_family.moe_llava import modeling_moe_llava

from .conftest import TRAINING


ACCELERATE = TRAINING / "accelerate"
CONFIGS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
ON_CPU = {"ddp": [], "fsdp2": [str(TRAINING.parents[1] / "tests" / "examples" / "training" / "fsdp2_on_cpu.py")]}


def test_all_settings_are_tested():
    assert {path.stem for path in ACCELERATE.glob("*.yaml")} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads(name):
    config = load_config_from_file(str(ACCELERATE / f"{name}.yaml"))
    assert config.distributed_type == CONFIGS[name]
    assert config.num_processes == 8
    known = {action.dest for action in launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= known


def test_numbers_and_names():
    settings = {name: yaml.safe_load((ACCELERATE / f"{name}.yaml").read_text("utf-8")) for name in CONFIGS}
    assert settings["fsdp2"]["fsdp_config"]["fsdp_version"] == 2
    # Layers are found by `_no_split_modules`: names would be those of one language model.
    assert "fsdp_transformer_layer_cls_to_wrap" not in settings["fsdp2"]["fsdp_config"]
    for stage in (2, 3):
        assert settings[f"deepspeed_zero{stage}"]["deepspeed_config"]["zero_stage"] == stage
    leaf = settings["deepspeed_zero3"]["deepspeed_config"]["deepspeed_moe_layer_cls_names"]
    assert hasattr(modeling_moe_llava, leaf)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(name, script, output):
    """Losses of all steps, and what was printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ACCELERATE / f"{name}.yaml"]
    command += ["--num_processes", 2, "--main_process_port", free_port(), *ON_CPU[name]]
    script, *words = script.split()
    command += [TRAINING / f"{script}.py", *words, "--smoke", "--output", output, "--per_device_train_batch_size", 2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr[-4000:]
    history = json.loads((output / "trainer_state.json").read_text("utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], result.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("script", ["llava_uhd_finetune", "moe_llava_stage3", "llava_mole_finetune --method lora"])
def test_two_processes(script, tmp_path):
    losses = {}
    for name in ON_CPU:
        losses[name], printed = launch(name, script, tmp_path / name)
        assert "in batches of 4: 2 on each of 2 devices" in printed
        assert "smoke test passed" in printed
        assert ("sharded modules" in printed) == (name == "fsdp2")
        assert "\n0 sharded modules" not in printed
    assert losses["fsdp2"] == pytest.approx(losses["ddp"], rel=1e-4)
