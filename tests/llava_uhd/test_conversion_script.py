"""The conversion script: a converted release is the release, anything else is one clear error and leaves nothing."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, GenerationConfig

from llava_family.conversion import CheckpointReader, scripting, writing
from llava_family.llava_uhd.modeling_llava_uhd import LlavaUhdForConditionalGeneration
from llava_family.llava_uhd.processing_llava_uhd import LlavaUhdProcessor


ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "llava_uhd"
CLIP = FIXTURES / "clip_vision_tower"
# Where the release's config.json says that its vision tower lies; the real one is CLIP-L, which needs no such folder.
CLIP_IN_RELEASE = Path("pretrained_models") / "clip-vit-large-patch14-336"


def load_script():
    path = ROOT / "conversion_scripts" / "convert_llava_uhd_weights_to_hf.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def copy_release(folder):
    # File by file: the fixtures may be read-only.
    for source in (FIXTURES / "original_checkpoint").iterdir():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / source.name)
    (folder / CLIP_IN_RELEASE).mkdir(parents=True)
    shutil.copyfile(CLIP / "config.json", folder / CLIP_IN_RELEASE / "config.json")
    return folder


@pytest.fixture
def release(tmp_path):
    return copy_release(tmp_path / "release")


@pytest.fixture(scope="module")
def shared_release(tmp_path_factory):
    return copy_release(tmp_path_factory.mktemp("shared") / "release")


@pytest.fixture(scope="module")
def converted(shared_release):
    output = shared_release.parent / "converted"
    lines = []
    script.convert_llava_uhd_checkpoint(shared_release, output, report=lines.append)
    return output, lines


def tensors_of(folder):
    with CheckpointReader(folder) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_shard(folder, edit):
    """Applies `edit` to the tensors of the second shard and keeps the index in agreement."""
    name = "model-00002-of-00002.safetensors"
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name)
    index = folder / "model.safetensors.index.json"
    weight_map = {key: file for key, file in json.loads(index.read_text())["weight_map"].items() if file != name}
    index.write_text(json.dumps({"weight_map": weight_map | dict.fromkeys(tensors, name)}))


def assert_nothing_left(folder):
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_converted_equals_directly_loaded(shared_release, converted):
    output, lines = converted
    direct = LlavaUhdForConditionalGeneration.from_pretrained(shared_release)
    model, info = LlavaUhdForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == direct.dtype == torch.bfloat16
    expected, state_dict = direct.state_dict(), model.state_dict()
    assert expected.keys() == state_dict.keys() == tensors_of(output).keys()
    assert all(torch.equal(state_dict[name], tensor) for name, tensor in expected.items())
    assert lines[0].startswith("Vision tower: from the release's own shards")


def test_projector_is_that_of_the_shards(converted):
    stage_1 = torch.load(FIXTURES / "original_checkpoint" / "mm_projector.bin", weights_only=True)
    shards, written = tensors_of(FIXTURES / "original_checkpoint"), tensors_of(converted[0])
    name = "model.mm_projector.kv_proj.weight"
    assert torch.equal(written["model.resampler.kv_proj.weight"], shards[name])
    assert not torch.equal(written["model.resampler.kv_proj.weight"], stage_1[name])


def test_files(shared_release, converted):
    output = converted[0]
    assert {path.name for path in output.iterdir()} == {
        "model.safetensors",
        "conversion_manifest.json",
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    text = (output / "config.json").read_text()
    config = json.loads(text)
    assert config["architectures"] == ["LlavaUhdForConditionalGeneration"]
    assert [part["dtype"] for part in (config, config["text_config"], config["vision_config"])] == ["bfloat16"] * 3
    assert not any(quirk in text for quirk in ("mm_", "_name_or_path", "pretrained_models", "quantization"))
    assert not any("architectures" in config[part] for part in ("text_config", "vision_config"))
    generation_config = GenerationConfig.from_pretrained(output)
    assert (generation_config.temperature, generation_config.top_p, generation_config.max_length) == (0.9, 0.6, 4096)

    processor, original = LlavaUhdProcessor.from_pretrained(output), LlavaUhdProcessor.from_pretrained(shared_release)
    assert config["image_token_id"] == processor.image_token_id == original.image_token_id
    prompt = "USER: <image>\nWhat, now? ASSISTANT:"
    assert processor.tokenizer(prompt)["input_ids"] == original.tokenizer(prompt)["input_ids"]


def test_config_is_that_of_a_saved_model(shared_release, converted, tmp_path):
    model = LlavaUhdForConditionalGeneration.from_pretrained(shared_release)
    model.save_pretrained(tmp_path, save_original_format=False)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (converted[0], tmp_path))
    assert ours == theirs


def test_pickled_shards_convert_alike(release, converted, tmp_path):
    index = release / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    renamed = {file: f"pytorch_{file.removesuffix('safetensors')}bin" for file in set(weight_map.values())}
    for file, pickled in renamed.items():
        torch.save(load_file(release / file), release / pickled)
        (release / file).unlink()
    pickled_map = {name: renamed[file] for name, file in weight_map.items()}
    (release / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": pickled_map}))
    index.unlink()
    written = tensors_of(script.convert_llava_uhd_checkpoint(release, tmp_path / "out"))
    expected = tensors_of(converted[0])
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype(shared_release, converted, tmp_path, dtype):
    output = script.convert_llava_uhd_checkpoint(shared_release, tmp_path / "out", dtype=dtype)
    written, torch_dtype = tensors_of(output), getattr(torch, dtype)
    assert all(torch.equal(written[name], tensor.to(torch_dtype)) for name, tensor in tensors_of(converted[0]).items())
    assert {tensor.dtype for tensor in written.values()} == {torch_dtype}
    config = json.loads((output / "config.json").read_text())
    assert [part["dtype"] for part in (config, config["text_config"], config["vision_config"])] == [dtype] * 3
    assert LlavaUhdForConditionalGeneration.from_pretrained(output).dtype == torch_dtype


def full_clip_in_float32(folder):
    """A whole CLIP in one pickle, as OpenAI's release is, with other values than the shards have."""
    tensors = {name: tensor.float() + 1 / 3 for name, tensor in tensors_of(CLIP).items()}
    others = {"logit_scale": torch.tensor(1.0), "text_model.final_layer_norm.weight": torch.ones(4)}
    position_ids = {"vision_model.embeddings.position_ids": torch.arange(577)}
    torch.save(tensors | others | position_ids, folder / "pytorch_model.bin")
    vision_config = json.loads((CLIP / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision_config}))
    return tensors


