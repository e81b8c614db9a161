"""Training by two processes equals training by one that accumulates gradients: replicated (DDP) or sharded (FSDP2).

Run by torchrun, this file is the worker: it trains every family in every way and stores what came out.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


FAMILIES = ("llava_uhd", "moe_llava", "llava_mole")
# Steps of one sample for each process: in many of them one process has an image, and the other one has none.
COMMON = {"per_device_train_batch_size": 1, "max_steps": 8, "group_by_modality_length": False}
CHECKPOINTING = {"activation_checkpointing": True, "ddp_find_unused_parameters": False}
GROUPED = {"group_by_modality_length": True}
# Steps 14 to 30 are in the second epoch of 24 samples.
RESUMED = {"max_steps": 30, "save_strategy": "steps", "save_steps": 14}
# One launch for all of them: importing takes longer than training. The last changes what accelerate takes CPUs for.
WAYS = ("ddp", "checkpointing", "grouped", "resumed", "fsdp2")


def train(family, folder, resume=None, **arguments):
    """A trainer that has trained, with nothing random in it but the order of samples."""
    model = without_randomness(tiny_model(family))
    trainer = make_trainer(family, folder, model=model, **{**COMMON, **arguments})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def results_of(trainer):
    """Losses and whole weights, under the names that one process has."""
    weights = weights_of(trainer.model)
    weights = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in weights.items()
    }
    return {"losses": losses_of(trainer), "weights": weights, "sharded": is_sharded(trainer.model)}


def is_sharded(model):
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def enable_fsdp_on_cpu():
    """accelerate ignores FSDP on several CPUs without a word, so these are declared to be another kind of device."""
    from accelerate.state import DistributedType, PartialState

    PartialState(cpu=True)
    import tiny

    class Arguments(tiny.LlavaTrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU

    tiny.LlavaTrainingArguments = Arguments


def work(folder: Path, way: str):
    folder.mkdir(exist_ok=True)
    if way == "fsdp2":
        enable_fsdp_on_cpu()
    for family in FAMILIES:
        runs = folder / f"runs of {family}"
        if way == "resumed":
            results = {"whole": results_of(train(family, runs, **RESUMED))}
            results["resumed"] = results_of(train(family, runs, runs / "checkpoint-14", **RESUMED))
        elif way == "fsdp2":
            # CLIP's own list of layers names some of its text tower, which accelerate does not find.
            layers = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]} if family != "llava_uhd" else {}
            results = results_of(train(family, runs, fsdp=True, fsdp_config={"version": 2, **layers}))
        else:
            results = results_of(
                train(family, runs, **{"checkpointing": CHECKPOINTING, "grouped": GROUPED}.get(way, {}))
            )
        torch.save(results, folder / f"{family} {os.environ['RANK']}.pt")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from tiny import losses_of, make_trainer, tiny_model, weights_of, without_randomness

    for way in WAYS:
        work(Path(sys.argv[1]) / way, way)
else:
    from .tiny import losses_of, make_trainer, tiny_model, weights_of, without_randomness


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with what two processes trained, in a folder for each way."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


def assert_close(actual, expected):
    assert actual["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert len(expected["losses"]) == COMMON["max_steps"] and set(actual["weights"]) == set(expected["weights"])
    for name, value in expected["weights"].items():
        # A key's bias shifts all scores of a query alike, so its gradient is rounding, which Adam makes a step of.
        atol = 1e-4 if name.endswith("k_proj.bias") else 1e-5
        torch.testing.assert_close(actual["weights"][name], value, atol=atol, rtol=0, msg=f"{name}")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_equal_one(trained, way, family, tmp_path):
    results = [torch.load(trained / way / f"{family} {rank}.pt") for rank in (0, 1)]
    if way == "resumed":
        for result in results:
            whole, resumed = result["whole"], result["resumed"]
            assert resumed["losses"] == whole["losses"]
            assert all(torch.equal(value, whole["weights"][name]) for name, value in resumed["weights"].items())
        return
    arguments = {"grouped": GROUPED, "checkpointing": {"activation_checkpointing": True}}.get(way, {})
    expected = results_of(train(family, tmp_path, gradient_accumulation_steps=2, **arguments))
    for result in results:
        assert result["sharded"] == (way == "fsdp2")
        assert_close(result, expected)
