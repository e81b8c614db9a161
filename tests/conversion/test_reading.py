"""Reading checkpoints: every layout is read alike, and nothing damaged, unsafe or inconsistent is read at all."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from llava_family.conversion import CheckpointReader, TensorInfo, reading, resolve_checkpoint, shards


TENSORS = {
    "a.0.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "a.2.weight": torch.arange(4, dtype=torch.float32),
    "a.10.weight": torch.tensor(3, dtype=torch.int64),
    "b": torch.full((2,), 7.0, dtype=torch.float16),
}
SHARDS = (("a.0.weight", "a.10.weight"), ("a.2.weight", "b"))


def save(path, tensors):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def write_sharded(folder, prefix="model", suffix="safetensors", **changes):
    """A checkpoint of two shards; `changes` are made to its `weight_map`."""
    weight_map = {}
    for number, names in enumerate(SHARDS, start=1):
        file = f"{prefix}-0000{number}-of-00002.{suffix}"
        save(folder / file, {name: TENSORS[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    weight_map |= changes
    index = folder / f"{prefix}.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for name, file in weight_map.items() if file is not None}}))
    return index


@pytest.mark.parametrize("layout", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_layout_is_read_alike(tmp_path, layout, sharded):
    prefix, suffix = layout.split(".")
    if sharded:
        write_sharded(tmp_path, prefix, suffix)
    else:
        save(tmp_path / layout, TENSORS)
    with CheckpointReader(tmp_path) as reader:
        assert reader.tensors == {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in TENSORS.items()}
        for name, tensor in TENSORS.items():
            assert reader.read(name).dtype == tensor.dtype
            assert torch.equal(reader.read(name), tensor)


def test_pickles_that_cannot_be_mapped_are_read(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with CheckpointReader(tmp_path) as reader:
        assert torch.equal(reader.read("b"), TENSORS["b"])


def test_tensors_come_shard_by_shard_in_natural_order(tmp_path):
    write_sharded(tmp_path)
    assert list(CheckpointReader(tmp_path).tensors) == ["a.0.weight", "a.10.weight", "a.2.weight", "b"]
    (tmp_path / "single").mkdir()
    save(tmp_path / "single" / "model.safetensors", TENSORS)
    assert list(CheckpointReader(tmp_path / "single").tensors) == list(TENSORS)


@pytest.mark.parametrize("layout", [("model", "safetensors"), ("pytorch_model", "bin")])
def test_one_shard_is_open_at_a_time(tmp_path, monkeypatch, layout):
    write_sharded(tmp_path, *layout)
    alive, most = set(), []

    def counted(shard_class):
        class Counted(shard_class):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                alive.add(id(self))
                most.append(len(alive))

            def __del__(self):
                alive.discard(id(self))

        return Counted

    monkeypatch.setattr(shards, "SafetensorsShard", counted(shards.SafetensorsShard))
    monkeypatch.setattr(shards, "PickleShard", counted(shards.PickleShard))
    with CheckpointReader(tmp_path) as reader:
        assert not alive  # names and shapes are known, nothing is open
        for name in (*SHARDS[0], *SHARDS[1], *SHARDS[0]):
            reader.read(name)
        assert len(most) == 2 + 3
    assert max(most) == 1 and not alive


def test_no_values_are_read_for_names_and_shapes(tmp_path, monkeypatch):
    write_sharded(tmp_path)
    monkeypatch.setattr(shards.SafetensorsShard, "read", lambda *_: pytest.fail("a tensor was read"))
    assert len(CheckpointReader(tmp_path).tensors) == 4


def test_unknown_tensor(tmp_path):
    save(tmp_path / "model.safetensors", TENSORS)
    with pytest.raises(ValueError, match="has no tensor 'c'"):
        CheckpointReader(tmp_path).read("c")


def test_no_folder_and_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is missing"):
        CheckpointReader(tmp_path / "nowhere")
    (tmp_path / "mm_projector.bin").touch()
    with pytest.raises(ValueError, match=r"no weights: expected one of model.safetensors.*found mm_projector.bin"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "..", "", "sub/model.safetensors", "..\\outside.safetensors"]
)
def test_index_must_name_plain_files(tmp_path, file):
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "outside.safetensors", folder / "sub" / "model.safetensors"):
        save(place, {"b": TENSORS["b"]})
    index = write_sharded(folder, b=file)
    with pytest.raises(ValueError, match="expected a plain file name inside the folder") as error:
        CheckpointReader(folder)
    assert str(index) in str(error.value) and repr(file) in str(error.value)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_links_must_not_leave_the_folder(tmp_path, name):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    if name == "model.safetensors":
        save(folder / name, TENSORS)
    else:
        write_sharded(folder)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link to .*elsewhere, outside the folder"):
        CheckpointReader(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save(blobs / "hash.safetensors", TENSORS)
    (snapshot / "model.safetensors").symlink_to("../../blobs/hash.safetensors")
    assert torch.equal(CheckpointReader(snapshot).read("b"), TENSORS["b"])


def test_index_and_shards_must_agree(tmp_path):
    write_sharded(tmp_path, c="model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors \(c\) named in the index but not in the shard, 0 tensors in the"):
        CheckpointReader(tmp_path)
    write_sharded(tmp_path, b=None)
    with pytest.raises(ValueError, match=r"1 tensors \(b\) in the shard but not named there"):
        CheckpointReader(tmp_path)
    write_sharded(tmp_path)
    save(tmp_path / "model-00001-of-00002.safetensors", {name: TENSORS[name] for name in (*SHARDS[0], "b")})
    with pytest.raises(ValueError, match=r"1 tensors \(b\) in the shard but not named there"):
        CheckpointReader(tmp_path)


def test_missing_shard(tmp_path):
    index = write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="'model-00002-of-00002.safetensors', but there is no such file") as error:
        CheckpointReader(tmp_path)
    assert str(index) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be a checkpoint's JSON index"),
        ("[" * 100_000, "must be a checkpoint's JSON index"),
        ("[]", "must have a `weight_map`"),
        ('{"weight_map": {}}', "must have a `weight_map`"),
        ('{"weight_map": {"b": 3}}', "must have a `weight_map`"),
        ('{"weight_map": {"b": "model.safetensors", "b": "x.safetensors"}}', r"1 tensors \(b\) named more than once"),
    ],
)
def test_broken_index(tmp_path, text, message):
    index = write_sharded(tmp_path)
    index.write_text(text)
    with pytest.raises(ValueError, match=message):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_file(tmp_path, name, kept):
    path = tmp_path / name
    save(path, TENSORS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="must be a complete") as error:
        CheckpointReader(tmp_path)
    assert str(path) in str(error.value)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("archive", [True, False])
def test_malicious_pickle_is_refused(tmp_path, archive):
    path, trace = tmp_path / "pytorch_model.bin", tmp_path / "trace"
    if archive:
        torch.save({"b": TENSORS["b"], "c": Malicious(trace)}, path)
    else:
        path.write_bytes(pickle.dumps({"c": Malicious(trace)}))
    with pytest.raises(ValueError, match="may run code when loaded"):
        CheckpointReader(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [{"model": TENSORS}, [TENSORS["b"]], {1: TENSORS["b"]}, {}])
def test_pickle_must_hold_tensors_by_name(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold a dictionary of tensors by name"):
        CheckpointReader(tmp_path)


def test_entry_of_a_pickle(tmp_path):
    state = {"epoch": 3, "optimizer": {"lr": [0.1]}, "state_dict": TENSORS}
    torch.save(state, tmp_path / "last.pt")
    with CheckpointReader(tmp_path, "last.pt", "state_dict") as reader:
        assert list(reader.tensors) == list(TENSORS)
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in TENSORS.items())
    save(tmp_path / "last.safetensors", TENSORS)
    assert list(CheckpointReader(tmp_path, "last.safetensors", "state_dict").tensors) == list(TENSORS)
    with pytest.raises(ValueError, match="must hold a dictionary of tensors by name, but holds a dictionary of dict"):
        CheckpointReader(tmp_path, "last.pt")
    with pytest.raises(ValueError, match="must hold a dictionary of tensors by name, but holds a dictionary of list"):
        CheckpointReader(tmp_path, "last.pt", "optimizer")
    with pytest.raises(ValueError, match=r"must hold a dictionary with tensors under 'model', but holds \['epoch', "):
        CheckpointReader(tmp_path, "last.pt", "model")
    torch.save([TENSORS], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="with tensors under 'state_dict', but holds a list"):
        CheckpointReader(tmp_path, "list.pt", "state_dict")


def test_resolve_checkpoint(tmp_path, monkeypatch):
    assert resolve_checkpoint(tmp_path, ["*.json"]) == tmp_path
    (tmp_path / "file").touch()
    for missing in (tmp_path / "nowhere", tmp_path / "file", "./nowhere", "nowhere", "a/b/c", "nowhere/"):
        with pytest.raises(FileNotFoundError, match="neither a folder nor the id of a Hub repository"):
            resolve_checkpoint(missing, ["*.json"])

    monkeypatch.setattr(
        reading, "snapshot_download", lambda name, allow_patterns: f"/cache/{name}/{allow_patterns[0]}"
    )
    assert str(resolve_checkpoint("owner/name", ["*.json"])) == "/cache/owner/name/*.json"

    def offline(name, allow_patterns):
        raise OSError("no\nconnection.")

    monkeypatch.setattr(reading, "snapshot_download", offline)
    with pytest.raises(ValueError, match="'owner/name' is not a folder, .* no connection. Check the name"):
        resolve_checkpoint("owner/name", ["*.json"])


def test_a_header_may_fill_its_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    assert shards.SafetensorsShard(path).infos() == {}
    path.write_bytes((3).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="should have 3 bytes, but 2 follow"):
        shards.SafetensorsShard(path)