def clip_of_transformers_5(folder):
    config = CLIPVisionConfig.from_pretrained(CLIP)
    CLIPVisionModel(config).float().save_pretrained(folder)
    names = load_file(folder / "model.safetensors")
    return {name if name.startswith("vision_model.") else f"vision_model.{name}": names[name] for name in names}


@pytest.mark.parametrize("make", [full_clip_in_float32, clip_of_transformers_5])
def test_vision_tower(shared_release, converted, tmp_path, make):
    (tmp_path / "clip").mkdir()
    clip = make(tmp_path / "clip")
    lines = []
    output = script.convert_llava_uhd_checkpoint(
        shared_release, tmp_path / "out", vision_tower=tmp_path / "clip", dtype="float32", report=lines.append
    )
    assert lines[0] == f"Vision tower: from {tmp_path / 'clip'}, not from the release's shards."
    written, shards = tensors_of(output), tensors_of(converted[0])
    assert written.keys() == shards.keys()
    for name, tensor in written.items():
        if name.startswith("model.vision_tower."):
            assert torch.equal(tensor, clip[name.replace("model.vision_tower.", "vision_model.")])
        else:
            assert torch.equal(tensor, shards[name].float())


def test_vision_tower_of_another_width(shared_release, tmp_path):
    config = CLIPVisionConfig.from_pretrained(CLIP, hidden_size=64)
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="has width 64"):
        script.convert_llava_uhd_checkpoint(shared_release, tmp_path / "out", vision_tower=tmp_path / "clip")
    assert not (tmp_path / "out").exists()


def remove_tensor(folder):
    edit_shard(folder, lambda tensors: tensors.pop("lm_head.weight"))


def add_tensor(folder):
    edit_shard(folder, lambda tensors: tensors.update({"model.mm_projector.extra": torch.zeros(2).bfloat16()}))


def reshape_tensor(folder):
    edit_shard(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(385, 256, dtype=torch.bfloat16)}))


def mix_dtypes(folder):
    edit_shard(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].float()}))


