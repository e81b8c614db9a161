"""What an exported repository consists of, and what is refused."""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from llava_family.auto import FAMILIES
from llava_family.cli import app
from llava_family.hub import export, export_model

from .conftest import CASES, CLIP, MOE, PHI, QWEN, ROOT, UHD, uhd_with


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def quietly(*arguments, **options):
    return export_model(*arguments, **options, report=lambda line: None)


@pytest.fixture
def copied(tmp_path, checkpoints):
    """A copy of a case's checkpoint, to be spoilt."""

    def copy(name):
        shutil.copytree(checkpoints(name), tmp_path / "copied")
        (tmp_path / "copied").chmod(0o755)
        for path in (tmp_path / "copied").iterdir():
            path.chmod(0o644)
        return tmp_path / "copied"

    return copy


@pytest.mark.parametrize("name", CASES)
def test_auto_map_is_complete(name, repositories):
    folder = repositories(name)
    family = next(family for family in FAMILIES if family.model_type == CASES[name].family)
    config, processor = (read_json(folder / f"{part}.json") for part in ("config", "processor_config"))
    heads = dict.fromkeys(CASES[name].heads, f"modeling_{family.model_type}.{family.prefix}{family.head}")
    assert config["auto_map"] == {
        "AutoConfig": f"configuration_{family.model_type}.{family.prefix}Config",
        "AutoModel": f"modeling_{family.model_type}.{family.prefix}Model",
        **heads,
        "AutoProcessor": f"processing_{family.model_type}.{family.prefix}Processor",
        "AutoImageProcessor": {
            "pil": f"image_processing_pil_{family.model_type}.{family.prefix}ImageProcessorPil",
            "torchvision": f"image_processing_{family.model_type}.{family.prefix}ImageProcessor",
        },
    }
    assert (config["model_type"], config["architectures"]) == (family.model_type, [f"{family.prefix}{family.head}"])
    assert processor["auto_map"] == {"AutoProcessor": config["auto_map"]["AutoProcessor"]}
    nested = processor["image_processor"]["auto_map"]
    assert nested == {"AutoImageProcessor": config["auto_map"]["AutoImageProcessor"]}
    references = [*heads.values(), *config["auto_map"]["AutoImageProcessor"].values()]
    for reference in references:
        module, class_name = reference.split(".")
        assert f"class {class_name}(" in (folder / f"{module}.py").read_text(encoding="utf-8")
    assert "auto_map" not in read_json(folder / "tokenizer_config.json")
    for file in ("generation_config.json", "chat_template.jinja", "tokenizer.json", "README.md"):
        assert (folder / file).stat().st_size


@pytest.mark.parametrize("name", CASES)
def test_manifest_is_of_all_files(name, repositories):
    folder = repositories(name)
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "MANIFEST.sha256"], cwd=folder, check=True)
    listed = {line.split("  ", 1)[1] for line in (folder / "MANIFEST.sha256").read_text().splitlines()}
    assert listed == {path.name for path in folder.iterdir()} - {"MANIFEST.sha256"}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_the_checkpoints_own(name, repositories, checkpoints):
    folder, source = repositories(name), checkpoints(name)
    weights = {path.name for path in source.iterdir() if path.suffix == ".safetensors"}
    assert weights == {path.name for path in folder.iterdir() if path.suffix == ".safetensors"}
    for file in weights:
        digests = {hashlib.sha256((place / file).read_bytes()).digest() for place in (folder, source)}
        assert len(digests) == 1
        assert not os.path.samefile(folder / file, source / file)
    assert not list(folder.glob("*.bin"))


@pytest.mark.parametrize("name", CASES)
def test_no_path_of_this_machine_is_published(name, repositories, checkpoints):
    places = [str(ROOT), str(checkpoints(name)), str(repositories(name)), tempfile.gettempdir()]
    for path in repositories(name).iterdir():
        if path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8")
            assert not [place for place in places if place in text], path.name


def test_export_of_an_export_is_the_same(repositories, tmp_path):
    first = repositories("phi-converted")
    second = quietly(first, tmp_path / first.name)
    for path in first.iterdir():
        assert (second / path.name).read_bytes() == path.read_bytes(), path.name


