"""The way back: every golden, converted and restored, equals the original's file tensor by tensor."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_family import LlavaUhdForConditionalGeneration, MoeLlavaConfig, MoeLlavaForCausalLM
from llava_family.conversion import CheckpointReader, plan_conversion
from llava_family.conversion.restoring import restore_checkpoint
from llava_family.moe_llava.weight_mapping_moe_llava import original_weight_mapping


ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
MOE_VARIANTS = ("phi_clip336", "stablelm_clip336", "qwen_clip336", "stablelm_siglip384")
MOLE = FIXTURES / "llava_mole" / "original_checkpoint"
MOLE_FILES = {
    "mole_trained": MOLE / "llava_mole_r16_a32_e3.pt",
    "mole_full": FIXTURES / "llava_mole" / "original_checkpoint_full" / "llava_mole_r16_a32_e3.pt",
}
FOLDERS = ("uhd", *MOE_VARIANTS)
GOLDENS = (*FOLDERS, *MOLE_FILES)
# What only an original has: tensors that are left out, and rows of these two
LEFT_OUT = {"uhd": 18}
VOCABULARY = ("lm_head.weight", "embed_tokens.weight", "wte.weight")


def quiet(line):
    pass


def script(family):
    path = ROOT / "conversion_scripts" / f"convert_{family}_weights_to_hf.py"
    return runpy.run_path(str(path))[f"convert_{family}_checkpoint"]


def convert(original, output, **kwargs):
    if original.is_file():
        kwargs = {"dtype": "float32", **kwargs}
        parts = {"vicuna": MOLE / "vicuna-7b-v1.5", "clip": MOLE / "clip-vit-large-patch14-336"}
        return script("llava_mole")(original, output, report=quiet, **parts, **kwargs)
    family = "llava_uhd" if "mm_vision_tower" in (original / "config.json").read_text() else "moe_llava"
    return script(family)(original, output, report=quiet, **kwargs)


def read_all(path):
    path = Path(path)
    reader = CheckpointReader(path.parent, path.name, "state_dict") if path.is_file() else CheckpointReader(path)
    with reader:
        return {name: reader.read(name).clone() for name in reader.tensors}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def output_of(name, folder):
    return folder / (f"{name}_r16_a32_e3.pt" if name in MOLE_FILES else name)


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """The goldens' originals, which name their vision towers by absolute paths, so that they load from anywhere."""
    places = dict(MOLE_FILES)
    parent = tmp_path_factory.mktemp("originals")
    for name in FOLDERS:
        source = FIXTURES / "llava_uhd" if name == "uhd" else FIXTURES / "moe_llava" / name
        places[name] = shutil.copytree(source / "original_checkpoint", parent / name)
        config = json.loads((places[name] / "config.json").read_text())
        if name == "uhd":
            config["mm_vision_tower"] = str(source / "clip_vision_tower")
        else:
            config["mm_image_tower"] = str(source / config["mm_image_tower"])
        (places[name] / "config.json").write_text(json.dumps(config))
    return places


@pytest.fixture(scope="session")
def converted(originals, tmp_path_factory):
    parent = tmp_path_factory.mktemp("converted")
    return {name: convert(originals[name], parent / name) for name in GOLDENS}


@pytest.mark.parametrize("name", GOLDENS)
def test_round_trip_is_bit_equal(name, originals, converted, tmp_path):
    output = output_of(name, tmp_path)
    assert restore_checkpoint(converted[name], output, originals[name], report=quiet) == output
    assert_equal(read_all(output), read_all(originals[name]))


