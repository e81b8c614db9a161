"""The conversion script: all that the original's loader accepts, or one clear error that leaves nothing."""

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPModel,
    GenerationConfig,
    LlamaForCausalLM,
)

from llava_family.conversion import CheckpointReader, scripting, writing
from llava_family.converters.llava_mole_contents import find_alpha
from llava_family.llava_mole.configuration_llava_mole import LlavaMoleConfig
from llava_family.llava_mole.image_processing_pil_llava_mole import LlavaMoleImageProcessorPil
from llava_family.llava_mole.modeling_llava_mole import LlavaMoleForCausalLM
from llava_family.llava_mole.processing_llava_mole import LlavaMoleProcessor


ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "llava_mole"
FILE = "llava_mole_r16_a32_e3.pt"
FILES = {
    "trained": FIXTURES / "original_checkpoint" / FILE,
    "full": FIXTURES / "original_checkpoint_full" / FILE,
}
VICUNA = FIXTURES / "original_checkpoint" / "vicuna-7b-v1.5"
CLIP = FIXTURES / "original_checkpoint" / "clip-vit-large-patch14-336"

LLM = "llm_model.base_model.model."
LAYERS, EXPERTS, RANK, SCALING = 3, 3, 16, 2.0
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def load_script():
    path = ROOT / "conversion_scripts" / "convert_llava_mole_weights_to_hf.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def convert(checkpoint, output, **options):
    return script.convert_llava_mole_checkpoint(
        checkpoint, output, **{"vicuna": VICUNA, "clip": CLIP, "report": lambda line: None, **options}
    )


def tensors_of(folder):
    with CheckpointReader(folder) as reader:
        return {name: reader.read(name).clone() for name in reader.tensors}


def bytes_of(folder):
    """Without the manifest, which tells what the folder was made of."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "conversion_manifest.json"}


def assert_equal(written, expected):
    assert written.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not same(written[name], tensor)]
    assert not different


def same(first, second):
    return first.dtype == second.dtype and torch.equal(first, second)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def originals():
    return {kind: torch.load(path, weights_only=True)["state_dict"] for kind, path in FILES.items()}


@pytest.fixture(scope="module")
def vicuna():
    return tensors_of(VICUNA)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Folder and reported lines of both golden files, converted as they are."""
    results = {}
    for kind, path in FILES.items():
        lines = []
        output = tmp_path_factory.mktemp("converted") / kind
        results[kind] = convert(path, output, report=lines.append), lines
    return results


@pytest.fixture(scope="module")
def accurate(tmp_path_factory):
    """Converted in float32, with the attention's adapters beside and in its weights."""
    parent = tmp_path_factory.mktemp("accurate")
    return {
        merged: convert(FILES["trained"], parent / str(merged), dtype="float32", merge_attention_lora=merged)
        for merged in (False, True)
    }


@pytest.fixture(scope="module")
def golden():
    expected = json.loads((FIXTURES / "expected.json").read_text())
    return expected["cases"][0], load_file(FIXTURES / "expected.safetensors")


def golden_inputs(golden, config):
    case, tensors = golden
    ids = [
        placeholder
        for token in case["input_ids"]
        for placeholder in ([config.image_token_id] * 18 if token == 99999 else [token])
    ]
    return {"input_ids": torch.tensor([ids]), "pixel_values": tensors["c0.pixel_values"][None]}


@pytest.fixture
def place(tmp_path):
    """Where `write` puts a changed checkpoint, and `output` its conversion."""
    (tmp_path / "original").mkdir()
    return tmp_path / "original"


def write(place, tensors, name=FILE, **others):
    torch.save({"state_dict": tensors, **others}, place / name)
    return place / name


def expected_tensors(trained, vicuna):
    """What must come out, in the files' dtypes, written down without any of the package's transforms."""
    expected = {"lm_head.weight": vicuna["lm_head.weight"]}
    for name, tensor in vicuna.items():
        if name.startswith("model."):
            expected[f"model.language_model.{name.removeprefix('model.')}"] = tensor
    for name, tensor in tensors_of(CLIP).items():
        if name.startswith("vision_model.") and not name.endswith("position_ids"):
            expected[f"model.vision_tower.{name.removeprefix('vision_model.')}"] = tensor
    adaptor = {
        "model.image_boundaries.start": "visual_start_token",
        "model.image_boundaries.end": "visual_end_token",
        "model.multi_modal_projector.linear_1.weight": "projector.0.weight",
        "model.multi_modal_projector.linear_1.bias": "projector.0.bias",
        "model.multi_modal_projector.linear_2.weight": "projector.2.weight",
        "model.multi_modal_projector.linear_2.bias": "projector.2.bias",
    }
    expected |= {name: trained[f"in_adaptor.{original}"] for name, original in adaptor.items()}
    for layer in range(LAYERS):
        old, new = f"{LLM}model.layers.{layer}", f"model.language_model.layers.{layer}"
        for part in ("weight", "bias"):
            expected[f"{new}.mlp.mole_router.{part}"] = trained[f"{old}.mlp.router.{part}"]
        for kind in ("gate", "up", "down"):
            for side in "AB":
                factors = [trained[f"{old}.mlp.moe_{kind}.{expert}.lora_{side}"] for expert in range(EXPERTS)]
                stacked = torch.stack([factor.T for factor in factors] if side == "B" else factors)
                expected[f"{new}.mlp.{kind}_proj.mole_experts.weight_{side}"] = stacked
        for projection in ATTENTION:
            for side in "AB":
                factor = trained[f"{old}.self_attn.{projection}.lora_{side}.default.weight"]
                experts = f"{new}.self_attn.{projection}.mole_experts"
                expected[f"{experts}.weight_{side}"] = (factor.T if side == "B" else factor)[None]
    return expected