def test_only_the_code_that_a_model_needs(repositories):
    names = {path.name for path in repositories("uhd-converted").glob("*.py")}
    assert names == {
        f"{kind}_llava_uhd.py"
        for kind in (
            "configuration",
            "image_processing",
            "image_processing_pil",
            "loading",
            "modeling",
            "pixels",
            "processing",
            "slicing",
            "weight_mapping",
        )
    }
    assert not list(repositories("phi-converted").glob("*mole*"))
    assert (repositories("uhd-mole") / "layers_llava_mole.py").is_file()
    assert (repositories("uhd-moe") / "auto_model.py").is_file()


def test_licence_of_the_code_and_notices_of_the_weights(copied, tmp_path):
    folder = copied("phi-converted")
    (folder / "LICENSE").write_text("of the weights")
    (folder / "NOTICE.txt").write_text("and a notice")
    (folder / "optimizer.pt").write_text("of no use to a reader")
    exported = quietly(folder, tmp_path / "out")
    assert (exported / "LICENSE").read_text() == "of the weights"
    assert (exported / "NOTICE.txt").read_text() == "and a notice"
    assert (exported / "LICENSE-CODE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert not (exported / "optimizer.pt").exists()


def test_links_out_of_the_checkpoint_are_not_published(copied, tmp_path):
    """A checkpoint of someone else must not name files of this machine."""
    (tmp_path / "secret").write_text("key")
    for name in ("LICENSE", "chat_template.jinja"):
        folder = copied("phi-converted")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "secret")
        with pytest.raises(ValueError, match=rf"{name}.* link to .*secret, outside the folder"):
            quietly(folder, tmp_path / "out")
        shutil.rmtree(folder)
        assert not (tmp_path / "out").exists()


def test_generation_configuration_is_kept_and_completed(copied, checkpoints, tmp_path):
    saved = read_json(checkpoints("uhd-original") / "generation_config.json")
    exported = quietly(checkpoints("uhd-original"), tmp_path / "uhd", vision_tower=CLIP)
    written = read_json(exported / "generation_config.json")
    assert {key: written[key] for key in saved if key != "transformers_version"}.items() <= written.items()
    assert written["temperature"] == saved["temperature"]
    folder = copied("phi-original")
    for place in ("from its file", "from the model's configuration"):
        exported = quietly(folder, tmp_path / place, vision_tower=phi_tower())
        written = read_json(exported / "generation_config.json")
        assert (written["eos_token_id"], written["pad_token_id"]) == (346, 354), place
        (folder / "generation_config.json").unlink(missing_ok=True)


def phi_tower():
    return MOE / PHI / "openai" / "clip-vit-tiny-patch14-56"


def spoil_config(**changes):
    def spoil(folder):
        config = {**read_json(folder / "config.json"), **changes}
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def drop_tensor(folder):
    index = read_json(folder / "model.safetensors.index.json")
    shards = set(index["weight_map"].values())
    (folder / "model.safetensors.index.json").unlink()
    for shard in shards:
        (folder / shard).unlink()
    save_file({"lm_head.weight": torch.zeros(2, 2)}, folder / "model.safetensors")


def truncate(folder):
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])


def add_tokens(folder):
    config = read_json(folder / "tokenizer_config.json")
    known = config["added_tokens_decoder"]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    known[str(max(map(int, known)) + 1)] = {"content": "<|new|>", **flags}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