@pytest.mark.parametrize("name", GOLDENS)
def test_without_the_original_only_what_the_conversion_left_out_is_missing(name, originals, converted, tmp_path):
    output = output_of(name, tmp_path)
    restore_checkpoint(converted[name], output, report=quiet)
    expected, found = read_all(originals[name]), read_all(output)
    missing = expected.keys() - found.keys()
    assert len(missing) == LEFT_OUT.get(name, 0)
    # A file of trained tensors alone becomes one of the whole model, which the original reads as well.
    assert found.keys() - expected.keys() == set() or name == "mole_trained"
    for tensor in expected.keys() - missing:
        rows = len(found[tensor]) if name in MOE_VARIANTS and tensor.endswith(VOCABULARY) else len(expected[tensor])
        assert torch.equal(found[tensor].to(expected[tensor].dtype), expected[tensor][:rows]), tensor


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDENS)
def test_changed_weights_come_back(name, originals, converted, tmp_path):
    """No value is the original's: what was trained meanwhile is restored, and converts to the same again."""
    changed = shutil.copytree(converted[name], tmp_path / "changed")
    generator = torch.Generator().manual_seed(0)
    # Of the digits that all dtypes have
    trained = {
        key: torch.randn(tensor.shape, generator=generator).half().bfloat16().to(tensor.dtype)
        for key, tensor in load_file(changed / "model.safetensors").items()
    }
    save_file(trained, changed / "model.safetensors", metadata={"format": "pt"})
    output = restore_checkpoint(changed, output_of(name, tmp_path), originals[name], report=quiet)
    before, after = read_all(originals[name]), read_all(output)
    again = read_all(convert(output, tmp_path / "again"))
    if name == "mole_trained":
        # The rest is the language model's and the vision tower's, which this file does not have.
        trained = {key: tensor for key, tensor in trained.items() if "mole_" in key or "_projector" in key}
        again = {key: again[key] for key in trained}
    assert_equal(again, trained)
    assert sum(torch.equal(after[key], tensor) for key, tensor in before.items()) == LEFT_OUT.get(name, 0)
    if name in MOE_VARIANTS:
        rows = len(trained["lm_head.weight"])
        assert torch.equal(after["lm_head.weight"][rows:], before["lm_head.weight"][rows:])