# What comes out


def test_both_contents_give_the_same_folder(converted):
    (trained, _), (full, _) = converted.values()
    assert bytes_of(trained) == bytes_of(full)
    assert FILES["trained"].stat().st_size < FILES["full"].stat().st_size


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_values_are_those_of_the_files(tmp_path, originals, vicuna, converted, dtype):
    expected = expected_tensors(originals["trained"], vicuna)
    assert len({tensor.dtype for tensor in expected.values()}) == 3
    output = converted["trained"][0] if dtype is None else convert(FILES["full"], tmp_path / "out", dtype=dtype)
    dtype = dtype or "bfloat16"
    assert_equal(tensors_of(output), {name: tensor.to(getattr(torch, dtype)) for name, tensor in expected.items()})
    config = json.loads((output / "config.json").read_text())
    assert [part["dtype"] for part in (config, config["text_config"], config["vision_config"])] == [dtype] * 3
    assert LlavaMoleForCausalLM.from_pretrained(output).dtype == getattr(torch, dtype)


def test_report(converted):
    (_, trained), (_, full) = converted.values()
    assert trained[:4] == [
        "Experts: 3 per layer, of rank 16, with alpha 32 and dense routing.",
        f"Taken: 30 tensors from {VICUNA}, which the checkpoint does not have.",
        f"Taken: 55 tensors from {CLIP}, which the checkpoint does not have.",
        "Dtype: bfloat16, in which the original runs. For its files' own values: --dtype float32.",
    ]
    assert trained[4].startswith("Wrote 1 MB in bfloat16, to ") and len(trained) == 5
    assert full[1].startswith("Taken: 0 tensors") and full[2].startswith("Taken: 0 tensors")
    assert full[4] == "Left out: 1 tensors, a second name of the text model's embeddings."


def test_settings(converted):
    output = converted["trained"][0]
    text = json.loads((output / "config.json").read_text())["text_config"]
    settings = {
        "model_type": "llava_mole_text",
        "num_experts": EXPERTS,
        "r": RANK,
        "lora_alpha": 32,
        "routing": "dense",
        "scale_by_gate": False,
        "attention_target_modules": list(ATTENTION),
    }
    assert {name: text[name] for name in settings} == settings
    vicuna = json.loads((VICUNA / "config.json").read_text())
    shared = {"hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "rms_norm_eps", "bos_token_id"}
    shared |= {"eos_token_id", "pad_token_id", "max_position_embeddings", "num_key_value_heads", "tie_word_embeddings"}
    assert {name: text[name] for name in shared} == {name: vicuna[name] for name in shared}
    config = AutoConfig.from_pretrained(output)
    tower = json.loads((CLIP / "config.json").read_text())["vision_config"]
    assert {name: getattr(config.vision_config, name) for name in tower} == tower
    assert (config.vision_encoding, config.vision_feature_layer) == ("square", -1)
    assert "vicuna" not in json.dumps(config.to_dict())


def test_config_is_that_of_a_saved_model(converted, tmp_path):
    output = converted["trained"][0]
    LlavaMoleForCausalLM.from_pretrained(output).save_pretrained(tmp_path)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (output, tmp_path))
    assert ours == theirs


def test_generation_config_is_what_the_original_does(converted):
    written = json.loads((converted["trained"][0] / "generation_config.json").read_text())
    del written["transformers_version"]
    assert written == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "do_sample": False,
        "repetition_penalty": 10.0,
        "max_new_tokens": 256,
    }
    GenerationConfig.from_pretrained(converted["trained"][0]).validate(strict=True)


