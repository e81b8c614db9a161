"""A training step of two processes equals that of one: shards of a layer each (tensor parallel), or rows each (DDP).

Run by torchrun, this file is the worker: it takes the step on a model of a folder and stores what came out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from llava_family import LlavaMoleForCausalLM
from llava_family.training import freeze_for_mole_tuning


LEARNING_RATE = 0.1
MODELS = {
    "top1": {"routing": "top1"},
    "top1-scaled": {"routing": "top1", "scale_by_gate": True},
    "dense": {"routing": "dense", "mlp_bias": True, "attention_bias": True},
    "grouped": {"routing": "top1", "scale_by_gate": True, "num_experts": 8, "r": 16},
    "merged": {"routing": "dense", "attention_target_modules": []},
}
ABOUT_SHARDS = ("language_model.layers.0", "lm_head")


def load(folder, **kwargs):
    model = LlavaMoleForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)
    freeze_for_mole_tuning(model)
    return model


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def step(model, batch, rows=slice(None), parallel=None):
    """Logits, losses, gradients, and the trained weights behind one step of SGD."""
    batch = {name: tensor[rows] for name, tensor in batch.items()}
    with torch.no_grad():
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        results = {"logits": model(**inputs).logits}
        results["generated"] = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=LEARNING_RATE)
    outputs = (parallel or model)(**batch)
    outputs.loss.backward()
    results |= {"loss": outputs.loss.detach(), "aux_loss": outputs.aux_loss.detach()}
    results |= {f"gradient of {name}": full(parameter.grad).clone() for name, parameter in trained.items()}
    optimizer.step()
    return results | {name: full(parameter.detach()) for name, parameter in trained.items()}


def work(folder: Path):
    torch.distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    batch = torch.load(folder / "batch.pt")
    for name in MODELS:
        model = load(folder / name, distributed_config=DistributedConfig(tp_size=2))
        shards = {
            key: list(parameter.to_local().shape)
            for key, parameter in model.named_parameters()
            if hasattr(parameter, "to_local") and any(part in key for part in ABOUT_SHARDS)
        }
        results = {"tp": step(model, batch)}
        model = load(folder / name)
        half = slice(0, 2) if rank == 0 else slice(2, 4)
        results["ddp"] = step(model, batch, half, DistributedDataParallel(model))
        torch.save(results, folder / f"{name} {rank}.pt")
        (folder / f"{name} {rank}.json").write_text(json.dumps(shards))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
else:
    from .tiny import labels_of, tiny_batch, tiny_model


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """What one process computes, and a folder with what two do."""
    folder = tmp_path_factory.mktemp("distributed")
    expected = {}
    for name, options in MODELS.items():
        model = tiny_model(**options)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)  # A bias that is added twice must not be zero.
        # Logits of order 1, for an absolute tolerance: the last bit of an embedding is 2e-6 of the largest one.
        model.lm_head.weight.data *= 0.25
        model.save_pretrained(folder / name)
        batch = tiny_batch(model, num_rows=4, length=70)  # 280 tokens, enough for grouped products
        batch["labels"] = labels_of(batch, model)
        expected[name] = step(load(folder / name), batch)
    torch.save(batch, folder / "batch.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return expected, folder, result.stderr


def assert_equal(actual, expected):
    assert set(actual) == set(expected)
    for key, value in expected.items():
        # Logits are of order 1; gradients are sums over tokens.
        scale = max(1.0, value.abs().max().item()) if key.startswith("gradient") else 1.0
        torch.testing.assert_close(
            actual[key], value, atol=1e-5 * scale, rtol=0, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rank", [0, 1])
def test_tensor_parallel(computed, name, rank):
    expected, folder, _ = computed
    assert_equal(torch.load(folder / f"{name} {rank}.pt")["tp"], expected[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_distributed_data_parallel(computed, name):
    expected, folder, _ = computed
    halves = [torch.load(folder / f"{name} {rank}.pt")["ddp"] for rank in (0, 1)]
    whole = {
        key: torch.cat([half[key] for half in halves])
        if key in ("logits", "generated")
        else torch.stack([half[key] for half in halves]).mean(dim=0)
        for key in halves[0]
    }
    for key, value in halves[0].items():
        if key.startswith("gradient") or "mole_" in key:
            assert torch.equal(value, halves[1][key])
    assert_equal(whole, expected[name])


@pytest.mark.slow
def test_weights_are_sharded(computed):
    _, folder, stderr = computed
    shards = json.loads((folder / "dense 1.json").read_text())
    mlp, attention = "model.language_model.layers.0.mlp", "model.language_model.layers.0.self_attn"
    # Three experts of rank 4, between 32 and 64 features
    assert shards[f"{mlp}.gate_proj.weight"] == [32, 32]
    assert shards[f"{mlp}.gate_proj.mole_experts.weight_B"] == [3, 4, 32]
    assert f"{mlp}.gate_proj.mole_experts.weight_A" not in shards
    assert shards[f"{mlp}.down_proj.mole_experts.weight_A"] == [3, 4, 32]
    assert f"{mlp}.down_proj.mole_experts.weight_B" not in shards
    assert shards[f"{attention}.k_proj.mole_experts.weight_B"] == [1, 4, 8]
    assert shards[f"{attention}.o_proj.mole_experts.weight_A"] == [1, 4, 16]
    assert "will not be applied" not in stderr and "not applied" not in stderr  # rules without a module
