"""Conversions that are interrupted, killed or out of disk: nothing half-valid, and a rerun gives the same bytes."""

import errno
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tqdm.std import TqdmDefaultWriteLock, tqdm
from transformers.utils import logging

from llava_family.conversion import (
    CheckpointReader,
    CheckpointTensors,
    TensorInfo,
    plan_conversion,
    resuming,
    writing,
)
from llava_family.conversion.converting import write_checkpoint
from llava_family.conversion.manifest import MANIFEST_FILE, Manifest
from llava_family.conversion.scripting import Conversion


SHARD_BYTES = 400_000
NUM_TENSORS = 12
# `make test` kills a few times; for more: KILL_RUNS=50 pytest tests/conversion/test_resuming.py -k random
KILL_RUNS = int(os.environ.get("KILL_RUNS", "8"))


class Settings:
    """A part of a checkpoint that is no weight."""

    def save_pretrained(self, folder):
        Path(folder, "config.json").write_text('{"model_type": "test"}\n')
        Path(folder, "tokenizer.json").write_text("{}\n")


def make_source(folder, seed=0):
    """Two shards of six tensors of 200 kB."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    weight_map = {}
    for shard in range(2):
        file = f"model-0000{shard + 1}-of-00002.safetensors"
        names = [f"layers.{shard * 6 + i}.weight" for i in range(6)]
        save_file({name: torch.randn(100, 500, generator=generator) for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def convert(
    source,
    output,
    read_hook=lambda name: None,
    report=lambda line: None,
    shard_bytes=SHARD_BYTES,
    allow_nan=False,
    **options,
):
    """Converts float32 to float32, in six shards."""
    with CheckpointReader(source) as reader:
        tensors = CheckpointTensors()
        for name, info in reader.tensors.items():

            def read(name=name):
                read_hook(name)
                return reader.read(name)

            tensors.add(name, info, read, (reader.path_of(name),))
        expected = {name: TensorInfo(info.shape, info.dtype) for name, info in reader.tensors.items()}
        plan = plan_conversion(reader.tensors, [], expected)
        sources = [("checkpoint", reader.folder / file) for file in reader.files]
        conversion = Conversion("test", options, sources, tensors, plan, torch.float32, [Settings()])
        write_checkpoint(output, conversion, None, report, shard_bytes, allow_nan)
    return output


def hashes_of(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source") / "original")


@pytest.fixture(scope="module")
def expected(source):
    return hashes_of(convert(source, source.parent / "expected"))


class Interruption:
    """Raises when so many tensors were read; counts all."""

    def __init__(self, after, error=KeyboardInterrupt):
        self.after, self.error, self.names = after, error, []

    def __call__(self, name):
        if len(self.names) == self.after:
            raise self.error
        self.names.append(name)


def interrupt(source, output, after=5, error=KeyboardInterrupt, **options):
    expectation = error if isinstance(error, type) else type(error)
    with pytest.raises(expectation):
        convert(source, output, Interruption(after, error), **options)


def incomplete_of(output):
    return output.parent / f".{output.name}.incomplete"


def test_manifest_tells_sources_and_files(source, expected, tmp_path):
    output = convert(source, tmp_path / "out", dtype="float32")
    manifest = json.loads((output / MANIFEST_FILE).read_text())
    assert {entry["name"]: entry["sha256"] for entry in manifest["sources"]} == hashes_of(source)
    assert all(entry["size"] == (source / entry["name"]).stat().st_size for entry in manifest["sources"])
    written = {file: shard["sha256"] for file, shard in manifest["shards"].items()} | manifest["files"]
    assert {**written, MANIFEST_FILE: hashes_of(output)[MANIFEST_FILE]} == hashes_of(output)
    assert manifest["options"] == {"dtype": "float32", "max_shard_bytes": SHARD_BYTES}
    # What makes a folder load comes last.
    assert list(manifest["files"]) == ["tokenizer.json", "config.json", "model.safetensors.index.json"]
    assert manifest["family"] == "test" and manifest["tool"]["torch"] == torch.__version__
    tensors = [name for shard in manifest["shards"].values() for name in shard["tensors"]]
    assert len(tensors) == NUM_TENSORS and manifest["shards"]["model-00001-of-00006.safetensors"]["tensors"] == {
        "layers.0.weight": "float32 [100, 500]",
        "layers.1.weight": "float32 [100, 500]",
    }
    assert str(tmp_path) not in json.dumps(manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit, OSError(errno.EIO, "broken"), RuntimeError, MemoryError]
)
def test_rerun_goes_on(source, expected, tmp_path, error):
    output, lines = tmp_path / "out", []
    interrupt(source, output, after=5, error=error, report=lines.append)
    assert lines[-1].startswith("Interrupted: 2 of 6 files of weights are finished, in ")
    assert [path.name for path in tmp_path.iterdir()] == [".out.incomplete"]
    assert not (incomplete_of(output) / "config.json").exists()
    reads = Interruption(after=None)
    convert(source, output, reads, lines.append)
    assert "Resumed: 2 of 6 files of weights were finished." in lines
    assert len(reads.names) == NUM_TENSORS - 4
    assert hashes_of(output) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_every_place_of_an_interruption(source, expected, tmp_path):
    for after in range(NUM_TENSORS):
        output = tmp_path / f"out{after}"
        interrupt(source, output, after)
        assert hashes_of(convert(source, output)) == expected


def test_interrupted_twice(source, expected, tmp_path):
    output = tmp_path / "out"
    interrupt(source, output, 3)
    interrupt(source, output, 5)
    reads = Interruption(after=None)
    convert(source, output, reads)
    assert len(reads.names) == NUM_TENSORS - 6 and hashes_of(output) == expected


def test_what_resuming_cannot_mend_leaves_nothing(source, tmp_path):
    interrupt(source, tmp_path / "out", 5, ValueError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["processor", "rename"])
def test_interruption_behind_the_weights(source, expected, tmp_path, monkeypatch, what):
    output = tmp_path / "out"

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((Settings, "save_pretrained") if what == "processor" else (resuming, "move_to_output")), stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, output)
    reads = Interruption(after=None)
    assert hashes_of(convert(source, output, reads)) == expected
    assert not reads.names


@pytest.mark.parametrize("change", ["flipped", "truncated", "removed"])
def test_finished_file_that_was_damaged_is_written_again(source, expected, tmp_path, change):
    output = tmp_path / "out"
    interrupt(source, output, 5)
    path = incomplete_of(output) / "model-00002-of-00006.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data if change == "flipped" else data[:1000])
    if change == "removed":
        path.unlink()
    reads = Interruption(after=None)
    assert hashes_of(convert(source, output, reads)) == expected
    assert len(reads.names) == NUM_TENSORS - 2


def other_source(source, parent):
    return make_source(parent / "other", seed=1)


def renamed_source(source, parent):
    shutil.copytree(source, parent / "other")
    (parent / "other" / "model.safetensors.index.json").write_text(
        (source / "model.safetensors.index.json").read_text() + "\n"
    )
    return parent / "other"


@pytest.mark.parametrize("change", ["values", "index", "options", "shards"])
def test_rerun_with_something_else_begins_anew(source, tmp_path, change):
    output, lines = tmp_path / "out", []
    interrupt(source, output, 5, dtype="float32")
    if change in ("values", "index"):
        source = (other_source if change == "values" else renamed_source)(source, tmp_path)
    options = (
        {"dtype": "float32", "shard_bytes": 800_000}
        if change == "shards"
        else {"dtype": "float16" if change == "options" else "float32"}
    )
    reads = Interruption(after=None)
    convert(source, output, reads, lines.append, **options)
    assert "Discarded what an earlier conversion, of other files or with other options, had left." in lines
    assert len(reads.names) == NUM_TENSORS
    fresh = convert(source, tmp_path / "fresh", **options)
    assert hashes_of(output) == hashes_of(fresh)


def test_another_version_begins_anew(source, expected, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("llava_family.__version__", "0.0.1")
        interrupt(source, output, 5)
    reads = Interruption(after=None)
    assert hashes_of(convert(source, output, reads)) == expected
    assert len(reads.names) == NUM_TENSORS


def foreign_folder(path):
    path.mkdir()
    (path / "thesis.tex").touch()


def foreign_manifest(path):
    path.mkdir()
    (path / MANIFEST_FILE).write_text('{"format": "another tool"}')


def foreign_file(path):
    path.touch()


def foreign_link(path):
    (path.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent / "elsewhere")


def link_inside(path):
    path.mkdir()
    (path / MANIFEST_FILE).symlink_to("/etc/hostname")


@pytest.mark.parametrize("make", [foreign_folder, foreign_manifest, foreign_file, foreign_link, link_inside])
def test_what_is_not_ours_is_kept(source, tmp_path, make):
    make(tmp_path / ".out.incomplete")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="this is not what an earlier one left: .* Move it away"):
        convert(source, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", [[], [f"{MANIFEST_FILE}.partial"]])
def test_killed_before_there_was_a_manifest(source, expected, tmp_path, content):
    (tmp_path / ".out.incomplete").mkdir()
    for name in content:
        (tmp_path / ".out.incomplete" / name).write_text('{"for')
    assert hashes_of(convert(source, tmp_path / "out")) == expected


@pytest.mark.parametrize("place", ["taking over", "discarding"])
def test_interrupted_while_it_prepares(source, expected, tmp_path, monkeypatch, place):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    output = tmp_path / "out"
    interrupt(source, output, 5, **({"dtype": "other"} if place == "discarding" else {}))
    with monkeypatch.context() as patch:
        patch.setattr(*((Manifest, "save") if place == "taking over" else (resuming, "_empty")), stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, output)
    assert (incomplete_of(output) / MANIFEST_FILE).exists()
    assert hashes_of(convert(source, output)) == expected


def test_second_run_is_refused(source, expected, tmp_path):
    output, errors = tmp_path / "out", []

    def second(name):
        if not errors:
            with pytest.raises(ValueError, match="Another conversion is writing to .*out") as error:
                convert(source, output)
            errors.append(error)

    assert hashes_of(convert(source, output, second)) == expected
    assert errors and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_source_that_changes_meanwhile(source, tmp_path):
    copy = tmp_path / "original"
    shutil.copytree(source, copy)

    def touch(name):
        if name == "layers.9.weight":
            os.utime(copy / "model-00002-of-00002.safetensors", ns=(1, 1))

    with pytest.raises(ValueError, match="was changed while it was converted"):
        convert(copy, tmp_path / "out", touch)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_not_finite_values_are_refused_or_kept(tmp_path):
    source = make_source(tmp_path / "original")
    path = source / "model-00001-of-00002.safetensors"
    with CheckpointReader(source) as reader:
        tensors = {name: reader.read(name).clone() for name in reader.tensors if reader.path_of(name) == path}
    tensors["layers.0.weight"][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    tensors["layers.3.weight"][7, 7] = float("nan")
    save_file(tensors, path)
    lines = []
    line = (
        "Not finite: 4 values of 2 tensors of the original are NaN or infinite (3 in layers.0.weight, 1 in "
        "layers.3.weight). They were kept."
    )
    with pytest.raises(ValueError, match=re.escape(line.removesuffix(" They were kept."))):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]
    interrupt(source, tmp_path / "out", 5)
    output = convert(source, tmp_path / "out", report=lines.append, allow_nan=True)
    assert line in lines
    with CheckpointReader(output) as reader:
        assert torch.equal(reader.read("layers.0.weight").isfinite(), tensors["layers.0.weight"].isfinite())
    fresh = convert(source, tmp_path / "fresh", report=lines.append, allow_nan=True)
    assert lines.count(line) == 2 and hashes_of(fresh) == hashes_of(output)


def test_values_that_a_cast_makes_infinite_are_refused_beside_those_that_are(tmp_path):
    tensor = torch.tensor([float("nan"), 1e5])
    steps = plan_conversion({"a": TensorInfo((2,), torch.float32)}, [], {"a": (2,)}).steps
    with pytest.raises(ValueError, match="has values up to 100000, too large for torch.float16"):
        writing.write_sharded(tmp_path, steps, lambda name: tensor, torch.float16)
    assert not list(tmp_path.iterdir())


# Killed processes and full disks


def progress_bars(base=tqdm):
    """tqdm's class and all made of it: the first that a process uses gets the lock, its subclasses inherit it."""
    yield base
    for derived in base.__subclasses__():
        yield from progress_bars(derived)