def test_processor_gives_the_original_inputs(converted, golden):
    processor = AutoProcessor.from_pretrained(converted["trained"][0])
    image = Image.open(FIXTURES / golden[0]["image"])
    inputs = processor(images=image, text=golden[0]["prompt"], return_tensors="pt")
    expected = golden_inputs(golden, AutoConfig.from_pretrained(converted["trained"][0]))
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_processor_settings(converted):
    output = converted["trained"][0]
    processor = AutoProcessor.from_pretrained(output)
    assert type(processor) is LlavaMoleProcessor
    assert type(processor.image_processor) is LlavaMoleImageProcessorPil
    assert processor.num_image_tokens == 4 * 4 + 2
    assert processor.prompt_style == "original"
    assert (processor.tokenizer.model_max_length, processor.tokenizer.padding_side) == (4096, "left")
    assert AutoConfig.from_pretrained(output).image_token_id == processor.image_token_id == 560
    images = processor.image_processor
    assert dict(images.size) == {"shortest_edge": 56}
    assert dict(images.crop_size) == {"height": 56, "width": 56}
    assert images.do_pad and images.do_convert_rgb and images.do_rescale


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_reload(converted, auto_class):
    model, info = auto_class.from_pretrained(converted["full"][0], output_loading_info=True)
    assert type(model) is LlavaMoleForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_equal(model.state_dict(), tensors_of(converted["trained"][0]))


def test_a_loaded_model_is_saved_as_it_was_written(converted, tmp_path):
    AutoModelForCausalLM.from_pretrained(converted["trained"][0]).save_pretrained(tmp_path)
    assert_equal(tensors_of(tmp_path), tensors_of(converted["trained"][0]))


@pytest.mark.parametrize("routing", ["dense", "top1"])
def test_converted_model_computes_what_the_original_does(tmp_path, golden, accurate, routing):
    folder = accurate[False] if routing == "dense" else convert(FILES["full"], tmp_path / "out", routing=routing)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.text_config.routing == routing
    with torch.no_grad():
        logits = model(**golden_inputs(golden, model.config)).logits[0]
    expected = golden[1][f"c0.{'dense' if routing == 'dense' else 'sparse'}.logits"]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


# Merged attention


def test_merged_attention_computes_the_same(golden, accurate):
    logits = {}
    for merged, folder in accurate.items():
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert model.config.text_config.attention_target_modules == ([] if merged else list(ATTENTION))
        inputs = golden_inputs(golden, model.config)
        with torch.no_grad():
            logits[merged] = model(**inputs | {"pixel_values": inputs["pixel_values"].double()}).logits
    torch.testing.assert_close(logits[True], logits[False], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_attention_is_w_plus_s_b_a(tmp_path, originals, accurate, vicuna, kind, dtype):
    lines = []
    options = {"dtype": dtype, "merge_attention_lora": True, "report": lines.append}
    written = tensors_of(convert(FILES[kind], tmp_path / "out", **options))
    assert "Merged: 12 LoRA adapters of the attention." in lines
    unmerged = tensors_of(accurate[False])
    expected = {name: tensor for name, tensor in unmerged.items() if not re.search("self_attn.*mole_experts", name)}
    for layer in range(LAYERS):
        for projection in ATTENTION:
            module = f"layers.{layer}.self_attn.{projection}"
            a, b = (originals["trained"][f"{LLM}model.{module}.lora_{side}.default.weight"].float() for side in "AB")
            expected[f"model.language_model.{module}.weight"] = vicuna[f"model.{module}.weight"].float() + SCALING * (
                b @ a
            )
    assert_equal(written, {name: tensor.to(getattr(torch, dtype)) for name, tensor in expected.items()})


def test_merged_values_must_fit_the_dtype(place, originals):
    tensors = dict(originals["trained"])
    for side in "AB":
        name = f"{LLM}model.layers.1.self_attn.v_proj.lora_{side}.default.weight"
        tensors[name] = torch.full_like(tensors[name], 100.0)
    path = write(place, tensors)
    with pytest.raises(ValueError, match=r"v_proj.weight' has values up to 3.*too large for torch.float16"):
        convert(path, place.parent / "out", dtype="float16", merge_attention_lora=True)
    assert_nothing_left(place)


# Contents of the file


def without_base_layer(tensors):
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}


