"""`llava-family convert` and `verify`: any family by its files, what becomes of every tensor, and every difference."""

import json
import os
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llava_family.cli import app
from llava_family.conversion.manifest import MANIFEST_FILE
from llava_family.converters.choosing import find_family


ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
MOLE = FIXTURES / "llava_mole" / "original_checkpoint"
ORIGINALS = {
    "llava_uhd": FIXTURES / "llava_uhd" / "original_checkpoint",
    "moe_llava": FIXTURES / "moe_llava" / "phi_clip336" / "original_checkpoint",
    "llava_mole": MOLE / "llava_mole_r16_a32_e3.pt",
}
OPTIONS = {
    "llava_uhd": {"vision_tower": FIXTURES / "llava_uhd" / "clip_vision_tower"},
    "moe_llava": {},
    "llava_mole": {"vicuna": MOLE / "vicuna-7b-v1.5", "clip": MOLE / "clip-vit-large-patch14-336"},
}


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout + result.stderr


def options_of(family, **others):
    options = OPTIONS[family] | others
    return [argument for name, value in options.items() for argument in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module", params=ORIGINALS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def converted(family, tmp_path_factory):
    output = tmp_path_factory.mktemp(family) / "out"
    code, printed = run("convert", "--checkpoint", ORIGINALS[family], "--output", output, *options_of(family))
    assert code == 0 and f"to {output}." in printed
    return output


@pytest.fixture
def moe_llava(tmp_path):
    """A converted MoE-LLaVA to be changed."""
    code, _ = run("convert", "--checkpoint", ORIGINALS["moe_llava"], "--output", tmp_path / "out")
    assert code == 0
    return tmp_path / "out"


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_family_is_found(family):
    assert find_family(ORIGINALS[family]) == family


def test_same_as_the_script(family, converted, tmp_path):
    script = runpy.run_path(str(ROOT / "conversion_scripts" / f"convert_{family}_weights_to_hf.py"))
    expected = script[f"convert_{family}_checkpoint"](ORIGINALS[family], tmp_path / "out", **OPTIONS[family])
    assert {path.name: path.read_bytes() for path in converted.iterdir()} == {
        path.name: path.read_bytes() for path in expected.iterdir()
    }


def test_verify(family, converted):
    code, printed = run("verify", ORIGINALS[family], converted, *options_of(family))
    assert code == 0 and "Equal: every tensor, bit by bit.\n" in printed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_verify_in_the_dtype_of_the_output(family, tmp_path, dtype):
    arguments = ["--checkpoint", ORIGINALS[family], "--output", tmp_path / "out", *options_of(family, dtype=dtype)]
    assert run("convert", *arguments)[0] == 0
    code, printed = run("verify", ORIGINALS[family], tmp_path / "out", *options_of(family))
    assert code == 0 and f"Compared in {dtype}" in printed


def test_dry_run_tells_what_becomes_of_every_tensor(family, tmp_path, monkeypatch, converted):
    monkeypatch.chdir(tmp_path)
    code, printed = run("convert", "--checkpoint", ORIGINALS[family], "--dry-run", *options_of(family))
    assert code == 0 and not list(tmp_path.iterdir())
    rows = re.findall(r"^(\w+) +(\d+) x  (.*)$", printed, re.MULTILINE)
    total = re.search(
        r"^Total: (\d+) tensors of the original \((.*)\) become (\d+) tensors, ([\d,]+) par", printed, re.M
    )
    manifest = json.loads((converted / MANIFEST_FILE).read_text())
    written = [name for shard in manifest["shards"].values() for name in shard["tensors"]]
    assert int(total[3]) == len(written)
    assert int(total[1]) == sum(int(number) for number in re.findall(r"(\d+) \w+", total[2]))
    tensors = load_file(converted / "model.safetensors")
    assert int(total[4].replace(",", "")) == sum(tensor.numel() for tensor in tensors.values())
    if family == "llava_uhd":
        assert ("split", "1", "model.mm_projector.attn.in_proj_weight") in [
            (kind, count, names.partition(" -> ")[0]) for kind, count, names in rows
        ]
    if family == "moe_llava":
        experts = "model.layers.*.mlp.deepspeed_moe.experts.deepspeed_experts.*.fc2.weight"
        assert ("merged", "2", f"{experts} -> model.language_model.layers.*.mlp.experts.down_proj") in rows
        assert ("renamed", "1", "model.final_layernorm.bias -> model.language_model.final_layernorm.bias") in rows


def test_dry_run_tells_what_is_ignored_and_why(tmp_path):
    original = MOLE.with_name("original_checkpoint_full") / "llava_mole_r16_a32_e3.pt"
    code, printed = run("convert", "--checkpoint", original, "--dry-run", *options_of("llava_mole"))
    line = "ignored       1 x  in_adaptor.text_embed.weight: a second name of the text model's embeddings"
    assert code == 0 and line in printed


def nan(tensors):
    tensors["lm_head.weight"][0, 0] = float("nan")


def test_weights_that_are_not_finite(tmp_path):
    """Of a whole command: refused, and nothing is left, unless they are asked for."""
    shutil.copytree(ORIGINALS["llava_uhd"], tmp_path / "original")
    for file in (tmp_path / "original").glob("*.safetensors"):
        tensors = load_file(file)
        if "lm_head.weight" in tensors:
            nan(tensors)
            save_file(tensors, file, metadata={"format": "pt"})
    arguments = ["--checkpoint", tmp_path / "original", "--output", tmp_path / "out", *options_of("llava_uhd")]
    code, printed = run("convert", *arguments)
    assert code and "1 in lm_head.weight" in " ".join(printed.split()) and not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["original"]
    code, printed = run("convert", *arguments, "--allow-nan")
    assert code == 0 and "They were kept." in printed and (tmp_path / "out" / "config.json").exists()


DIFFERENCES = {
    "one bit": (
        lambda t: t["lm_head.weight"].view(torch.int16)[3, 5].bitwise_xor_(1),
        r"^lm_head.weight: 1 of 22,720 values differ, by up to [\d.e-]+\.$",
    ),
    "NaN": (nan, "^lm_head.weight: 1 of 22,720 values differ, by up to nan.$"),
    "missing": (lambda t: t.pop("lm_head.weight"), "^lm_head.weight: missing.$"),
    "unexpected": (
        lambda t: t.update(backdoor=torch.zeros(2)),
        "^backdoor: unexpected, the original makes no such tensor.$",
    ),
    "shape": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-1].clone()}),
        r"^lm_head.weight: shape \(354, 64\) and torch.bfloat16, expected \(355, 64\) and torch.bfloat16.$",
    ),
    "integers": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].int()}),
        r"^lm_head.weight: shape \(355, 64\) and torch.int32, expected",
    ),
    "swapped experts": (
        lambda t: t.update(
            {
                "model.language_model.layers.0.mlp.experts.up_proj": t[
                    "model.language_model.layers.0.mlp.experts.up_proj"
                ].flip(0)
            }
        ),
        r"^model.language_model.layers.0.mlp.experts.up_proj: [\d,]+ of 32,768 values differ",
    ),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_verify_tells_what_differs(moe_llava, difference):
    change, line = DIFFERENCES[difference]
    edit(moe_llava, change)
    code, printed = run("verify", ORIGINALS["moe_llava"], moe_llava)
    assert code == 1 and "\n1 tensors differ.\n" in printed
    assert re.search(line, printed, re.MULTILINE)


