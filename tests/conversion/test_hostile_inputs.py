"""Hostile checkpoints: each is one clear error, soon, and nothing of it is run, believed or left behind."""

import json
import os
import pickle
import shutil
import struct
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_family.conversion import CheckpointReader
from llava_family.converters.moe_llava import convert_moe_llava_checkpoint


FIXTURES = Path(__file__).parents[1] / "fixtures"
PHI = FIXTURES / "moe_llava" / "phi_clip336"
UHD = FIXTURES / "llava_uhd"
MAX_SECONDS = 2.0
WEIGHT = torch.arange(6.0).reshape(2, 3)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SENTINEL = "sentinel"


# Folders with one file of weights, or two and an index


def one_file(folder, tensors=None, name="model.safetensors"):
    tensors = {"a": WEIGHT} if tensors is None else tensors
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder / name


def two_shards(folder, weight_map=None, tensors=({"a": WEIGHT}, {"b": WEIGHT})):
    for file, content in zip(SHARDS, tensors, strict=True):
        save_file(content, folder / file)
    write_index(folder, {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]} if weight_map is None else weight_map})


def write_index(folder, content, name="model.safetensors.index.json"):
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def raw_safetensors(folder, header, data=b"\0" * 24, length=None, name="model.safetensors"):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def entry(dtype="F32", shape=(2, 3), start=0, end=24):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def named(name):
    return lambda folder: raw_safetensors(folder, {name: entry()})


def named_in_pickle(name):
    return lambda folder: one_file(folder, {name: WEIGHT}, "pytorch_model.bin")


def index_names(file):
    def build(folder):
        save_file({"a": WEIGHT}, folder.parent / "outside.safetensors")
        (folder / "sub").mkdir()
        save_file({"a": WEIGHT}, folder / "sub" / "model.safetensors")
        write_index(folder, {"weight_map": {"a": file(folder) if callable(file) else file}})

    return build


# Pickles


class Subclass(torch.Tensor):
    pass