def with_constants(tensors):
    return tensors | {"vit.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None]}


def with_module(tensors):
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def in_float32(tensors):
    return {name: tensor.float() for name, tensor in tensors.items()}


def with_text_embed(tensors):
    return tensors | {"in_adaptor.text_embed.weight": tensors_of(VICUNA)["model.embed_tokens.weight"].bfloat16()}


CONTENTS = {
    "PEFT before 0.7": ("full", without_base_layer, None),
    "constants": ("full", with_constants, "Left out: 1 tensors, a constant that older checkpoints store."),
    "distributed training": ("trained", with_module, "Names: without the `module.` that all of them begin with."),
    "distributed training of all": ("full", with_module, "Names: without the `module.` that all of them begin with."),
    "float32": ("full", in_float32, None),
    "embeddings by their second name": (
        "trained",
        with_text_embed,
        "Left out: 1 tensors, a second name of the text model's embeddings.",
    ),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_contents(place, originals, converted, content):
    kind, change, line = CONTENTS[content]
    lines = []
    output = convert(write(place, change(originals[kind])), place.parent / "out", report=lines.append)
    assert bytes_of(output) == bytes_of(converted["trained"][0])
    assert line is None or line in lines


def test_other_parts_of_a_training_state_are_ignored(place, originals, converted):
    state = {"epoch": 3, "optimizer": {"state": {0: torch.ones(3)}}, "in_adaptor.visual_end_token": torch.ones(1)}
    output = convert(write(place, originals["trained"], **state), place.parent / "out")
    assert bytes_of(output) == bytes_of(converted["trained"][0])


def test_safetensors_of_a_file_that_was_refused(place, originals, converted):
    path = place / FILE.replace(".pt", ".safetensors")
    save_file(originals["trained"], path)
    assert bytes_of(convert(path, place.parent / "out")) == bytes_of(converted["trained"][0])


FROZEN = {
    f"{LLM}model.layers.1.self_attn.k_proj.base_layer.weight": "model.language_model.layers.1.self_attn.k_proj.weight",
    f"{LLM}model.layers.2.mlp.original_module.up_proj.weight": "model.language_model.layers.2.mlp.up_proj.weight",
    f"{LLM}model.layers.0.input_layernorm.weight": "model.language_model.layers.0.input_layernorm.weight",
    f"{LLM}lm_head.weight": "lm_head.weight",
    "vit.vision_tower.vision_model.post_layernorm.bias": "model.vision_tower.post_layernorm.bias",
}


@pytest.mark.slow
@pytest.mark.parametrize("original", FROZEN)
def test_what_the_file_has_wins(place, originals, converted, original):
    # Of each one alone, so that all others come from the folders
    changed = originals["full"][original] + 1
    path = write(place, originals["trained"] | {original: changed})
    expected = tensors_of(converted["trained"][0])
    assert not torch.equal(changed.bfloat16(), expected[FROZEN[original]])
    expected[FROZEN[original]] = changed.bfloat16()
    assert_equal(tensors_of(convert(path, place.parent / "out")), expected)


# Language model and vision tower


def test_safetensors_of_newer_folders(tmp_path, converted):
    folders = {"vicuna": tmp_path / "vicuna", "clip": tmp_path / "clip"}
    shutil.copytree(VICUNA, folders["vicuna"], ignore=shutil.ignore_patterns("pytorch_model*"))
    LlamaForCausalLM.from_pretrained(VICUNA).save_pretrained(folders["vicuna"])
    CLIPModel.from_pretrained(CLIP).vision_model.save_pretrained(folders["clip"])
    shutil.copyfile(CLIP / "preprocessor_config.json", folders["clip"] / "preprocessor_config.json")
    assert json.loads((folders["clip"] / "config.json").read_text())["model_type"] == "clip_vision_model"
    output = convert(FILES["trained"], tmp_path / "out", **folders)
    assert_equal(tensors_of(output), tensors_of(converted["trained"][0]))
    assert (output / "processor_config.json").read_text() == (
        converted["trained"][0] / "processor_config.json"
    ).read_text()


def test_constants_of_the_language_model_are_left_out(tmp_path, vicuna, converted):
    folder = tmp_path / "vicuna"
    shutil.copytree(VICUNA, folder, ignore=shutil.ignore_patterns("pytorch_model*"))
    constants = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(LAYERS)}
    torch.save(vicuna | constants, folder / "pytorch_model.bin")
    lines = []
    output = convert(FILES["trained"], tmp_path / "out", vicuna=folder, report=lines.append)
    assert bytes_of(output) == bytes_of(converted["trained"][0])
    assert "Left out: 3 tensors, a constant that older checkpoints store." in lines


def test_special_tokens_that_the_language_model_does_not_name(tmp_path, converted):
    folder = tmp_path / "vicuna"
    shutil.copytree(VICUNA, folder)
    edit_json(folder / "config.json", pad_token_id=None)
    output = convert(FILES["trained"], tmp_path / "out", vicuna=folder)
    assert (output / "generation_config.json").read_text() == (
        converted["trained"][0] / "generation_config.json"
    ).read_text()


def test_placeholder_is_the_processor_one_where_embeddings_have_rows_to_spare(tmp_path, vicuna):
    folder = tmp_path / "vicuna"
    shutil.copytree(VICUNA, folder, ignore=shutil.ignore_patterns("pytorch_model*"))
    padded = {
        name: torch.nn.functional.pad(vicuna[name], (0, 0, 0, 16))
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    torch.save(vicuna | padded, folder / "pytorch_model.bin")
    edit_json(folder / "config.json", vocab_size=576)
    output = convert(FILES["trained"], tmp_path / "out", vicuna=folder)
    assert AutoConfig.from_pretrained(output).image_token_id == AutoProcessor.from_pretrained(output).image_token_id
    assert AutoConfig.from_pretrained(output).text_config.vocab_size == 576


def test_second_name_of_embeddings_in_bfloat16(place, originals, vicuna):
    folder = place.parent / "vicuna"
    shutil.copytree(VICUNA, folder, ignore=shutil.ignore_patterns("pytorch_model*"))
    # Like Vicuna's own, with digits that bfloat16 has not
    embeddings = vicuna["model.embed_tokens.weight"] * 1.01
    torch.save(vicuna | {"model.embed_tokens.weight": embeddings}, folder / "pytorch_model.bin")
    second = {"in_adaptor.text_embed.weight": embeddings.bfloat16()}
    assert not torch.equal(second["in_adaptor.text_embed.weight"].half(), embeddings)
    output = convert(write(place, originals["trained"] | second), place.parent / "out", vicuna=folder, dtype="float32")
    assert torch.equal(tensors_of(output)["model.language_model.embed_tokens.weight"], embeddings.float())


# Alpha


@pytest.mark.parametrize(
    ("name", "given", "alpha"),
    [
        ("llava_mole_r16_a32_e3.pt", None, 32),
        ("llava_mole_r16_a32_e3.pt", 32.0, 32),
        ("r16-a8.bin", None, 8),
        ("a0.5.pt", None, 0.5),
        ("llava_mole_r16_a32_e3.last.pt", None, 32),
        ("step_2000_r16_a32_e3_a32.pt", None, 32),
        ("llava_mole.pt", 16, 16),
        ("lla32_mole_a32b.pt", 16, 16),
    ],
)
def test_alpha_is_that_of_the_name_or_the_given_one(name, given, alpha):
    found = find_alpha(Path("folder_a64", name), EXPERTS, RANK, given)
    assert found == alpha and type(found) is type(alpha)


@pytest.mark.slow
def test_given_alpha_reaches_the_model(place, originals):
    path = write(place, originals["trained"], "renamed.pt")
    output = convert(path, place.parent / "out", lora_alpha=24, dtype="float32")
    model = LlavaMoleForCausalLM.from_pretrained(output)
    layer = model.model.language_model.layers[0]
    assert model.config.text_config.lora_alpha == 24
    assert layer.mlp.up_proj.mole_experts.scaling == layer.self_attn.q_proj.mole_experts.scaling == 1.5
    merged = convert(path, place.parent / "merged", lora_alpha=24, dtype="float32", merge_attention_lora=True)
    name = "layers.0.self_attn.q_proj"
    a, b = (originals["trained"][f"{LLM}model.{name}.lora_{side}.default.weight"].float() for side in "AB")
    base, total = (tensors_of(folder)[f"model.language_model.{name}.weight"] for folder in (output, merged))
    assert torch.equal(total, base + 1.5 * (b @ a))


# What is wrong


def drop(pattern):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)}