def in_child(function):
    """The id of a process that runs `function` and ends with 0, or with 1 if it raises."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # a pool of threads does not survive a fork
            # tqdm's own lock is shared with forked processes: killed while it holds it, a child would take it along.
            for progress_bar in progress_bars():
                progress_bar.set_lock(threading.RLock())
            function()
            status = 0
        finally:
            os._exit(status)
    return child


@pytest.mark.parametrize("used_first", [tqdm, logging.tqdm_lib.tqdm], ids=["tqdm", "tqdm.auto"])
def test_killed_children_leave_the_lock_of_progress_bars(tmp_path, monkeypatch, used_first):
    def hold():
        bar = logging.tqdm(total=1, disable=False)
        bar.get_lock().acquire()
        (tmp_path / "holds").touch()
        time.sleep(60)

    for progress_bar in progress_bars():
        if "_lock" in vars(progress_bar):
            monkeypatch.delattr(progress_bar, "_lock")
    # As the first progress bar of a process would make it.
    monkeypatch.setattr(used_first, "_lock", TqdmDefaultWriteLock(), raising=False)
    locks = used_first.get_lock().locks
    child = in_child(hold)
    while not (tmp_path / "holds").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acquired = [lock.acquire(True, 5) for lock in locks]
    for lock, held in zip(locks, acquired, strict=True):
        if held:
            lock.release()
    assert all(acquired)


def slowly(name):
    """Spreads the tensors over time, so that kills hit them and not only what comes before."""
    time.sleep(0.004)


@pytest.mark.slow
def test_killed_at_random_moments(source, expected, tmp_path):
    start = time.perf_counter()
    assert os.waitpid(in_child(lambda: convert(source, tmp_path / "whole", slowly)), 0)[1] == 0
    duration = time.perf_counter() - start
    generator = random.Random(0)
    killed = resumed = 0
    for run in range(KILL_RUNS):
        output, lines = tmp_path / f"out{run}", []
        child = in_child(lambda output=output: convert(source, output, slowly))
        moment = generator.uniform(0, duration)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            killed += 1
        else:
            duration = moment  # it was measured beside other work
        if os.WIFSIGNALED(status) and not output.exists():
            assert (
                not (incomplete_of(output) / "model.safetensors.index.json").exists()
                or len(list(incomplete_of(output).glob("model-*.safetensors"))) == 6
            )
            convert(source, output, report=lines.append)
        resumed += any(line.startswith("Resumed") for line in lines)
        assert hashes_of(output) == expected, f"after the kill of run {run}"
    assert killed > KILL_RUNS / 2 and resumed
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_killed_again_and_again(source, expected, tmp_path):
    generator = random.Random(1)
    output = tmp_path / "out"
    for _ in range(100):
        child = in_child(lambda: convert(source, output, slowly))
        time.sleep(generator.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if output.exists():
            break
    else:
        convert(source, output)
    assert hashes_of(output) == expected


@pytest.fixture
def tmpfs(tmp_path):
    """A disk of 64 MB; skips where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", place], check=True)