class Call:
    """Is pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def raw_pickle(code):
    """A torch archive of hand-written opcodes."""

    def build(folder):
        text = code(folder) if callable(code) else code
        with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", text)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")

    return build


def call_of(module, function, argument=lambda folder: f"touch {folder.parent / SENTINEL}"):
    return raw_pickle(
        lambda folder: (
            b"\x80\x02c" + f"{module}\n{function}\n".encode() + pickle.dumps((argument(folder),), 2)[2:-1] + b"R."
        )
    )


def pickled(make, name="pytorch_model.bin", **options):
    return lambda folder: torch.save({"a": WEIGHT, "b": make(folder)}, folder / name, **options)


def legacy_system(folder):
    (folder / "pytorch_model.bin").write_bytes(
        pickle.dumps({"a": Call(os.system, f"touch {folder.parent / SENTINEL}")})
    )


def tar_archive(folder):
    (folder / "pickle").write_bytes(pickle.dumps(Call(os.system, f"touch {folder.parent / SENTINEL}")))
    with tarfile.open(folder / "pytorch_model.bin", "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.add(folder / "pickle", name)
    (folder / "pickle").unlink()


def torchscript(folder):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(folder / "pytorch_model.bin"))


def rewritten_archive(edit):
    """A torch file whose parts `edit(name, content)` has changed."""

    def build(folder):
        path = one_file(folder, name="original.bin")
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(folder / "pytorch_model.bin", "w") as target:
            for part in source.infolist():
                for name, content, compression in edit(part.filename, source.read(part)):
                    target.writestr(name, content, compression)
        path.unlink()

    return build


def zip_bomb(name, content):
    return [(name, bytes(300_000_000) if name.endswith("data.pkl") else content, zipfile.ZIP_DEFLATED)]


def compressed(name, content):
    return [(name, content, zipfile.ZIP_DEFLATED)]


def twice(name, content):
    return [(name, content, zipfile.ZIP_STORED)] * (2 if name.endswith("data.pkl") else 1)


def huge_pickle(name, content):
    return [(name, bytes(50_000_001) if name.endswith("data.pkl") else content, zipfile.ZIP_STORED)]


def conjugate(folder):
    return torch.ones(2, dtype=torch.complex64).conj()


# Damage, sizes and kinds of files


def truncated(name, kept):
    def build(folder):
        path = one_file(folder, name=name)
        path.write_bytes(path.read_bytes()[:kept])

    return build


def truncated_index(folder):
    two_shards(folder)
    path = folder / "model.safetensors.index.json"
    path.write_bytes(path.read_bytes()[:-5])


def sparse_giant(folder):
    """A terabyte that takes no room on the disk, and a header that lies about it."""
    raw_safetensors(folder, {"a": entry(shape=(2**38,), end=2**40 + 8)}, b"")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2**40)


def moved_away(name, build):
    """A link to a file outside."""

    def apply(folder):
        build(folder)
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return apply


def link_to(target, name="model.safetensors"):
    return lambda folder: (folder / name).symlink_to(target)


def folder_link(folder):
    folder.rmdir()
    folder.symlink_to(folder.parent / "nowhere")


def is_file(folder):
    folder.rmdir()
    folder.write_text("a file")


def no_build(folder):
    pass


PLAIN = "expected a plain file name inside the folder"
NAME = "expected letters, digits and punctuation of ASCII"
REFUSED = "must be a complete torch file of plain tensors, but was refused"
RUNS_CODE = "may run code when loaded"
SAFETENSORS = "must be a complete safetensors file"
DENSE = "must be a plain dense tensor, but is"

# What is in the folder, and the error of reading it
READING = {
    # Pickles that run code
    "os.system": (call_of("os", "system"), RUNS_CODE),
    "posix.system": (call_of("posix", "system"), RUNS_CODE),
    "subprocess": (call_of("subprocess", "getoutput"), RUNS_CODE),
    "eval": (call_of("builtins", "eval", lambda f: f"open({str(f.parent / SENTINEL)!r}, 'w')"), RUNS_CODE),
    "exec": (call_of("builtins", "exec", lambda f: f"open({str(f.parent / SENTINEL)!r}, 'w')"), RUNS_CODE),
    "open": (call_of("builtins", "open", lambda f: str(f.parent / SENTINEL)), RUNS_CODE),
    "getattr": (call_of("builtins", "getattr", lambda f: "os"), RUNS_CODE),
    "__import__": (call_of("builtins", "__import__", lambda f: "antigravity"), RUNS_CODE),
    "torch.load within": (call_of("torch", "load", lambda f: str(f.parent / "other.bin")), RUNS_CODE),
    "torch.hub": (call_of("torch.hub", "load", lambda f: "me/mine"), RUNS_CODE),
    "runpy": (call_of("runpy", "run_path", lambda f: str(f.parent / "script.py")), RUNS_CODE),
    "numpy with an object": (call_of("numpy.core.multiarray", "_reconstruct", lambda f: "x"), RUNS_CODE),
    "Python object": (pickled(lambda f: Call(os.mkdir, str(f.parent / SENTINEL))), RUNS_CODE),
    "of another protocol": (pickled(lambda f: Call(os.mkdir, str(f.parent / SENTINEL)), pickle_protocol=4), RUNS_CODE),
    "without an archive": (legacy_system, RUNS_CODE),
    "in a tar": (tar_archive, REFUSED),
    "TorchScript": (torchscript, REFUSED),
    "as .safetensors": (
        lambda folder: (legacy_system(folder), (folder / "pytorch_model.bin").rename(folder / "model.safetensors")),
        SAFETENSORS,
    ),
    # Pickles of something else
    "no dictionary": (lambda f: torch.save([WEIGHT], f / "pytorch_model.bin"), "dictionary of tensors by name"),
    "nested dictionary": (lambda f: one_file(f, {"a": {"b": WEIGHT}}, "pytorch_model.bin"), "dictionary of tensors"),
    "numbers for names": (lambda f: one_file(f, {1: WEIGHT}, "pytorch_model.bin"), "dictionary of tensors by name"),
    "sparse": (pickled(lambda f: torch.eye(3).to_sparse()), DENSE),
    "compressed rows": (pickled(lambda f: torch.eye(3).to_sparse_csr()), DENSE),
    "quantized": (pickled(lambda f: torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)), DENSE),
    "without values": (pickled(lambda f: torch.empty(2, device="meta")), DENSE),
    "subclass": (pickled(lambda f: WEIGHT.as_subclass(Subclass)), RUNS_CODE),
    "lazy conjugate": (pickled(conjugate), DENSE),
    "lazy negative": (pickled(lambda f: conjugate(f).imag), DENSE),
    "expanded to a terabyte": (pickled(lambda f: torch.zeros(1).expand(2**38)), f"{DENSE} expanded: it has 1,099,"),
    # Archives
    "zip bomb": (rewritten_archive(zip_bomb), "is compressed, which torch never does"),
    "compressed archive": (rewritten_archive(compressed), "is compressed, which torch never does"),
    "two parts of one name": (rewritten_archive(twice), "two of its parts have one name"),
    "endless pickle": (rewritten_archive(huge_pickle), "its pickle has 50000001 bytes"),
    "empty archive": (lambda f: zipfile.ZipFile(f / "pytorch_model.bin", "w").close(), REFUSED),
    "truncated archive": (truncated("pytorch_model.bin", -200), REFUSED),
    "half an archive": (truncated("pytorch_model.bin", 300), REFUSED),
    "empty pickle": (truncated("pytorch_model.bin", 0), REFUSED),
    "archive of noise": (
        lambda f: (f / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(range(256)) * 9),
        REFUSED,
    ),
    # Headers of safetensors
    "truncated tensors": (truncated("model.safetensors", -1), SAFETENSORS),
    "truncated header": (truncated("model.safetensors", 20), SAFETENSORS),
    "truncated length": (truncated("model.safetensors", 5), SAFETENSORS),
    "empty file": (truncated("model.safetensors", 0), SAFETENSORS),
    "header without end": (
        lambda f: raw_safetensors(f, {}, length=2**64 - 1),
        "should have 18446744073709551615 bytes",
    ),
    "header of a gigabyte": (lambda f: raw_safetensors(f, {}, length=2**30), "should have 1073741824 bytes"),
    "header beyond the file": (lambda f: raw_safetensors(f, {"a": entry()}, length=500), "should have 500 bytes, but"),
    "no header": (lambda f: raw_safetensors(f, b"", length=0), "should have 0 bytes"),
    "one name twice in a header": (
        lambda f: raw_safetensors(f, f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}'.encode()),
        r"1 tensors \(a\) named more than once",
    ),
    "nested header": (lambda f: raw_safetensors(f, b"[" * 100_000), "nested too deeply"),
    "header of Latin-1": (lambda f: raw_safetensors(f, b'{"\xe9": {}}'), SAFETENSORS),
    "header that is a list": (lambda f: raw_safetensors(f, b"[1, 2]"), SAFETENSORS),
    "negative shape": (lambda f: raw_safetensors(f, {"a": entry(shape=(-2, 3))}), SAFETENSORS),
    "shape that overflows": (lambda f: raw_safetensors(f, {"a": entry(shape=(2**40, 2**40))}), SAFETENSORS),
    "shape of another size": (lambda f: raw_safetensors(f, {"a": entry(shape=(2, 4))}), SAFETENSORS),
    "offsets that overlap": (lambda f: raw_safetensors(f, {"a": entry(), "b": entry()}), SAFETENSORS),
    "offsets backwards": (lambda f: raw_safetensors(f, {"a": entry(start=24, end=0)}), SAFETENSORS),
    "hole between tensors": (lambda f: raw_safetensors(f, {"a": entry(start=24, end=48)}, bytes(48)), SAFETENSORS),
    "bytes behind the tensors": (lambda f: raw_safetensors(f, {"a": entry()}, bytes(30)), SAFETENSORS),
    "unknown dtype": (lambda f: raw_safetensors(f, {"a": entry("F128")}), SAFETENSORS),
    "claims a terabyte": (sparse_giant, SAFETENSORS),
    # Names of tensors
    "look-alike letter": (named("model.l\u0430yers.0"), NAME),
    "right to left": (named("model.\u202e.thgiew"), NAME),
    "zero width": (named("model\u200b.weight"), NAME),
    "NUL in a name": (named("weight\0"), NAME),
    "line in a name": (named("weight\nError: all is well"), NAME),
    "escape in a name": (named("\x1b[2Jweight"), NAME),
    "slash in a name": (named("../../weight"), NAME),
    "backslash in a name": (named("..\\weight"), NAME),
    "blank name": (named(" "), NAME),
    "no name": (named(""), NAME),
    "long name": (named("a" * 100_000), "a name of 100000 characters"),
    "composed letter": (named("we\u0301ight"), NAME),
    "surrogate": (lambda f: raw_safetensors(f, b'{"\\ud800": ' + json.dumps(entry()).encode() + b"}"), SAFETENSORS),
    "look-alike letter in a pickle": (named_in_pickle("l\u0430yers"), NAME),
    "long name in a pickle": (named_in_pickle("a" * 1000), "a name of 1000 characters"),
    # Places in the index
    "path out": (index_names("../outside.safetensors"), PLAIN),
    "path out and in": (index_names("../checkpoint/sub/model.safetensors"), PLAIN),
    "path into": (index_names("sub/model.safetensors"), PLAIN),
    "absolute path": (index_names(lambda f: str(f.parent / "outside.safetensors")), PLAIN),
    "path of Windows": (index_names("..\\outside.safetensors"), PLAIN),
    "drive of Windows": (index_names("C:\\outside.safetensors"), PLAIN),
    "parent": (index_names(".."), PLAIN),
    "folder itself": (index_names("."), PLAIN),
    "empty file name": (index_names(""), PLAIN),
    "NUL in a file name": (index_names("model\0.safetensors"), PLAIN),
    "right to left in a file name": (index_names("model\u202esrotsnetefas."), PLAIN),
    "long file name": (index_names("a" * 5000), PLAIN),
    "home": (index_names("~/outside.safetensors"), PLAIN),
    "URL": (index_names("https://example.com/model.safetensors"), PLAIN),
    "pickle in an index of safetensors": (
        lambda f: (one_file(f, name="a.bin"), write_index(f, {"weight_map": {"a": "a.bin"}})),
        "expected safetensors alone",
    ),
    "missing shard": (lambda f: (two_shards(f), (f / SHARDS[1]).unlink()), "there is no such file"),
    "folder for a shard": (
        lambda f: (two_shards(f), (f / SHARDS[1]).unlink(), (f / SHARDS[1]).mkdir()),
        "is a folder",
    ),
    "one tensor in two shards": (
        lambda f: two_shards(f, tensors=({"a": WEIGHT}, {"a": WEIGHT, "b": WEIGHT + 1})),
        r"1 tensors \(a\) in the shard but not named there",
    ),
    "tensor that no index names": (
        lambda f: two_shards(f, tensors=({"a": WEIGHT, "c": WEIGHT + 1}, {"b": WEIGHT})),
        r"1 tensors \(c\) in the shard but not named there",
    ),
    "tensor that no shard has": (
        lambda f: two_shards(f, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}),
        r"1 tensors \(c\) named in the index but not in the shard",
    ),
    # JSON of the index
    "one name twice in the index": (
        lambda f: (two_shards(f), write_index(f, f'{{"weight_map": {{"a": "{SHARDS[0]}", "a": "{SHARDS[1]}"}}}}')),
        "named more than once",
    ),
    "truncated index": (truncated_index, "is no JSON"),
    "nested index": (lambda f: write_index(f, "[" * 200_000), "nested too deeply"),
    "index of Latin-1": (lambda f: write_index(f, b'{"weight_map": {"\xe9": "a"}}'), "is no JSON"),
    "index of UTF-16": (lambda f: write_index(f, '{"weight_map": {}}'.encode("utf-16")), "is no JSON"),
    "index of 51 MB": (lambda f: write_index(f, b" " * 51_000_000), "expected at most 50,000,000"),
    "number of a million digits": (lambda f: write_index(f, '{"weight_map": ' + "9" * 10**6 + "}"), "is no JSON"),
    "index of numbers": (lambda f: write_index(f, {"weight_map": {"a": 1}}), "must have a `weight_map`"),
    "index of lists": (lambda f: write_index(f, {"weight_map": {"a": ["b"]}}), "must have a `weight_map`"),
    "index that is null": (lambda f: write_index(f, "null"), "must have a `weight_map`"),
    "empty index": (lambda f: write_index(f, {"weight_map": {}}), "must have a `weight_map`"),
    # Kinds of files
    "link to a file outside": (moved_away("model.safetensors", one_file), "is a link to .*elsewhere, outside"),
    "link to a shard outside": (moved_away(SHARDS[1], two_shards), "is a link to .*elsewhere, outside"),
    "link to an index outside": (moved_away("model.safetensors.index.json", two_shards), "is a link to .*elsewhere"),
    "link to nowhere": (link_to("nowhere"), "it is a link to nowhere"),
    "link to itself": (link_to("model.safetensors"), "it is a link to nowhere"),
    "link to a device": (link_to("/dev/zero"), "it is a device"),
    "pipe": (lambda f: os.mkfifo(f / "model.safetensors"), "it is a pipe"),
    "pipe for an index": (lambda f: os.mkfifo(f / "model.safetensors.index.json"), "it is a pipe"),
    "pipe for a pickle": (lambda f: os.mkfifo(f / "pytorch_model.bin"), "it is a pipe"),
    "folder for a file": (lambda f: (f / "model.safetensors").mkdir(), "it is a folder"),
    "empty folder": (no_build, "found an empty folder"),
    "file for a folder": (is_file, "must be a folder, but .* is a file"),
    "folder that is a link to nowhere": (folder_link, "must be a folder, but .* is missing"),
}


def assert_quickly_refused(message, function, *arguments):
    start = time.perf_counter()
    with pytest.raises((ValueError, OSError)) as error:
        function(*arguments)
    seconds = time.perf_counter() - start
    assert error.match(f"(?s){message}")
    text = str(error.value)
    assert text.isprintable() or text.replace("\n", "").isprintable(), "what is printed must not steer a terminal"
    assert seconds < MAX_SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("case", READING)
def test_reading_refuses(tmp_path, case):
    build, message = READING[case]
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    build(folder)
    before = sorted(tmp_path.rglob("*"))
    assert_quickly_refused(message, CheckpointReader, folder)
    assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path / SENTINEL).exists()


def test_no_setting_of_torch_makes_pickles_run(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    pickled(lambda f: Call(os.mkdir, str(f.parent / SENTINEL)))(folder)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert_quickly_refused(RUNS_CODE, CheckpointReader, folder)
    assert not (tmp_path / SENTINEL).exists()


@pytest.mark.parametrize("case", ["shared", "strided", "overlapping", "parameter"])
def test_unusual_but_harmless_pickles_are_read(tmp_path, case):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "shared": {"a": whole, "b": whole},
        "strided": {"a": whole.T, "b": whole[:, 1]},
        "overlapping": {"a": whole[:2], "b": whole[1:]},
        "parameter": {"a": torch.nn.Parameter(whole)},
    }[case]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with CheckpointReader(tmp_path) as reader:
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


# Whole conversions


def release(folder):
    """Phi's golden checkpoint in one file, with the settings of its tower."""
    shutil.copytree(
        PHI / "original_checkpoint", folder, ignore=shutil.ignore_patterns("model*"), copy_function=shutil.copyfile
    )
    shutil.copytree(PHI / "openai", folder / "openai", copy_function=shutil.copyfile)
    with CheckpointReader(PHI / "original_checkpoint") as reader:
        save_file({name: reader.read(name).clone() for name in reader.tensors}, folder / "model.safetensors")