def add(name, *shape):
    return lambda tensors: tensors | {name: torch.ones(shape)}


def narrow(pattern, dim):
    """Takes the last entry of a dimension away."""

    def change(tensors):
        return {
            name: tensor.narrow(dim, 0, tensor.shape[dim] - 1) if re.search(pattern, name) else tensor
            for name, tensor in tensors.items()
        }

    return change


def renumber(old, new):
    return lambda tensors: {re.sub(old, new, name): tensor for name, tensor in tensors.items()}


def same_tensors(tensors):
    return tensors


GATE = r"layers\.1\.mlp\.moe_gate"
# What is done to the tensors, the file's name, further options, and the error
BREAKAGES = {
    "prefix of some": (
        lambda tensors: {("module." if "lora" in name else "") + name: tensor for name, tensor in tensors.items()},
        FILE,
        {},
        r"must hold LLaVA-MoLE's experts, llm_model\.base_model.*but has none in its 90 tensors",
    ),
    "other prefix": (renumber("^", "model."), FILE, {}, "but has none in its 90 tensors .model.in_adaptor"),
    "experts elsewhere": (renumber("^llm_model", "llm"), FILE, {}, "but has none in its 90 tensors"),
    "adaptor alone": (drop("llm_model"), FILE, {}, "but has none in its 6 tensors"),
    "rank of one factor": (
        narrow(f"{GATE}.2.lora_A", 0),
        FILE,
        {},
        r"must have one rank, but it has several: 15 \(.*layers.1.mlp.moe_gate.2.lora_A\), 16 \(",
    ),
    "rank of the attention": (narrow(r"self_attn\..*lora_A", 0), FILE, {}, "must have one rank.*15.*16"),
    "rank of one B": (narrow(f"{GATE}.2.lora_B", 1), FILE, {}, "must have one rank.*15 .*moe_gate.2.lora_B"),
    "no matrix": (
        add(f"{LLM}model.layers.1.mlp.moe_gate.1.lora_A", 16),
        FILE,
        {},
        r"moe_gate.1.lora_A of .* must be a matrix, but has shape \(16,\)",
    ),
    "missing expert": (
        drop(f"{GATE}.1.lora"),
        FILE,
        {},
        "Layer 1 of .* must have experts 0 to 2 of moe_gate, .* but has 0, 2. Check",
    ),
    "expert too many": (
        renumber(r"(moe_up)\.2\.", r"\1.3."),
        FILE,
        {},
        "Layer 0 .* 0 to 2 of moe_up, .* but has 0, 1, 3. ",
    ),
    "missing factor": (drop(f"{GATE}.1.lora_B"), FILE, {}, r"gate_proj.mole_experts.weight_B .* \(2, 16, 160\), exp"),
    "router of fewer": (
        narrow(r"layers\.2\.mlp\.router", 0),
        FILE,
        {},
        "router of layer 0 chooses of 3 and that of layer 2 of 2",
    ),
    "missing router": (drop(r"layers\.0\.mlp\.router"), FILE, {}, "must have router of all layers.* 1, 2. Check"),
    "router without bias": (drop(r"layers\.0\.mlp\.router.bias"), FILE, {}, r"without a source:\s+.*mole_router.bias"),
    "missing layer": (
        drop(r"layers\.2\."),
        FILE,
        {},
        r"must have moe_gate of all layers of the language model, 0 to 2, but has that of 0, 1. Check.*`--vicuna`",
    ),
    "missing adapter": (
        drop(r"layers\.1\.self_attn.v_proj"),
        FILE,
        {},
        "must have v_proj of all layers.* has that of 0, 2. ",
    ),
    "missing adapter to merge": (
        drop(r"layers\.1\.self_attn.v_proj"),
        FILE,
        {"merge_attention_lora": True},
        "must have v_proj of all layers.* has that of 0, 2. ",
    ),
    "missing side of an adapter": (
        drop(r"layers\.1\.self_attn.v_proj.lora_A"),
        FILE,
        {},
        r"without a source:\s+.*layers.1.self_attn.v_proj.mole_experts.weight_A",
    ),
    "missing side of an adapter to merge": (
        drop(r"layers\.1\.self_attn.v_proj.lora_A"),
        FILE,
        {"merge_attention_lora": True},
        "cannot be merged: there is no lora_A",
    ),
    "no adapters": (drop("self_attn"), FILE, {}, "must have q_proj of all layers.* has that of none"),
    "missing projector": (drop("projector.0"), FILE, {}, r"2 target tensors without a source:\s+.*linear_1.weight"),
    "unknown tensor": (
        add("in_adaptor.local_tokens", 3),
        FILE,
        {},
        r"1 source tensors without a target:\s+in_adaptor.local_tokens",
    ),
    "base by both names": (
        lambda tensors: (
            tensors
            | {
                f"{LLM}model.layers.0.self_attn.q_proj{part}.weight": torch.ones(64, 64)
                for part in ("", ".base_layer")
            }
        ),
        FILE,
        {},
        "q_proj.weight for model.language_model.layers.0.self_attn.q_proj.weight, made of .*base_layer",
    ),
    "other embeddings": (
        add("in_adaptor.text_embed.weight", 560, 64),
        FILE,
        {},
        "in_adaptor.text_embed.weight of .* must be the text model's embeddings.* has other values",
    ),
    "embeddings of another shape": (
        add("in_adaptor.text_embed.weight", 3, 64),
        FILE,
        {},
        "in_adaptor.text_embed.weight of .* or another shape",
    ),
    "no alpha": (same_tensors, "mole_r16_e3.pt", {}, "Nothing in .*mole_r16_e3.pt tells `lora_alpha`.*`--lora-alpha`"),
    "alphas that differ": (
        same_tensors,
        FILE,
        {"lora_alpha": 16},
        r"must be one `lora_alpha`, but the name of .* says a32, `lora_alpha` \(`--lora-alpha`\) is 16.",
    ),
    "alphas in a name": (same_tensors, "a16_a32.pt", {}, "must be one `lora_alpha`, .* says a16, a32."),
    "alpha of 0": (same_tensors, "mole.pt", {"lora_alpha": 0}, "must be positive and finite, but is 0"),
    "alpha without end": (same_tensors, "mole.pt", {"lora_alpha": float("inf")}, "finite, but is inf"),
    "alpha that is no number": (same_tensors, "mole.pt", {"lora_alpha": float("nan")}, "finite, but is nan"),
    "other rank in the name": (same_tensors, "mole_r32_a64_e3.pt", {}, "says r32, but its tensors have the rank 16"),
    "other number in the name": (same_tensors, "mole_r16_a32_e8.pt", {}, "says e8, .* the number of experts 3"),
    "routing": (same_tensors, FILE, {"routing": "top2"}, "must be one of dense, top1, but is 'top2'"),
    "dtype": (same_tensors, FILE, {"dtype": "int8"}, "`dtype` must be one of .*'int8'"),
}


