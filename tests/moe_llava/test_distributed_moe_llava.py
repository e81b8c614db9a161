"""Two processes with a shard each equal one process: tensor parallel, and expert parallel on top of it.

Run by torchrun, this file is the worker: it loads the models of a folder sharded and stores what they compute.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.distributed import DistributedConfig

from llava_family import MoeLlavaForCausalLM


SHARDINGS = {"tp": {"tp_size": 2}, "tp+ep": {"tp_size": 2, "ep_size": 2}}
# All backbones of releases, with dense layers between the sparse ones, and the option that none of them uses
MODELS = {
    "phi": {"backbone": "phi"},
    "stablelm": {"backbone": "stablelm", "use_qkv_bias": True},
    "qwen2": {"backbone": "qwen2"},
    "phi-residual": {"backbone": "phi", "use_residual": True},
    "stablelm-residual": {"backbone": "stablelm", "use_residual": True},
}
ABOUT_SHARDS = ("language_model.layers.0", "lm_head")


def compute(model, batch):
    """Logits, losses, and gradients of what is upstream and downstream of the experts."""
    with torch.no_grad():
        results = {"logits": model(**batch).logits, "next": model.generate(**batch, max_new_tokens=4, do_sample=False)}
    outputs = model(**batch, labels=batch["input_ids"].where(batch["input_ids"] < 99, -100))
    outputs.loss.backward()
    results |= {"loss": outputs.loss.detach(), "aux_loss": outputs.aux_loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            results[f"gradient of {name}"] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return results


def work(folder: Path):
    for name in MODELS:
        for sharding, options in SHARDINGS.items():
            model = MoeLlavaForCausalLM.from_pretrained(
                folder / name, distributed_config=DistributedConfig(**options), dtype=torch.float32
            )
            results = compute(model.eval(), torch.load(folder / "batch.pt"))
            shards = {
                key: list(parameter.to_local().shape)
                for key, parameter in model.named_parameters()
                if hasattr(parameter, "to_local") and any(part in key for part in ABOUT_SHARDS)
            }
            if os.environ["RANK"] == "1":
                torch.save(results, folder / f"{name} {sharding}.pt")
                (folder / f"{name} {sharding}.json").write_text(json.dumps(shards))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
else:
    from .test_experts_moe_llava import tiny_batch, tiny_model


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
        model.save_pretrained(folder / name)
        batch = tiny_batch(model)
        expected[name] = compute(model, batch)
    torch.save(batch, folder / "batch.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return expected, folder, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_equal_one(computed, name, sharding):
    expected, folder, _ = computed
    actual = torch.load(folder / f"{name} {sharding}.pt")
    assert set(actual) == set(expected[name])
    for key, value in expected[name].items():
        # Logits are of order 1; gradients are sums over tokens.
        atol = 1e-5 * max(1, value.abs().max()) if key.startswith("gradient") else 1e-5
        torch.testing.assert_close(actual[key], value, atol=atol, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
def test_weights_are_sharded(computed):
    _, folder, stderr = computed
    layer = "model.language_model.layers.0"

    def shards(name, sharding):
        return json.loads((folder / f"{name} {sharding}.json").read_text())

    for name in ("stablelm", "qwen2"):
        split, dealt = shards(name, "tp"), shards(name, "tp+ep")
        # Of (4, 2 * 64, 32): half of every gate and of every up projection, or half of the experts
        assert split[f"{layer}.mlp.experts.gate_up_proj"] == [4, 64, 32]
        assert split[f"{layer}.mlp.experts.down_proj"] == [4, 32, 32]
        assert dealt[f"{layer}.mlp.experts.gate_up_proj"] == [2, 128, 32]
        assert split[f"{layer}.self_attn.q_proj.weight"] == dealt[f"{layer}.self_attn.q_proj.weight"] == [16, 32]
        assert split["lm_head.weight"] in ([50, 32], [49, 32])
    # Phi's experts have biases, which tensor parallelism leaves whole.
    split, dealt = shards("phi", "tp"), shards("phi", "tp+ep")
    assert not any("experts" in key for key in split)
    assert split[f"{layer}.self_attn.dense.weight"] == [32, 16]
    assert dealt[f"{layer}.mlp.experts.up_proj"] == [2, 64, 32]
    assert dealt[f"{layer}.mlp.experts.down_proj_bias"] == [2, 32]
    assert shards("phi-residual", "tp+ep")[f"{layer}.mlp.residual_mlp.fc1.weight"] == [32, 32]
    assert shards("stablelm-residual", "tp")[f"{layer}.mlp.residual_mlp.down_proj.weight"] == [32, 32]
    assert "will not be applied" not in stderr  # rules without a module