SPOILT = {
    "unknown model": ("phi-converted", spoil_config(model_type="llava"), r"`model_type` in .*config.json is 'llava'"),
    "no model": ("phi-converted", spoil_config(model_type=None), r"must be LLaVA-UHD, MoE-LLaVA or LLaVA-MoLE"),
    "no config": ("phi-converted", lambda folder: (folder / "config.json").unlink(), r"has no config.json"),
    "no weights": ("phi-converted", lambda folder: (folder / "model.safetensors").unlink(), r"has no weights"),
    "truncated weights": ("phi-converted", truncate, r"must be a complete safetensors file"),
    "no tokenizer": ("phi-converted", lambda folder: (folder / "tokenizer.json").unlink(), r".+"),
    "LLaVA-1.5": ("uhd-original", spoil_config(mm_projector_type="mlp2x_gelu"), r"is not LLaVA-UHD's"),
    "more tokens": ("phi-original", add_tokens, r"has 356 tokens, but the model has embeddings of 355"),
    "other tensors": (
        "phi-original",
        drop_tensor,
        r"cannot be exported as it is\. .*convert it, and export",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_incomplete_checkpoints_are_refused_and_nothing_is_left(kind, copied, tmp_path):
    name, spoil, message = SPOILT[kind]
    folder = copied(name)
    spoil(folder)
    tower = {"phi-original": phi_tower(), "uhd-original": CLIP}.get(name)
    with pytest.raises((ValueError, OSError), match=message):
        quietly(folder, tmp_path / "out", vision_tower=tower)
    assert [path.name for path in tmp_path.iterdir()] == ["copied"]


def test_pickles_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"are pickles \(pytorch_model.bin.index.json\).*conversion_scripts/"):
        quietly(MOE / QWEN / "original_checkpoint", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_vision_tower_is_for_originals(checkpoints, tmp_path):
    with pytest.raises(ValueError, match=r"`vision_tower` \(`--vision-tower`\) is for checkpoints of the original"):
        quietly(checkpoints("uhd-converted"), tmp_path / "out", vision_tower=CLIP)
    with pytest.raises(ValueError, match=r"Pass `mm_vision_tower`"):
        quietly(UHD / "original_checkpoint", tmp_path / "out")


def test_foreign_output_is_refused(checkpoints, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"must be a new or empty folder, but .* is not empty"):
        quietly(checkpoints("phi-converted"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'./no/such' is neither a folder nor"):
        quietly("./no/such", tmp_path / "out")


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_nothing_is_left_after_an_error(checkpoints, tmp_path, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(export, "_write_manifest", fail)
    with pytest.raises(type(error)):
        quietly(checkpoints("phi-converted"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_full_disk_is_refused_beforehand(checkpoints, tmp_path, monkeypatch):
    checkpoint = checkpoints("phi-converted")  # which needs room itself when it is made
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 60_000))
    with pytest.raises(ValueError, match=r"needs \d+ MB, but the disk of .* has 0 MB left"):
        quietly(checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_upload_is_of_the_finished_folder(checkpoints, tmp_path, monkeypatch):
    uploads, lines = [], []
    monkeypatch.setattr(export, "upload", lambda *arguments: uploads.append((*arguments, len(os.listdir(tmp_path)))))
    options = {"push_to_hub": "someone/some-model", "report": lines.append}
    folder = export_model(checkpoints("phi-converted"), tmp_path / "out", **options)
    assert uploads == [(folder, "someone/some-model", 1)]
    assert lines[-1] == "Uploaded to https://huggingface.co/someone/some-model."
    assert 'from_pretrained("someone/some-model", trust_remote_code=True)' in (folder / "README.md").read_text()


def test_wrong_repository_names_are_refused_first(tmp_path):
    with pytest.raises(ValueError, match=r"bad//name"):
        quietly("./no/such", tmp_path / "out", push_to_hub="bad//name")


def test_command(checkpoints, tmp_path):
    arguments = ["export", str(UHD / "original_checkpoint"), str(tmp_path / "out"), "--vision-tower", str(CLIP)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Card: a generic one" in result.output
    assert "parameters, in the original's layout, to" in result.output
    assert (tmp_path / "out" / "MANIFEST.sha256").is_file()
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert again.stderr.startswith("Error: The output must be a new or empty folder")


def test_text_model_of_a_family_keeps_its_kernels(tmp_path):
    """transformers decides by the text of the file whether experts' kernels can be chosen."""
    exported = quietly(uhd_with("moe_llava_stablelm_text")(tmp_path / "checkpoint"), tmp_path / "out")
    assert "@use_experts_implementation" in (exported / "modeling_moe_llava.py").read_text()
    source = (exported / "auto_model.py").read_text()
    assert 'config.model_type == "moe_llava_stablelm_text"' in source
    assert "from .modeling_moe_llava import MoeLlavaStableLmModel" in source


def test_files_are_found_in_an_installed_package(tmp_path, monkeypatch):
    """`setup.py` puts them beside the code; run from the repository, they are at its top."""
    from llava_family.hub import cards

    assert cards.package_file("LICENSE") == Path(ROOT / "LICENSE")
    monkeypatch.setattr(cards, "HERE", tmp_path)
    (tmp_path / "LICENSE").touch()
    assert cards.package_file("LICENSE") == tmp_path / "LICENSE"