def assert_nothing_left(place):
    assert not [path for path in place.parent.iterdir() if path.name.lstrip(".").startswith("out")]


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_wrong_file_is_one_error_and_leaves_nothing(place, originals, breakage):
    change, name, options, message = BREAKAGES[breakage]
    path = write(place, change(originals["trained"]), name)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        convert(path, place.parent / "out", **options)
    assert_nothing_left(place)


def edit_weights(change):
    def edit(folder):
        tensors = change(tensors_of(folder))
        for path in folder.glob("pytorch_model*"):
            path.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")

    return edit


def remove(name):
    return lambda folder: (folder / name).unlink()


FOLDER_BREAKAGES = {
    "another language model": (
        "vicuna",
        lambda folder: edit_json(folder / "config.json", model_type="llava_llama"),
        r"`vicuna` \(`--vicuna`\) must be a model of type llama, but .* has the `model_type` 'llava_llama'",
    ),
    "another vision tower": (
        "clip",
        lambda folder: edit_json(folder / "config.json", model_type="siglip"),
        r"`clip` \(`--clip`\) must be a model of type clip or clip_vision_model, but .*'siglip'",
    ),
    "no config": ("vicuna", remove("config.json"), "must be a Llama release, but .* has no config.json"),
    "broken config": (
        "clip",
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json must be .* no JSON",
    ),
    "more layers": (
        "vicuna",
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=4),
        "must have moe_gate of all layers of the language model, 0 to 3, but has that of 0, 1, 2. ",
    ),
    "fewer layers": (
        "vicuna",
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=2),
        "must have moe_gate of all layers of the language model, 0 to 1, but has that of 0, 1, 2. ",
    ),
    "other width": (
        "vicuna",
        lambda folder: edit_json(folder / "config.json", intermediate_size=128),
        r"gate_proj.mole_experts.weight_B from .* has shape \(3, 16, 160\), expected \(3, 16, 128\)",
    ),
    "incomplete language model": (
        "vicuna",
        edit_weights(drop("layers.1.mlp.gate_proj")),
        r"1 target tensors without a source:\s+model.language_model.layers.1.mlp.gate_proj.weight",
    ),
    "multimodal language model": (
        "vicuna",
        edit_weights(add("model.mm_projector.weight", 3)),
        r"source tensors without a target:\s+.*mm_projector.weight",
    ),
    "incomplete vision tower": (
        "clip",
        edit_weights(drop("vision_model.pre_layrnorm.bias")),
        r"without a source:\s+model.vision_tower.pre_layrnorm.bias",
    ),
    "other patches": (
        "clip",
        lambda folder: edit_json(
            folder / "config.json",
            vision_config=json.loads((folder / "config.json").read_text())["vision_config"] | {"patch_size": 28},
        ),
        r"patch_embedding.weight has shape \(32, 3, 14, 14\), expected \(32, 3, 28, 28\)",
    ),
    "no tokenizer": ("vicuna", remove("tokenizer.model"), "must have a tokenizer, but .* has neither tokenizer.model"),
    "tokenizer of another model": (
        "vicuna",
        lambda folder: edit_json(folder / "config.json", vocab_size=500),
        "has 560 tokens, but config.json there says 500",
    ),
    "no image processor": ("clip", remove("preprocessor_config.json"), "preprocessor_config.json"),
    "no weights": ("clip", remove("pytorch_model.bin"), "has no weights"),
}