def config_of(**changes):
    def build(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return build


def tower_of(**changes):
    def build(folder):
        (path,) = folder.glob("openai/*/config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return build


def weights(edit):
    def build(folder):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return build


def retyped(dtype, name="model.final_layernorm.weight"):
    return weights(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


def settings(name, content):
    def build(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return build


def special(name, make):
    """Something else in the place of a file of settings."""

    def build(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return build


def link_out(path):
    secret = path.parent.parent / "secret"
    secret.write_text("{}")
    path.symlink_to(secret)


def huge_file(path):
    path.touch()
    os.truncate(path, 2**40)


CONFIG = "config.json"
# What is done to a good release, and the error of converting it
CONVERTING = {
    # Tensors that are not the model's
    "wrong shape": (weights(lambda t: t.update({"lm_head.weight": torch.zeros(2, 2)})), "2 dtypes|expected"),
    "integers for weights": (retyped(torch.int64), "has dtype torch.int64, expected torch.float64 or"),
    "bytes for weights": (retyped(torch.uint8), "has dtype torch.uint8, expected"),
    "truth for weights": (retyped(torch.bool), "has dtype torch.bool, expected"),
    "complex weights": (retyped(torch.complex64), "has dtype C64, expected"),
    "weights of 8 bits": (retyped(torch.float8_e4m3fn), "float8_e4m3fn"),
    "extra tensor": (weights(lambda t: t.update(backdoor=torch.zeros(2).bfloat16())), "without a target:\\s+backdoor"),
    "missing tensor": (weights(lambda t: t.pop("lm_head.weight")), "without a source:\\s+lm_head.weight"),
    "empty tensor": (
        weights(lambda t: t.update({"lm_head.weight": torch.zeros(0, 64).bfloat16()})),
        r"has shape \(0, 64\)",
    ),
    "truncated weights": (lambda f: os.truncate(f / "model.safetensors", 10_000), SAFETENSORS),
    # config.json
    "no configuration": (lambda f: (f / CONFIG).unlink(), "has no config.json"),
    "configuration of Latin-1": (settings(CONFIG, b'{"a": "\xe9"}'), "is no JSON"),
    "configuration of noise": (settings(CONFIG, bytes(range(256))), "is no JSON"),
    "nested configuration": (settings(CONFIG, "[" * 200_000), "nested too deeply"),
    "nested objects": (settings(CONFIG, '{"a":' * 200_000), "nested too deeply"),
    "configuration that is a list": (settings(CONFIG, "[]"), "holds a list"),
    "configuration that is null": (settings(CONFIG, "null"), "holds a NoneType"),
    "configuration that says things twice": (
        settings(CONFIG, '{"model_type": "moe_llava_phi", "model_type": "llava_llama"}'),
        "named more than once",
    ),
    "configuration of 51 MB": (settings(CONFIG, b" " * 51_000_000), "expected at most 50,000,000"),
    "configuration of a terabyte": (special(CONFIG, huge_file), "expected at most 200,000,000"),
    "pipe for a configuration": (special(CONFIG, os.mkfifo), "must be a file, but is a pipe"),
    "folder for a configuration": (special(CONFIG, os.mkdir), "must be a file, but is a folder"),
    "link to a configuration outside": (special(CONFIG, link_out), "is a link to .*secret, outside"),
    "device for a configuration": (special(CONFIG, lambda p: p.symlink_to("/dev/zero")), "but is a device"),
    "another model": (config_of(model_type="bert"), "must be one of MoE-LLaVA's"),
    "model type that is a list": (config_of(model_type=["moe_llava_phi"]), None),
    "width in words": (config_of(hidden_size="sixty-four"), None),
    "width of null": (config_of(hidden_size=None), None),
    "width of a half": (config_of(hidden_size=64.5), None),
    "negative width": (config_of(hidden_size=-64), None),
    "no width": (config_of(hidden_size=0), None),
    "width of 2^70": (config_of(hidden_size=2**70), None),
    "width of infinity": (settings(CONFIG, '{"model_type": "moe_llava_phi", "hidden_size": Infinity}'), None),
    "no heads": (config_of(num_attention_heads=0), None),
    "heads that do not divide": (config_of(num_attention_heads=7), None),
    "layers in words": (config_of(num_hidden_layers="4"), "has '4' as `num_hidden_layers`"),
    "endless layers": (config_of(num_hidden_layers=10**9), "has 1000000000 as `num_hidden_layers`"),
    "negative layers": (config_of(num_hidden_layers=-1), "has -1 as `num_hidden_layers`"),
    "more layers than tensors": (config_of(num_hidden_layers=999), "has 999 as `num_hidden_layers`"),
    "endless experts": (
        config_of(moe={"moe_layers_idx": [0, 2], "num_experts": [10**9, 10**9]}),
        "has 1000000000 as `num_experts`",
    ),
    "experts in words": (config_of(moe={"moe_layers_idx": [0], "num_experts": ["many"]}), "as `num_experts`"),
    "experts that are a number": (config_of(moe={"moe_layers_idx": 0, "num_experts": 4}), None),
    "experts of layers that are not": (config_of(moe={"moe_layers_idx": [99], "num_experts": [4]}), None),
    "mixture in words": (config_of(moe="sparse"), None),
    "vocabulary in words": (config_of(vocab_size="all"), None),
    "activation that is code": (config_of(hidden_act="__import__('os').system"), None),
    "activation that is a list": (config_of(hidden_act=[1]), None),
    "vision tower that is a number": (config_of(mm_image_tower=7), None),
    "vision tower that is a list": (config_of(mm_image_tower=["a"]), None),
    "vision tower elsewhere": (config_of(mm_image_tower="../../../etc"), None),
    "vision tower by an absolute path": (config_of(mm_image_tower="/etc"), None),
    "layer of features in words": (config_of(mm_vision_select_layer="last"), None),
    "layer of features that is not": (config_of(mm_vision_select_layer=-99), None),
    "dtype that is code": (config_of(torch_dtype="os"), None),
    # Of the vision tower
    "width of the tower in words": (tower_of(hidden_size="wide", vision_config={"hidden_size": "wide"}), None),
    "endless tower": (tower_of(num_hidden_layers=10**9, vision_config={"num_hidden_layers": 10**9}), None),
    "image of a kilometre": (tower_of(image_size=10**6, vision_config={"image_size": 10**6}), None),
    "patches of nothing": (tower_of(patch_size=0, vision_config={"patch_size": 0}), None),
    # Tokenizer and generation
    "no vocabulary": (lambda f: (f / "vocab.json").unlink(), None),
    "vocabulary of noise": (settings("vocab.json", bytes(range(256))), None),
    "vocabulary that is a list": (settings("vocab.json", "[1, 2]"), None),
    "vocabulary of words": (settings("vocab.json", '{"a": "b"}'), None),
    "vocabulary with a giant id": (settings("added_tokens.json", '{"x": 1000000000000}'), None),
    "link to a vocabulary outside": (special("vocab.json", link_out), "is a link to .*secret, outside"),
    "link to a template outside": (special("chat_template.jinja", link_out), "is a link to .*secret, outside"),
    "tokenizer settings of noise": (settings("tokenizer_config.json", bytes(range(256))), None),
    "tokenizer settings that are a list": (settings("tokenizer_config.json", "[]"), None),
    "generation settings of noise": (settings("generation_config.json", "{"), None),
    "generation settings that are a list": (settings("generation_config.json", "[]"), None),
    "pipe for generation settings": (special("generation_config.json", os.mkfifo), "but is a pipe"),
}


@pytest.fixture(scope="module", autouse=True)
def plain(tmp_path_factory):
    """The good release, converted. First of all, so that no hostile input is charged with imports."""
    folder = tmp_path_factory.mktemp("plain") / "checkpoint"
    release(folder)
    return convert_moe_llava_checkpoint(folder, folder.parent / "out", report=lambda line: None)


@pytest.mark.parametrize("changes", [{"vocab_size": 10**12}, {"lora": "much"}, {"auto_map": {"AutoConfig": "x.Y"}}])
def test_claims_that_nobody_believes(tmp_path, plain, changes):
    release(tmp_path / "checkpoint")
    config_of(**changes)(tmp_path / "checkpoint")
    output = convert_moe_llava_checkpoint(tmp_path / "checkpoint", tmp_path / "out", report=lambda line: None)
    for name in ("config.json", "model.safetensors"):
        assert (output / name).read_bytes() == (plain / name).read_bytes()


@pytest.mark.parametrize("case", CONVERTING)
def test_converting_refuses(tmp_path, case):
    build, message = CONVERTING[case]
    folder, output = tmp_path / "checkpoint", tmp_path / "out"
    release(folder)
    build(folder)
    before = sorted(path for path in tmp_path.rglob("*"))
    assert_quickly_refused(
        message or "", convert_moe_llava_checkpoint, folder, output, None, None, None, None, None, print
    )
    assert sorted(path for path in tmp_path.rglob("*")) == before