def test_disk_that_fills_up(source, expected, tmpfs):
    filler, output = tmpfs / "filler", tmpfs / "out"

    def fill(name):
        if name == "layers.5.weight":
            filler.write_bytes(bytes(62_500_000))
            with filler.open("ab", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))

    lines = []
    with pytest.raises(
        OSError, match="The disk of .* is full .*Free some, and run the same conversion again"
    ) as error:
        convert(source, output, fill, lines.append)
    assert error.value.errno == errno.ENOSPC
    assert not output.exists() and not list(tmpfs.rglob("*.partial")) and not list(tmpfs.rglob("config.json"))
    filler.unlink()
    assert hashes_of(convert(source, output, report=lines.append)) == expected
    assert any(line.startswith("Resumed: 2 of 6") for line in lines)


def test_disk_that_is_full_from_the_beginning(source, tmpfs):
    (tmpfs / "filler").write_bytes(bytes(20_000_000))
    with pytest.raises(ValueError, match="The output needs 53 MB, but the disk of .* has 4[0-9] MB left"):
        convert(source, tmpfs / "out")
    assert [path.name for path in tmpfs.iterdir()] == ["filler"]


def test_room_is_needed_for_the_rest_alone(source, expected, tmp_path, monkeypatch):
    def stop(name):
        if name == "layers.8.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", stop)
    # 2.4 MB are needed in all, 0.8 MB of them for the rest.
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda folder: namedtuple("usage", "free")(50_900_000))
    assert hashes_of(convert(source, tmp_path / "out")) == expected
    with pytest.raises(ValueError, match="needs 53 MB"):
        convert(source, tmp_path / "next")


def test_files_that_may_not_grow(source, expected, tmp_path):
    output = tmp_path / "out"

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        with pytest.raises(OSError, match="The disk of .* is full"):
            convert(source, output)

    assert os.waitpid(in_child(limited), 0)[1] == 0
    assert not output.exists() and not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.safetensors"))
    assert hashes_of(convert(source, output)) == expected


def test_read_only_disk(source, tmpfs):
    subprocess.run(["mount", "-o", "remount,ro", tmpfs], check=True)
    with pytest.raises(OSError, match="cannot be written to .*Choose an output in another folder"):
        convert(source, tmpfs / "out")
    assert not list(tmpfs.iterdir())


def test_read_only_folder(source, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(OSError, match="cannot be written to .*Choose an output in another folder"):
        convert(source, folder / "out")
    assert not list(folder.iterdir())