@pytest.mark.parametrize("breakage", FOLDER_BREAKAGES)
def test_wrong_folder_is_one_error_and_leaves_nothing(tmp_path, breakage):
    part, edit, message = FOLDER_BREAKAGES[breakage]
    folder = tmp_path / part
    shutil.copytree({"vicuna": VICUNA, "clip": CLIP}[part], folder)
    edit(folder)
    with pytest.raises((ValueError, OSError), match=f"(?s){message}"):
        convert(FILES["trained"], tmp_path / "out", **{part: folder})
    assert_nothing_left(folder)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a file of the original's training.*nowhere.pt is missing"):
        convert(tmp_path / "nowhere.pt", tmp_path / "out")
    with pytest.raises(ValueError, match=rf"is a folder\. Pass a file in it: it has {FILE}\."):
        convert(FILES["full"].parent, tmp_path / "out")
    with pytest.raises(ValueError, match=r"is a folder\. .*: it has none that ends in \.pt"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere.* is neither a folder"):
        convert(FILES["trained"], tmp_path / "out", vicuna=tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


class Malicious:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("where", ["state_dict", "beside"])
def test_malicious_file_is_refused(place, originals, where):
    trace = place / "trace"
    attack = {"attack": Malicious(trace)}
    if where == "beside":
        path = write(place, originals["trained"], **attack)
    else:
        path = write(place, originals["trained"] | attack)
    with pytest.raises(ValueError, match="may run code when loaded"):
        convert(path, place.parent / "out")
    assert not trace.exists()
    assert_nothing_left(place)


@pytest.mark.parametrize("target", ["elsewhere", "blobs"])
def test_a_link_that_is_named_is_followed(tmp_path, converted, target):
    """To another disk, or into the Hub's cache, whose files have no names of their own."""
    (tmp_path / target).mkdir()
    file = tmp_path / target / ("0a1b2c" if target == "blobs" else FILES["trained"].name)
    file.write_bytes(FILES["trained"].read_bytes())
    link = tmp_path / "snapshots" / "0123" / FILES["trained"].name
    link.parent.mkdir(parents=True)
    link.symlink_to(file)
    assert bytes_of(convert(link, tmp_path / "out")) == bytes_of(converted["trained"][0])


def test_file_without_state_dict(place, originals):
    torch.save(originals["trained"], place / FILE)
    with pytest.raises(ValueError, match=r"must hold a dictionary with tensors under 'state_dict', but holds \['llm"):
        convert(place / FILE, place.parent / "out")
    assert_nothing_left(place)


def test_output_that_is_not_empty_is_refused_before_anything_else(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        convert("nowhere.pt", tmp_path, vicuna="owner/never-downloaded")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["weights", "processor"])
def test_interruption_leaves_what_a_rerun_goes_on_with(place, monkeypatch, stage, converted):
    output = place.parent / "out"

    def interrupt(*args, **kwargs):
        assert (output.parent / ".out.incomplete" / "conversion_manifest.json").exists()
        raise KeyboardInterrupt

    owner, name = (writing, "write_shard") if stage == "weights" else (LlavaMoleProcessor, "save_pretrained")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(FILES["trained"], place.parent / "out")
    assert not output.exists()
    assert (output.parent / ".out.incomplete" / "model.safetensors").exists() == (stage == "processor")
    convert(FILES["trained"], place.parent / "out")
    assert sorted(path.name for path in output.parent.iterdir()) == [place.name, "out"]
    assert_equal(tensors_of(output), tensors_of(converted["trained"][0]))


def test_push_to_hub(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(scripting, "create_repo", lambda repo_id, exist_ok: calls.append(repo_id))
    monkeypatch.setattr(scripting, "upload_folder", lambda **arguments: calls.append(arguments["folder_path"]))
    output = convert(FILES["trained"], tmp_path / "out", push_to_hub="me/mine")
    assert calls == ["me/mine", output]
    with pytest.raises(ValueError, match="Repo id"):
        convert(FILES["trained"], tmp_path / "second", push_to_hub="no repo!")


def test_command_line(tmp_path, originals, capsys):
    output = tmp_path / "out"
    folders = ["--vicuna", str(VICUNA), "--clip", str(CLIP)]
    path = write(tmp_path, originals["trained"], "renamed.pt")
    arguments = ["--checkpoint", str(path), "--output", str(output), *folders, "--dtype", "float32"]
    script.main([*arguments, "--lora-alpha", "32", "--routing", "top1", "--merge-attention-lora"])
    printed = capsys.readouterr().out
    assert f"in float32, to {output}." in printed and "with alpha 32 and top1 routing" in printed
    text_config = LlavaMoleConfig.from_pretrained(output).text_config
    assert (text_config.routing, text_config.attention_target_modules) == ("top1", [])
    for index, option in enumerate(arguments[:8:2]):
        with pytest.raises(SystemExit):
            script.main(arguments[: 2 * index] + arguments[2 * index + 2 :])
        assert f"the following arguments are required: {option}" in capsys.readouterr().err
    for wrong, message in (
        ([], "is not empty"),
        (["--routing", "top2"], "invalid choice: 'top2'"),
        (["--lora-alpha", "much"], "invalid float value: 'much'"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            script.main([*arguments, *wrong])
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err
