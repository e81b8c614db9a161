"""Writing checkpoints: complete or not at all, shard by shard, as transformers writes them."""

import hashlib
import json
import shutil
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.core_model_loading import Chunk, Transpose, WeightConverter

from llava_family.conversion import (
    CheckpointReader,
    TensorInfo,
    atomic_folder,
    check_output_folder,
    hashing,
    memory,
    plan_conversion,
    write_sharded,
)


def steps_for(tensors, transforms=(), expected=None):
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    expected = {name: info.shape for name, info in infos.items()} if expected is None else expected
    return plan_conversion(infos, transforms, expected).steps


def loaded(folder):
    with CheckpointReader(folder) as reader:
        return {name: reader.read(name) for name in reader.tensors}


@pytest.fixture
def tensors():
    return {f"layers.{i}.weight": torch.full((5, 10), float(i)) for i in range(6)}  # 200 bytes each


def test_one_file_when_it_fits(tmp_path, tensors):
    assert write_sharded(tmp_path, steps_for(tensors), tensors.__getitem__) == 1200
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    written = loaded(tmp_path)
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_file_is_that_of_safetensors(tmp_path):
    dtypes = (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
    tensors = {f"{letter}.{dtype}": torch.ones(3, dtype=dtype) for letter in "ba" for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "z": torch.tensor(7)}
    write_sharded(tmp_path, steps_for(tensors), tensors.__getitem__)
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


def test_pieces_and_early_syncs_change_nothing(tmp_path, tensors, monkeypatch):
    synced = []
    monkeypatch.setattr(hashing, "WRITE_BYTES", 64)
    monkeypatch.setattr(hashing, "SYNC_BYTES", 300)
    monkeypatch.setattr(hashing.HashedFile, "_sync", lambda file: synced.append(file))
    digests = []
    steps = steps_for(tensors)
    write_sharded(tmp_path, steps, tensors.__getitem__, on_shard=lambda shard, digest, counts: digests.append(digest))
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    written = (tmp_path / "model.safetensors").read_bytes()
    assert written == (tmp_path / "expected").read_bytes()
    assert digests == [hashlib.sha256(written).hexdigest()] and synced


def test_without_glibc(tmp_path, tensors, monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(memory.ctypes, "CDLL", missing)
    assert write_sharded(tmp_path, steps_for(tensors), tensors.__getitem__) == 1200


def test_disk_that_fails_in_the_background(tmp_path, tensors, monkeypatch):
    def fail(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hashing, "SYNC_BYTES", 300)
    monkeypatch.setattr(hashing.HashedFile, "_sync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_sharded(tmp_path, steps_for(tensors), tensors.__getitem__)
    assert not list(tmp_path.iterdir())


def test_written_files_are_as_readable_as_their_folder(tmp_path, tensors):
    tmp_path.chmod(0o755)
    write_sharded(tmp_path, steps_for(tensors), tensors.__getitem__)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_shards_and_index(tmp_path, tensors):
    write_sharded(tmp_path, steps_for(tensors), tensors.__getitem__, max_shard_bytes=500)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 300, "total_size": 1200}
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    written = loaded(tmp_path)
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_index_is_like_that_of_transformers(tmp_path):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    model = LlamaForCausalLM(config)
    (tmp_path / "ours").mkdir()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    state_dict = model.state_dict()
    write_sharded(tmp_path / "ours", steps_for(state_dict), state_dict.__getitem__, max_shard_bytes=5000)
    ours, theirs = (
        json.loads((tmp_path / who / "model.safetensors.index.json").read_text()) for who in ("ours", "theirs")
    )
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()


def test_tensors_larger_than_a_shard_and_outputs_that_stay_together(tmp_path):
    tensors = {"a": torch.zeros(100), "x": torch.arange(300.0), "z": torch.zeros(10)}
    transforms = [WeightConverter("x", ["m", "n"], [Chunk(0)])]
    expected = {"a": (100,), "m": (150,), "n": (150,), "z": (10,)}
    write_sharded(tmp_path, steps_for(tensors, transforms, expected), tensors.__getitem__, max_shard_bytes=100)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert weight_map == dict(zip("amnz", (files[0], files[1], files[1], files[2]), strict=True))
    assert torch.equal(loaded(tmp_path)["n"], torch.arange(150.0, 300.0))


def test_memory_holds_two_tensors(tmp_path, tensors):
    sources, most = [], []

    def read(name):
        # The last one may still be hashed.
        most.append(sum(reference() is not None for reference in sources))
        tensor = tensors[name].clone()
        sources.append(weakref.ref(tensor))
        return tensor

    write_sharded(tmp_path, steps_for(tensors), read, max_shard_bytes=400)
    assert len(most) == 6 and max(most) <= 1


def test_tensors_that_share_memory_or_are_strided(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": whole, "b": whole, "c": whole.T, "x": whole[:2]}
    transforms = [WeightConverter("x", "y", [Transpose(0, 1)])]
    steps = steps_for(tensors, transforms, {"a": (3, 4), "b": (3, 4), "c": (4, 3), "y": (4, 2)})
    write_sharded(tmp_path, steps, tensors.__getitem__)
    written = loaded(tmp_path)
    assert torch.equal(written["b"], whole) and torch.equal(written["c"], whole.T)
    assert torch.equal(written["y"], whole[:2].T)


def test_dtype_casts_floating_point_only(tmp_path):
    tensors = {"a": torch.tensor([1.0, 1 / 3]), "b": torch.tensor([3])}
    assert write_sharded(tmp_path, steps_for(tensors), tensors.__getitem__, dtype=torch.bfloat16) == 4 + 8
    written = loaded(tmp_path)
    assert torch.equal(written["a"], tensors["a"].bfloat16()) and written["b"].dtype == torch.int64


def test_values_beyond_the_dtype(tmp_path):
    tensors = {"a": torch.tensor([1e5])}
    with pytest.raises(ValueError, match="'a' has values up to 100000, too large for torch.float16"):
        write_sharded(tmp_path, steps_for(tensors), tensors.__getitem__, dtype=torch.float16)


def test_source_that_changed_since_it_was_planned(tmp_path, tensors):
    steps = steps_for(tensors)
    with pytest.raises(ValueError, match="was planned as"):
        write_sharded(tmp_path, steps, lambda name: tensors[name].double())


def test_full_disk_is_noticed_before_anything_is_read(tmp_path, tensors, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(50_001_000))
    with pytest.raises(ValueError, match="needs 51 MB, but the disk of .* has 50 MB left"):
        write_sharded(tmp_path, steps_for(tensors), lambda _: pytest.fail("a tensor was read"))


def test_atomic_folder_appears_at_the_end(tmp_path):
    output = tmp_path / "parent" / "name"
    with atomic_folder(output) as folder:
        (folder / "file").write_text("text")
        assert not output.exists()
        assert folder.parent == output.parent and folder.name.startswith(".name.incomplete-")
    assert [path.name for path in output.parent.iterdir()] == ["name"]
    assert (output / "file").read_text() == "text"


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_interruption_leaves_nothing(tmp_path, tensors, exception):
    steps = steps_for(tensors)

    def read(name):
        if name == "layers.4.weight":
            assert list(tmp_path.glob(".out.incomplete-*/model-00001-*"))
            raise exception
        return tensors[name]

    with pytest.raises(exception), atomic_folder(tmp_path / "out") as folder:
        write_sharded(folder, steps, read, max_shard_bytes=400)
    assert not list(tmp_path.iterdir())


def test_existing_output(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not empty"), atomic_folder(tmp_path):
        pytest.fail("entered")
    with pytest.raises(ValueError, match="is a file"):
        check_output_folder(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "a").touch()
    assert (tmp_path / "empty" / "a").exists()


def test_output_that_was_filled_meanwhile_is_kept(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(ValueError, match="is not empty"), atomic_folder(output):
        shutil.copytree(Path(__file__).parent, output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (output / Path(__file__).name).exists()