def test_verify_sees_the_sign_of_zero(moe_llava, tmp_path):
    def zeros(value):
        return lambda tensors: tensors["model.final_layernorm.bias"].fill_(value)

    original = tmp_path / "original"
    shutil.copytree(ORIGINALS["moe_llava"].parent, original)
    original /= "original_checkpoint"
    files = {path: load_file(path) for path in original.glob("model*.safetensors")}
    for path, tensors in files.items():
        if "model.final_layernorm.bias" in tensors:
            zeros(0.0)(tensors)
            save_file(tensors, path)
    edit(moe_llava, lambda tensors: tensors["model.language_model.final_layernorm.bias"].fill_(-0.0))
    code, printed = run("verify", original, moe_llava)
    assert code == 1 and "final_layernorm.bias: the same values in other bits" in printed


def test_verify_takes_the_options_of_the_conversion(tmp_path):
    original = tmp_path / "renamed.pt"
    shutil.copyfile(ORIGINALS["llava_mole"], original)
    settings = [*options_of("llava_mole", lora_alpha=8, routing="top1"), "--merge-attention-lora"]
    assert run("convert", "--checkpoint", original, "--output", tmp_path / "out", *settings)[0] == 0
    code, printed = run("verify", original, tmp_path / "out", *options_of("llava_mole"))
    assert code == 0
    assert (
        "Options of the conversion, by its manifest: lora_alpha 8, routing top1, merge_attention_lora True" in printed
    )
    code, printed = run("verify", original, tmp_path / "out", *options_of("llava_mole", lora_alpha=16))
    assert code == 1 and "12 tensors differ" in printed
    (tmp_path / "out" / MANIFEST_FILE).unlink()
    code, printed = run("verify", original, tmp_path / "out", *options_of("llava_mole"))
    assert code == 1 and "Nothing in" in printed and "`--lora-alpha`" in printed


