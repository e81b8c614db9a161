"""All scripts run from data to a checkpoint that loads, train what they shall, resume exactly, leave nothing half."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file


SCRIPTS = [
    "llava_uhd_pretrain",
    "llava_uhd_finetune",
    "moe_llava_stage1",
    "moe_llava_stage2",
    "moe_llava_stage3",
    "llava_mole_pretrain",
    "llava_mole_finetune",
    "llava_mole_finetune --method lora",
    "trl_sft",
]
WITH_BALANCE_LOSS = {"moe_llava_stage3", "llava_mole_finetune", "trl_sft"}
FILES = {"chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "processor_config.json"}
FILES |= {"tokenizer.json", "tokenizer_config.json", "trainer_state.json"}


def log_of(output):
    history = json.loads((output / "trainer_state.json").read_text("utf-8"))["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke(script, run_script, tmp_path):
    output = tmp_path / "output"
    printed = run_script(script, "--smoke", "--output", output)
    assert "smoke test passed" in printed
    assert "16 samples, in batches of 4" in printed
    assert {path.name for path in output.iterdir()} == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "output-run"]
    log = log_of(output)
    assert len(log) == 8
    assert all(("balance_loss" in entry) == (script in WITH_BALANCE_LOSS) for entry in log)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stages",
    [
        ("llava_uhd_pretrain", "llava_uhd_finetune"),
        ("moe_llava_stage1", "moe_llava_stage2", "moe_llava_stage3", "trl_sft"),
        ("llava_mole_pretrain", "llava_mole_finetune"),
        ("llava_mole_pretrain", "llava_mole_finetune --method lora"),
    ],
    ids=lambda stages: stages[-1],
)
def test_every_stage_starts_from_the_one_before(stages, run_script, tmp_path):
    source = ()
    for stage in stages:
        output = tmp_path / stage.split()[0]
        assert "smoke test passed" in run_script(stage, "--smoke", "--output", output, *source)
        source = ("--model", output)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["llava_uhd_finetune", "moe_llava_stage3", "llava_mole_finetune --method lora", "trl_sft"]
)
def test_resumed_training_ends_with_the_same_bytes(script, run_script, tmp_path):
    run_script(script, "--smoke", "--output", tmp_path / "whole", "--save_total_limit", 5)
    shutil.copytree(tmp_path / "whole-run" / "checkpoint-4", tmp_path / "resumed-run" / "checkpoint-4")
    # What an interruption leaves of a checkpoint, and of an output
    (tmp_path / "resumed-run" / "checkpoint-6").mkdir()
    (tmp_path / "resumed-run" / "checkpoint-6" / "trainer_state.json").write_text("{")
    (tmp_path / ".resumed.incomplete").mkdir()
    (tmp_path / ".resumed.incomplete" / "leftover").touch()
    run_script(script, "--smoke", "--output", tmp_path / "resumed", "--resume")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]
    losses = [[entry["loss"] for entry in log_of(tmp_path / name)] for name in ("whole", "resumed")]
    assert losses[0] == losses[1]
    assert {path.name for path in (tmp_path / "resumed").iterdir()} == FILES
    assert not (tmp_path / ".resumed.incomplete").exists()


@pytest.mark.slow
def test_bfloat16_trains_a_float32_copy_of_what_is_trained(run_script, tmp_path):
    output = tmp_path / "output"
    assert "smoke test passed" in run_script("moe_llava_stage3", "--smoke", "--output", output, "--bf16", "true")
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((output / "config.json").read_text("utf-8"))["dtype"] == "bfloat16"
    trained = load_file(tmp_path / "output-run" / "checkpoint-8" / "model.safetensors")
    dtypes = {name: tensor.dtype for name, tensor in trained.items()}
    assert dtypes["model.language_model.layers.0.mlp.experts.down_proj"] == torch.float32
    assert dtypes["model.language_model.layers.0.self_attn.q_proj.weight"] == torch.bfloat16


@pytest.mark.slow
def test_training_something_else_is_noticed(run_script, tmp_path, monkeypatch):
    from llava_family import training

    monkeypatch.setattr(training, "freeze_for_pretraining", training.freeze_for_finetuning)
    with pytest.raises(RuntimeError, match=r"What is trained must change, and nothing else.*lm_head"):
        run_script("llava_uhd_pretrain", "--smoke", "--output", tmp_path / "output")


def conversations(folder, *broken):
    """Two good samples, and one whose picture does not exist for each of `broken`."""
    from PIL import Image

    folder.mkdir()
    Image.new("RGB", (60, 60), "red").save(folder / "red.png")
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "Red."}]
    samples = [{"id": str(number), "image": "red.png", "conversations": turns} for number in range(2)]
    samples += [{"id": name, "image": f"{name}.png", "conversations": turns} for name in broken]
    (folder / "data.json").write_text(json.dumps(samples), encoding="utf-8")
    return "--data", folder / "data.json", "--image-folder", folder


class TestWhatIsWrong:
    """Every one ends the script before a model is read."""

    @pytest.fixture
    def error_of(self, run_script, capsys):
        def error_of(*words):
            with pytest.raises(SystemExit) as exit_request:
                run_script("llava_uhd_finetune", "--smoke", "--model", "does/not/exist", *words)
            assert exit_request.value.code == 2
            return capsys.readouterr().err.splitlines()[-1]

        return error_of

    def test_foreign_folders(self, error_of, tmp_path):
        (tmp_path / "output").mkdir()
        (tmp_path / "output" / "thesis.tex").touch()
        assert "must be a new or empty folder" in error_of("--output", tmp_path / "output")
        (tmp_path / "other-run").mkdir()
        (tmp_path / "other-run" / "checkpoint-2").mkdir()
        assert "an earlier run's checkpoints" in error_of("--output", tmp_path / "other")
        assert "nothing to resume" in error_of("--output", tmp_path / "other", "--resume")
        assert (tmp_path / "output" / "thesis.tex").exists()

    def test_bad_samples(self, error_of, tmp_path):
        data = conversations(tmp_path / "images", "blue", "green")
        line = error_of("--output", tmp_path / "output", *data)
        assert "2 of 4 samples are bad" in line and "'blue'" in line and "'green'" in line
        assert not (tmp_path / "output-run").exists()


@pytest.mark.slow
def test_skipped_samples_are_listed(run_script, tmp_path):
    data = conversations(tmp_path / "images", "blue")
    printed = run_script(
        "moe_llava_stage2",
        "--smoke",
        "--output",
        tmp_path / "output",
        "--skip-bad-samples",
        *data,
        "--logging_steps",
        2,
    )
    assert "2 samples, in batches of 4" in printed
    (sample,) = json.loads((tmp_path / "output" / "bad_samples.json").read_text("utf-8"))
    assert (sample["index"], sample["id"]) == (2, "blue") and "blue.png" in sample["reason"]
    assert (tmp_path / "output-run" / "bad_samples.json").is_file()