def truncate_shard(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lead_index_outside(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00002", "../model-00002-of-00002"))


def leave_stage_1(folder):
    for path in folder.glob("model*"):
        path.unlink()


def remove_weights(folder):
    leave_stage_1(folder)
    (folder / "mm_projector.bin").unlink()


BREAKAGES = {
    "missing tensor": (remove_tensor, r"1 target tensors without a source:\s+lm_head.weight"),
    "left-over tensor": (add_tensor, r"1 source tensors without a target:\s+model.mm_projector.extra"),
    "other shape": (reshape_tensor, r"lm_head.weight .*has shape \(385, 256\), expected \(384, 256\)"),
    "mixed dtypes": (mix_dtypes, "floating point tensors of 2 dtypes"),
    "truncated shard": (truncate_shard, "must be a complete safetensors file"),
    "index that leads outside": (lead_index_outside, "expected a plain file name"),
    "missing shard": (lambda f: (f / "model-00001-of-00002.safetensors").unlink(), "there is no such file"),
    "stage 1": (leave_stage_1, "output of the first training stage"),
    "no weights": (remove_weights, "has no weights"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "is no JSON"),
    "LLaVA-1.5": (lambda folder: edit_config(folder, mm_projector_type="mlp2x_gelu"), "'mlp2x_gelu'"),
    "other model": (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "'bert'"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], None),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_wrong_release_is_one_error_and_leaves_nothing(release, breakage):
    edit, message = BREAKAGES[breakage]
    edit(release)
    with pytest.raises((ValueError, OSError), match=message):
        script.convert_llava_uhd_checkpoint(release, release.parent / "out")
    assert_nothing_left(release)


def test_native_checkpoint_is_refused(converted, tmp_path):
    with pytest.raises(ValueError, match="It is converted already"):
        script.convert_llava_uhd_checkpoint(converted[0], tmp_path / "out")


def test_output_that_is_not_empty_is_refused_before_anything_else(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        script.convert_llava_uhd_checkpoint("owner/never-downloaded", tmp_path)


def test_mixed_dtypes_convert_to_a_chosen_one(release):
    mix_dtypes(release)
    output = script.convert_llava_uhd_checkpoint(release, release.parent / "out", dtype="bfloat16")
    assert {tensor.dtype for tensor in tensors_of(output).values()} == {torch.bfloat16}


@pytest.mark.parametrize("stage", ["weights", "processor"])
def test_interruption_leaves_what_a_rerun_goes_on_with(release, monkeypatch, stage, converted):
    output = release.parent / "out"

    def interrupt(*args, **kwargs):
        assert (output.parent / ".out.incomplete" / "conversion_manifest.json").exists()
        raise KeyboardInterrupt

    owner, name = (writing, "write_shard") if stage == "weights" else (LlavaUhdProcessor, "save_pretrained")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            script.convert_llava_uhd_checkpoint(release, release.parent / "out")
    assert not output.exists()
    assert (output.parent / ".out.incomplete" / "model.safetensors").exists() == (stage == "processor")
    script.convert_llava_uhd_checkpoint(release, release.parent / "out")
    assert sorted(path.name for path in output.parent.iterdir()) == ["out", release.name]
    expected = tensors_of(converted[0])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(output).items())


def test_push_to_hub(shared_release, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(scripting, "create_repo", lambda repo_id, exist_ok: calls.append((repo_id, exist_ok)))
    monkeypatch.setattr(scripting, "upload_folder", lambda **arguments: calls.append(arguments))
    output = script.convert_llava_uhd_checkpoint(shared_release, tmp_path / "out", push_to_hub="me/mine")
    assert calls[0] == ("me/mine", True)
    assert (calls[1]["repo_id"], calls[1]["folder_path"]) == ("me/mine", output)

    def refuse(*args, **kwargs):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(scripting, "create_repo", refuse)
    with pytest.raises(ValueError, match="complete in .*second, but could not be uploaded .* 401 Unauthorized"):
        script.convert_llava_uhd_checkpoint(shared_release, tmp_path / "second", push_to_hub="me/mine")
    assert (tmp_path / "second" / "config.json").exists()
    with pytest.raises(ValueError, match="Repo id"):
        script.convert_llava_uhd_checkpoint(shared_release, tmp_path / "third", push_to_hub="no repo!")


def test_command_line(shared_release, tmp_path, capsys):
    script.main(["--checkpoint", str(shared_release), "--output", str(tmp_path / "out")])
    assert f"to {tmp_path / 'out'}." in capsys.readouterr().out
    for arguments in (["--checkpoint", str(tmp_path), "--output", str(tmp_path / "other")], [], ["--dtype", "int8"]):
        with pytest.raises(SystemExit) as exit_info:
            script.main(arguments)
        assert exit_info.value.code == 2
    assert not (tmp_path / "other").exists()