@pytest.mark.parametrize("name", FOLDERS)
def test_a_restored_folder_loads_as_the_original_does(name, originals, converted, tmp_path):
    output = restore_checkpoint(converted[name], tmp_path / "restored", originals[name], report=quiet)
    copied = {path.name for path in originals[name].iterdir() if path.suffix not in (".bin", ".safetensors")}
    copied = {file for file in copied if not file.endswith(".index.json")}
    assert {path.name for path in output.iterdir()} == copied | {"model.safetensors"}
    model_class = LlavaUhdForConditionalGeneration if name == "uhd" else MoeLlavaForCausalLM
    models = [model_class.from_pretrained(folder).eval() for folder in (originals[name], output)]
    input_ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = [model(input_ids=input_ids).logits for model in models]
    assert torch.equal(*logits)
    assert_equal(models[1].state_dict(), models[0].state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("save_original_format", [None, True, False])
def test_a_directly_loaded_original_survives_being_saved(name, save_original_format, originals, tmp_path):
    """LLaVA-UHD is saved in the original's layout by default, as transformers does; MoE-LLaVA never is."""
    model_class = LlavaUhdForConditionalGeneration if name == "uhd" else MoeLlavaForCausalLM
    model = model_class.from_pretrained(originals[name])
    arguments = {} if save_original_format is None else {"save_original_format": save_original_format}
    model.save_pretrained(tmp_path, **arguments)
    names = read_all(tmp_path).keys()
    in_original_layout = name == "uhd" and save_original_format is not False
    assert any("mm_projector" in key for key in names) == in_original_layout
    if in_original_layout:
        expected = read_all(originals[name])
        saved = read_all(tmp_path)
        assert len(expected) == len(saved) + LEFT_OUT[name]
        assert_equal(saved, {key: expected[key] for key in saved})
    assert_equal(model_class.from_pretrained(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("backbone", ["phi", "stablelm", "qwen2", "llama", "mistral"])
@pytest.mark.parametrize("moe", [{"moe_layers": [0], "use_residual": True}, {"moe_layers": []}])
def test_layouts_of_other_backbones_and_stages_convert_to_the_same_again(backbone, moe, tmp_path):
    """There are no goldens of these: dense models of the second stage, residual experts, Llama and Mistral."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"model_type": f"moe_llava_{backbone}_text", "num_key_value_heads": 4, "vocab_size": 64, **sizes, **moe}
    vision = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **sizes}
    model = MoeLlavaForCausalLM(MoeLlavaConfig(text_config=text, vision_config=vision))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "native")
    output = restore_checkpoint(tmp_path / "native", tmp_path / "restored", report=quiet)
    with CheckpointReader(output) as reader:
        expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        plan = plan_conversion(reader.tensors, original_weight_mapping(), expected, model=model)
        again = {key: tensor for step in plan.steps for key, tensor in step.convert(reader.read).items()}
        names = " ".join(reader.tensors)
    assert_equal(again, model.state_dict())
    layer, dense = (" transformer.h.", "w2") if backbone == "qwen2" else (" model.layers.", "gate_proj")
    dense = "fc1" if backbone == "phi" else dense
    assert f"{layer}1.mlp.{dense}.weight" in f" {names}"
    if moe["moe_layers"]:
        assert f"{layer}0.mlp.mlp.{dense}.weight" in names and f"{layer}0.mlp.coefficient.weight" in names
        assert f"{layer}0.mlp.deepspeed_moe.experts.deepspeed_experts.3.{dense}.weight" in names


@pytest.mark.slow
def test_digits_that_a_conversion_rounded_stay_so_and_this_is_said(tmp_path):
    tensors = torch.load(MOLE_FILES["mole_trained"], weights_only=True)["state_dict"]
    tensors["in_adaptor.projector.0.bias"] += 1 / 3
    original = tmp_path / "llava_mole_r16_a32_e3.pt"
    torch.save({"state_dict": tensors}, original)
    lines = []
    rounded = convert(original, tmp_path / "bfloat16", dtype=None)
    found = read_all(restore_checkpoint(rounded, tmp_path / "rounded.pt", original, report=lines.append))
    assert any(line.startswith("Rounded: 6 tensors (in_adaptor.") and "float32" in line for line in lines)
    bias = tensors["in_adaptor.projector.0.bias"]
    assert torch.equal(found["in_adaptor.projector.0.bias"], bias.bfloat16().float())
    exact = convert(original, tmp_path / "float32")
    lines.clear()
    assert_equal(read_all(restore_checkpoint(exact, tmp_path / "exact.pt", original, report=lines.append)), tensors)
    assert not any(line.startswith("Rounded") for line in lines)


@pytest.mark.parametrize("change", ["no_base_layer", "wrapped"])
def test_names_are_those_of_the_original_at_hand(change, tmp_path):
    tensors = torch.load(MOLE_FILES["mole_full"], weights_only=True)["state_dict"]
    if change == "wrapped":
        tensors = {f"module.{key}": tensor for key, tensor in tensors.items()}
    else:  # as PEFT before 0.7 names it
        tensors = {key.replace(".base_layer.", "."): tensor for key, tensor in tensors.items()}
    original = tmp_path / "llava_mole_r16_a32_e3.pt"
    torch.save({"state_dict": tensors}, original)
    folder = convert(original, tmp_path / "converted")
    assert_equal(read_all(restore_checkpoint(folder, tmp_path / "restored.pt", original, report=quiet)), tensors)


def test_a_torch_file_holds_no_more_than_its_tensors(converted, tmp_path):
    output = restore_checkpoint(converted["mole_full"], tmp_path / "whole.pt", report=quiet)
    loaded = torch.load(output, weights_only=True)
    assert set(loaded) == {"state_dict"}
    # Each with memory of its own, also the second name of the embeddings, and parts of packed experts
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in loaded["state_dict"].values())
    assert len({tensor.data_ptr() for tensor in loaded["state_dict"].values()}) == len(loaded["state_dict"])


def test_report(originals, converted, tmp_path):
    lines = {}
    for name in ("uhd", "phi_clip336", "mole_trained"):
        lines[name] = []
        restore_checkpoint(converted[name], output_of(name, tmp_path), originals[name], report=lines[name].append)
    assert lines["uhd"][0] == "From the original: 18 tensors, the image features are taken below it."
    assert lines["phi_clip336"][0] == "From the original: rows behind the tokenizer's vocabulary, of 2 tensors."
    assert lines["mole_trained"][0].startswith("Left out: 86 tensors that the original does not have (llm_model.")
    alone = []
    restore_checkpoint(converted["uhd"], tmp_path / "alone", report=alone.append)
    assert "only `original` (`--original`)" in alone[0] and "Configuration and tokenizer" in alone[-1]


def test_adapters_that_were_merged_are_refused(originals, tmp_path):
    merged = convert(originals["mole_trained"], tmp_path / "merged", merge_attention_lora=True)
    with pytest.raises(ValueError, match="24 adapters of `original`.*were merged, and cannot come back"):
        restore_checkpoint(merged, tmp_path / "restored.pt", originals["mole_trained"], report=quiet)
    # Without it, weights have what the adapters added, under names as if there were adapters: these add nothing then.
    found = read_all(restore_checkpoint(merged, tmp_path / "restored.pt", report=quiet))
    name = "llm_model.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    expected = load_file(merged / "model.safetensors")["model.language_model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(found[name], expected)
    assert not any(".default." in key for key in found)


def wrong_originals(originals, tmp_path):
    """Pairs of a golden and what is not its original."""
    extra = shutil.copytree(originals["uhd"], tmp_path / "extra")
    tensors = {"model.vision_tower.vision_tower.vision_model.stray": torch.zeros(2), **read_all(extra)}
    for path in extra.glob("model*"):
        path.unlink()
    save_file(tensors, extra / "model.safetensors")
    shape = shutil.copytree(extra, tmp_path / "shape")
    del tensors["model.vision_tower.vision_tower.vision_model.stray"]
    save_file(tensors | {"model.norm.weight": torch.zeros(255)}, shape / "model.safetensors")
    small = shutil.copytree(originals["phi_clip336"], tmp_path / "small")
    for path in small.glob("model*"):
        path.unlink()
    tensors = read_all(originals["phi_clip336"])
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"][:350].clone()}, small / "model.safetensors")
    return {
        "other": ("stablelm_clip336", originals["phi_clip336"], "tensors of the model are not in"),
        "extra": ("uhd", extra, "1 tensors of `original` .`--original`. are not in the model"),
        "shape": ("uhd", shape, "have another shape than the model's:\n  model.norm.weight .255,., not .256,."),
        "fewer_rows": ("phi_clip336", small, "another shape than the model's:\n  lm_head.weight .350"),
        "missing": ("uhd", tmp_path / "nowhere", "nowhere"),
    }


@pytest.mark.parametrize("case", ["other", "extra", "shape", "fewer_rows", "missing"])
def test_another_original_is_refused_and_nothing_left(case, originals, converted, tmp_path):
    name, original, message = wrong_originals(originals, tmp_path)[case]
    before = set(tmp_path.iterdir())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        restore_checkpoint(converted[name], tmp_path / "restored", original, report=quiet)
    assert set(tmp_path.iterdir()) == before


def test_values_that_the_originals_dtype_cannot_hold_are_refused(tmp_path):
    tensors = torch.load(MOLE_FILES["mole_trained"], weights_only=True)["state_dict"]
    original = tmp_path / "llava_mole_r16_a32_e3.pt"
    torch.save({"state_dict": {key: tensor.half() for key, tensor in tensors.items()}}, original)
    folder = convert(original, tmp_path / "converted")
    weights = load_file(folder / "model.safetensors")
    weights["model.multi_modal_projector.linear_1.bias"][0] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="'in_adaptor.projector.0.bias' has values up to 1e.06, too large for.*float16"
    ):
        restore_checkpoint(folder, tmp_path / "restored.pt", original, report=quiet)
    assert {path.name for path in tmp_path.iterdir()} == {original.name, "converted"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("uhd", {"resampler_type": "perceiver"}, "a `spatial` resampler, but this model has 'llama' and 'perceiver'"),
        ("phi_clip336", {"vision_encoding": "slices"}, "but this model has 'moe_llava_phi_text' and 'slices'"),
        ("mole_full", {"vision_encoding": "slices"}, "but this model has 'llava_mole_text' and 'slices'"),
        ("uhd", {"model_type": "llama"}, "must be a converted one.*config.json has 'llama'"),
        ("uhd", None, "must be a converted one.*config.json has 'llava_llama'"),
    ],
)
def test_models_that_the_original_code_does_not_have_are_refused(
    name, change, message, originals, converted, tmp_path
):
    folder = shutil.copytree(converted[name] if change else originals[name], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | (change or {})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        restore_checkpoint(folder, output_of(name, tmp_path), report=quiet)


def test_tensors_without_a_name_in_the_original_are_refused(converted, tmp_path):
    folder = shutil.copytree(converted["uhd"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors") | {"model.adapter.weight": torch.zeros(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors that the original has no name for:\n  model.adapter.weight"):
        restore_checkpoint(folder, tmp_path / "restored", report=quiet)


@pytest.mark.parametrize("name", ["uhd", "mole_full"])
def test_outputs_that_exist_are_refused(name, converted, tmp_path):
    output = output_of(name, tmp_path)
    if name == "uhd":
        output.mkdir()
        (output / "mine.txt").touch()
    else:
        output.touch()
        with pytest.raises(ValueError, match="does not end in .pt"):
            restore_checkpoint(converted[name], tmp_path / "folder", report=quiet)
    with pytest.raises(ValueError, match="The output must be a new"):
        restore_checkpoint(converted[name], output, report=quiet)


def test_settings_that_lie_elsewhere_are_not_copied(originals, converted, tmp_path):
    original = shutil.copytree(originals["uhd"], tmp_path / "original")
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (original / "tokenizer_config.json").unlink()
    (original / "tokenizer_config.json").symlink_to(secret)
    with pytest.raises(ValueError, match=r"link to .*secret\.json"):
        restore_checkpoint(converted["uhd"], tmp_path / "restored", original, report=quiet)
    assert not (tmp_path / "restored").exists()


def test_script(originals, converted, tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "conversion_scripts" / "restore_original_weights.py"))["main"]
    arguments = ["--checkpoint", str(converted["uhd"]), "--output", str(tmp_path / "restored")]
    main([*arguments, "--original", str(originals["uhd"])])
    assert_equal(read_all(tmp_path / "restored"), read_all(originals["uhd"]))
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "The output must be a new or empty folder" in capsys.readouterr().err