@pytest.mark.parametrize(
    ("checkpoint", "options", "message"),
    [
        ("moe_llava", ["--vicuna", "x"], "is of the family moe_llava, whose conversion does not have `--vicuna`"),
        ("llava_uhd", ["--lora-alpha", "3"], "whose conversion does not have `--lora-alpha`"),
        ("llava_mole", [], "is of the family llava_mole, whose conversion needs `--vicuna`, `--clip`"),
        ("moe_llava", ["--dtype", "int8"], "`dtype` must be one of float32, float16, bfloat16, but is 'int8'"),
        ("moe_llava", ["--base", "nowhere"], "neither a folder nor the id of a Hub repository|first training stage"),
        (MOLE / "vicuna-7b-v1.5", [], "must be LLaVA-UHD's, .* MoE-LLaVA's, .* LLaVA-MoLE training, but .*'llama'"),
        (ROOT / "tests", [], "has no config.json"),
        ("nowhere/at/all", [], "neither a folder nor the id of a Hub repository"),
    ],
)
def test_wrong_arguments(tmp_path, checkpoint, options, message):
    path = ORIGINALS.get(checkpoint, checkpoint)
    code, printed = run("convert", "--checkpoint", path, "--output", tmp_path / "out", *options)
    assert code == 1 and re.search(message, " ".join(printed.split()))
    assert not list(tmp_path.iterdir())


def test_output_is_needed(tmp_path):
    code, printed = run("convert", "--checkpoint", ORIGINALS["moe_llava"])
    assert code == 1 and "`--output` is missing" in printed


def test_converted_already(moe_llava, tmp_path):
    code, printed = run("convert", "--checkpoint", moe_llava, "--output", tmp_path / "again")
    assert code == 1 and "It is converted already." in printed


@pytest.mark.parametrize("manifest", ["{", '{"format": 1}', "[]"])
def test_verify_with_a_broken_manifest(moe_llava, manifest):
    (moe_llava / MANIFEST_FILE).write_text(manifest)
    code, printed = run("verify", ORIGINALS["moe_llava"], moe_llava)
    assert code == 1 and "must be the manifest of a conversion" in printed


@pytest.mark.slow
def test_benchmark_runs(tmp_path):
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "conversion.py"))
    record = benchmark["measure"](tmp_path, benchmark["QUICK_SIZE"], 1, 4_000_000)
    assert record["written_bytes"] > 10_000_000 and record["peak_bytes"] > 0
    assert len(record["speeds"]) == 1 and not os.path.exists(tmp_path / "convert")
