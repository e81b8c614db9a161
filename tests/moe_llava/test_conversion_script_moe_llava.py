"""The conversion script: every layout that the original's training writes, or one clear error that leaves nothing."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, CodeGenTokenizer, GenerationConfig

from llava_family.conversion import CheckpointReader, scripting, writing
from llava_family.converters.moe_llava import set_image_token
from llava_family.moe_llava.configuration_moe_llava import MoeLlavaConfig
from llava_family.moe_llava.modeling_moe_llava import MoeLlavaForCausalLM
from llava_family.moe_llava.processing_moe_llava import MoeLlavaProcessor


ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "moe_llava"
VARIANTS = ("phi_clip336", "stablelm_clip336", "qwen_clip336", "stablelm_siglip384")
BACKBONES = VARIANTS[:3]
EXPERT_0 = re.compile(r"deepspeed_moe\.experts\.deepspeed_experts\.0\.")
TOWER = "image_tower.image_tower."


def load_script():
    path = ROOT / "conversion_scripts" / "convert_moe_llava_weights_to_hf.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def convert(checkpoint, output=None, **options):
    return script.convert_moe_llava_checkpoint(
        checkpoint, output or checkpoint.parent / "out", **{"report": lambda line: None, **options}
    )


def tensors_of(folder):
    with CheckpointReader(folder) as reader:
        return {name: reader.read(name).clone() for name in reader.tensors}


def tower_of(variant):
    return next(path.parent for path in (FIXTURES / variant).glob("*/*/model.safetensors"))


def copy_variant(variant, folder):
    """The golden checkpoint without its weights, and its tower's files where config.json says that they lie."""
    folder.mkdir(parents=True)
    for source in (FIXTURES / variant / "original_checkpoint").iterdir():
        if not source.name.startswith(("model", "pytorch_model")):
            shutil.copyfile(source, folder / source.name)
    tower = tower_of(variant)
    copy = folder / tower.relative_to(FIXTURES / variant)
    copy.mkdir(parents=True)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(tower / name, copy / name)
    return folder


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_equal(written, expected):
    assert written.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(written[name], tensor)]
    assert not different


@pytest.fixture(scope="module")
def originals():
    return {variant: tensors_of(FIXTURES / variant / "original_checkpoint") for variant in VARIANTS}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Folder and reported lines of every golden checkpoint, converted as it is."""
    results = {}
    for variant in VARIANTS:
        lines = []
        output = tmp_path_factory.mktemp("converted") / variant
        convert(FIXTURES / variant / "original_checkpoint", output, report=lines.append)
        results[variant] = output, lines
    return results


@pytest.fixture
def release(tmp_path, originals):
    """Phi's golden checkpoint in one file."""
    folder = copy_variant("phi_clip336", tmp_path / "release")
    save_file(originals["phi_clip336"], folder / "model.safetensors")
    return folder


# Releases


@pytest.mark.parametrize("variant", VARIANTS)
def test_converted_equals_directly_loaded(converted, variant):
    output, lines = converted[variant]
    direct = MoeLlavaForCausalLM.from_pretrained(FIXTURES / variant / "original_checkpoint")
    model, info = MoeLlavaForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == direct.dtype == (torch.float32 if variant == "qwen_clip336" else torch.bfloat16)
    assert_equal(model.state_dict(), direct.state_dict())
    assert tensors_of(output).keys() == direct.state_dict().keys()
    assert lines[0].startswith("Vision tower: from the checkpoint's own weights") and len(lines) == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_is_that_of_a_saved_model(converted, tmp_path, variant):
    model = MoeLlavaForCausalLM.from_pretrained(FIXTURES / variant / "original_checkpoint")
    model.save_pretrained(tmp_path, save_original_format=False)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (converted[variant][0], tmp_path))
    assert ours == theirs
    assert ours["text_config"]["moe_layers"] == [0, 2]
    assert not re.search("mm_|video_|deepspeed|auto_map", json.dumps(ours))


@pytest.mark.parametrize("variant", VARIANTS)
def test_processor_is_the_original_ones(converted, variant):
    output = converted[variant][0]
    processor = MoeLlavaProcessor.from_pretrained(output)
    original = MoeLlavaProcessor.from_pretrained(FIXTURES / variant / "original_checkpoint")
    config = MoeLlavaConfig.from_pretrained(output)
    assert (
        config.image_token_id == processor.image_token_id == original.image_token_id == config.text_config.vocab_size
    )
    assert processor.num_image_tokens == original.num_image_tokens
    assert processor.image_processor.to_dict() == original.image_processor.to_dict()
    prompt = "USER: <image>\nWhat, now?  12 ASSISTANT: Ok.<|endoftext|>"
    assert processor.tokenizer(prompt)["input_ids"] == original.tokenizer(prompt)["input_ids"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_config_has_the_tokenizer_ones_where_the_original_has_none(converted, variant):
    original = json.loads((FIXTURES / variant / "original_checkpoint" / "generation_config.json").read_text())
    written = GenerationConfig.from_pretrained(converted[variant][0]).to_dict()
    tokenizer = MoeLlavaProcessor.from_pretrained(converted[variant][0]).tokenizer
    added = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ours = ("transformers_version", "_from_model_config")
    assert {name: value for name, value in written.items() if value is not None and name not in ours} == {
        **added,
        **{name: value for name, value in original.items() if name not in ours},
    }
    assert ("eos_token_id" in original) == ("phi" not in variant)
    assert not written.get("_from_model_config")


PREFIXES = {"none": "", "all of PEFT's": "base_model.model.", "what the original leaves of Qwen's": "model."}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("variant", BACKBONES)
def test_one_pickle(tmp_path, originals, converted, variant, prefix):
    folder = copy_variant(variant, tmp_path / "release")
    tensors = {PREFIXES[prefix] + name: tensor for name, tensor in originals[variant].items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    assert_equal(tensors_of(convert(folder)), tensors_of(converted[variant][0]))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype(tmp_path, converted, dtype):
    output = convert(FIXTURES / "phi_clip336" / "original_checkpoint", tmp_path / "out", dtype=dtype)
    expected = {
        name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors_of(converted["phi_clip336"][0]).items()
    }
    assert_equal(tensors_of(output), expected)
    config = json.loads((output / "config.json").read_text())
    assert [part["dtype"] for part in (config, config["text_config"], config["vision_config"])] == [dtype] * 3
    assert MoeLlavaForCausalLM.from_pretrained(output).dtype == getattr(torch, dtype)


def test_constants_are_left_out(release, originals, converted):
    constants = {f"model.{TOWER}vision_model.embeddings.position_ids": torch.arange(17)}
    save_file(originals["phi_clip336"] | constants, release / "model.safetensors")
    lines = []
    output = convert(release, report=lines.append)
    assert_equal(tensors_of(output), tensors_of(converted["phi_clip336"][0]))
    assert lines[1] == "Left out: 1 tensors, a constant that older checkpoints store."


# Second stage


@pytest.mark.parametrize("variant", BACKBONES)
def test_dense_second_stage(tmp_path, originals, converted, variant):
    folder = copy_variant(variant, tmp_path / "release")
    config = json.loads((folder / "config.json").read_text())
    del config["moe"]
    config["model_type"] = config["model_type"].removeprefix("moe_")
    (folder / "config.json").write_text(json.dumps(config))
    dense = {EXPERT_0.sub("", name): tensor for name, tensor in originals[variant].items()}
    dense = {name: tensor.contiguous() for name, tensor in dense.items() if "deepspeed" not in name}
    save_file(dense, folder / "model.safetensors")
    output = convert(folder)
    written, sparse = tensors_of(output), tensors_of(converted[variant][0])
    assert MoeLlavaConfig.from_pretrained(output).text_config.moe_layers == []
    expected = {}
    for name, tensor in sparse.items():
        stem, is_expert, part = name.partition(".experts.")
        if not is_expert:
            expected |= {} if ".mlp.gate.weight" in name else {name: tensor}
        elif variant == "phi_clip336":
            kind = "bias" if part.endswith("_bias") else "weight"
            expected[f"{stem}.{'fc1' if part.startswith('up') else 'fc2'}.{kind}"] = tensor[0]
        elif part == "gate_up_proj":
            gate, up = tensor[0].chunk(2)
            expected |= {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}
        else:
            expected[f"{stem}.down_proj.weight"] = tensor[0]
    assert_equal(written, expected)
    direct, loaded = (MoeLlavaForCausalLM.from_pretrained(path) for path in (folder, output))
    assert_equal(loaded.state_dict(), direct.state_dict())


# First stage


def first_stage(variant, tensors, tmp_path):
    """The folders of a first stage, as its training writes it, and of its language model, as its makers publish it."""
    folder, base = tmp_path / "release", tmp_path / "base"
    copy_variant(variant, base)
    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    config["model_type"] = config["model_type"].removeprefix("moe_")
    del config["moe"]
    (folder / "config.json").write_text(json.dumps(config))
    (base / "config.json").write_text(json.dumps({"model_type": config["model_type"].removeprefix("llava_")}))
    projector = {name: tensor for name, tensor in tensors.items() if "mm_projector" in name}
    torch.save(projector, folder / "mm_projector.bin")
    text = {EXPERT_0.sub("", name): tensor for name, tensor in tensors.items() if name not in projector}
    text = {name: tensor for name, tensor in text.items() if not re.search("deepspeed|image_tower", name)}
    if variant == "phi_clip336":
        text["lm_head.bias"] = torch.ones(384, dtype=torch.bfloat16)
        forget_padding_token(base)
    save_file(text, base / "model.safetensors")
    return folder, base


def forget_padding_token(base):
    """Phi's own tokenizer has none; MoE-LLaVA's training adds it."""
    path = base / "added_tokens.json"
    path.write_text(
        json.dumps({name: index for name, index in json.loads(path.read_text()).items() if "extra" not in name})
    )
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"], config["added_tokens_decoder"]["354"]
    config["unk_token"] = "<|endoftext|>"
    path.write_text(json.dumps(config))
    CodeGenTokenizer.from_pretrained(base).save_pretrained(base.parent / "fast")
    shutil.copyfile(base.parent / "fast" / "tokenizer.json", base / "tokenizer.json")
    special = base / "special_tokens_map.json"
    special.write_text(json.dumps(dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")))


@pytest.mark.parametrize("variant", BACKBONES)
def test_first_stage(tmp_path, originals, converted, variant):
    folder, base = first_stage(variant, originals[variant], tmp_path)
    lines = []
    output = convert(folder, base=base, vision_tower=tower_of(variant), dtype="float32", report=lines.append)
    written, sparse = tensors_of(output), tensors_of(converted[variant][0])
    shared = {name: tensor for name, tensor in sparse.items() if ".experts." not in name and ".mlp.gate." not in name}
    assert_equal({name: written[name] for name in shared}, {name: tensor.float() for name, tensor in shared.items()})
    assert len(written.keys() - shared.keys()) == 2 * (4 if variant == "phi_clip336" else 3)  # both layers' networks
    reason = "Left out: 1 tensors, since the original trains Phi's language modeling head without its bias."
    assert (reason in lines) == (variant == "phi_clip336")
    model, info = MoeLlavaForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor, later = (MoeLlavaProcessor.from_pretrained(path) for path in (output, converted[variant][0]))
    assert model.config.image_token_id == processor.image_token_id == later.image_token_id
    assert processor.tokenizer.get_vocab() == later.tokenizer.get_vocab()
    assert processor.tokenizer.pad_token_id == later.tokenizer.pad_token_id
    assert processor.tokenizer.eos_token_id == later.tokenizer.eos_token_id


def test_first_stage_needs_base_and_vision_tower(tmp_path, originals):
    folder, base = first_stage("stablelm_clip336", originals["stablelm_clip336"], tmp_path)
    tower = tower_of("stablelm_clip336")
    with pytest.raises(ValueError, match="output of the first training stage.*`--base`"):
        convert(folder, vision_tower=tower)
    with pytest.raises(ValueError, match=r"has no vision tower.*'openai/clip-vit-tiny-patch14-56'.*`--vision-tower`"):
        convert(folder, base=base)
    with pytest.raises(ValueError, match="`--base`.* must be a language model alone.*59 tensors"):
        convert(folder, base=FIXTURES / "stablelm_clip336" / "original_checkpoint", vision_tower=tower)
    save_file(tensors_of(base) | HEAD_BIAS, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"source tensors without a target:\s+lm_head.bias"):
        convert(folder, base=base, vision_tower=tower)
    for path in base.glob("*.tiktoken"):
        path.unlink()
    with pytest.raises(OSError, match="must hold the tokenizer"):
        convert(folder, base=base, vision_tower=tower)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


# LoRA


LORA_STYLES = {
    "of the original's PEFT": ("", ".default"),
    "of newer PEFT": (".base_layer", ".default"),
    "without the adapter's name": (".base_layer", ""),
}


def factor(tensors, style, rank=8, alpha=16):
    """Splits every feed-forward weight into a base and a LoRA adapter in float32; the sums too, in float32."""
    base_layer, adapter = LORA_STYLES[style]
    generator = torch.Generator().manual_seed(0)
    factored, sums = {}, {}
    for name, tensor in tensors.items():
        if (
            not re.search(r"\.(fc1|fc2|w1|w2|mlp\S*\.c_proj|(gate|up|down)_proj)\.(weight|bias)$", name)
            or TOWER in name
        ):
            factored[name] = sums[name] = tensor
            continue
        module, _, kind = name.rpartition(".")
        factored[f"{module}{base_layer}.{kind}"] = sums[name] = tensor
        if kind == "weight":
            lora_a = torch.randn(rank, tensor.shape[1], generator=generator) / 8
            lora_b = torch.randn(tensor.shape[0], rank, generator=generator) / 8
            factored |= {f"{module}.lora_A{adapter}.weight": lora_a, f"{module}.lora_B{adapter}.weight": lora_b}
            sums[name] = (tensor.float() + alpha / rank * (lora_b @ lora_a)).to(tensor.dtype)
    return factored, sums


@pytest.mark.slow
@pytest.mark.parametrize("style", LORA_STYLES)
@pytest.mark.parametrize("variant", BACKBONES)
def test_unmerged_lora(tmp_path, originals, converted, variant, style):
    folder, merged_folder = (copy_variant(variant, tmp_path / name) for name in ("release", "merged"))
    factored, sums = factor(originals[variant], style)
    # As the original's train.py leaves the names, see `release_names`
    prefix = "model." if variant == "qwen_clip336" else ""
    torch.save({prefix + name: tensor for name, tensor in factored.items()}, folder / "pytorch_model.bin")
    torch.save(sums, merged_folder / "pytorch_model.bin")
    lines = []
    written = tensors_of(convert(folder, lora_alpha=16, report=lines.append))
    expected = tensors_of(convert(merged_folder, tmp_path / "expected"))
    assert_equal(written, expected)
    num_dense, num_experts = 2, 2 * 4
    assert (
        lines[0]
        == f"Merged: {(num_dense + num_experts) * (2 if 'phi' in variant else 3)} LoRA adapters, with alpha 16."
    )
    unlike = tensors_of(converted[variant][0])
    assert any(not torch.equal(written[name], unlike[name]) for name in written)


@pytest.fixture
def lora_release(tmp_path, originals):
    folder = copy_variant("phi_clip336", tmp_path / "release")
    factored, _ = factor(originals["phi_clip336"], "of newer PEFT")
    torch.save(factored, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("place", ["adapter_config.json", "config.json"])
def test_alpha_of_the_training_is_found(lora_release, place):
    if place == "config.json":
        edit_json(lora_release / place, lora={"lora_enable": True, "lora_r": 8, "lora_alpha": 16})
    else:
        (lora_release / place).write_text(json.dumps({"r": 8, "lora_alpha": 16, "peft_type": "LORA"}))
    lines = []
    found = tensors_of(convert(lora_release, report=lines.append))
    assert lines[0].endswith("with alpha 16.")
    (lora_release / "adapter_config.json").unlink(missing_ok=True)
    edit_json(lora_release / "config.json", lora={})
    assert_equal(found, tensors_of(convert(lora_release, lora_release.parent / "given", lora_alpha=16)))


def drop_from_pickle(name):
    def edit(folder):
        path = folder / "pytorch_model.bin"
        torch.save({key: tensor for key, tensor in torch.load(path).items() if not key.endswith(name)}, path)

    return edit


def add_to_pickle(name, tensor):
    def edit(folder):
        path = folder / "pytorch_model.bin"
        torch.save(torch.load(path) | {name: tensor}, path)

    return edit


def adapter_config(**settings):
    return lambda folder: (folder / "adapter_config.json").write_text(json.dumps(settings))


MODULE = "model.layers.1.mlp.fc1"
LORA_BREAKAGES = {
    "no alpha": (lambda folder: None, None, "neither adapter_config.json nor config.json has .*`--lora-alpha`"),
    "alphas that differ": (adapter_config(lora_alpha=32), 16, r"must be numbers and agree.* is 16, .* is 32"),
    "alpha that is no number": (adapter_config(lora_alpha="many"), None, "is 'many'"),
    "alpha of 0": (lambda folder: None, 0, "must be positive and finite, but is 0"),
    "other rank": (adapter_config(lora_alpha=16, r=4), None, "needs an adapter of rank 4"),
    "not plain LoRA": (adapter_config(lora_alpha=16, use_dora=True), None, "has use_dora"),
    "no B": (drop_from_pickle(f"{MODULE}.lora_B.default.weight"), 16, f"{MODULE}.lora_A.* there is no lora_B"),
    "no base": (drop_from_pickle(f"{MODULE}.base_layer.weight"), 16, f"there is no {MODULE}.weight"),
    "two adapters": (add_to_pickle(f"{MODULE}.lora_A.other.weight", torch.ones(8, 64)), 16, "must have one adapter"),
    "other shape": (add_to_pickle(f"{MODULE}.lora_A.default.weight", torch.ones(8, 63)), 16, r"has shape \(8, 63\)"),
    "two bases": (add_to_pickle(f"{MODULE}.weight", torch.ones(128, 64)), 16, f"two tensors called '{MODULE}.weight'"),
    "unknown part": (add_to_pickle(f"{MODULE}.lora_magnitude", torch.ones(8).bfloat16()), 16, "lora_magnitude"),
}


@pytest.mark.parametrize("breakage", LORA_BREAKAGES)
def test_wrong_lora_is_one_error_and_leaves_nothing(lora_release, breakage):
    edit, alpha, message = LORA_BREAKAGES[breakage]
    edit(lora_release)
    with pytest.raises(ValueError, match=message):
        convert(lora_release, lora_alpha=alpha)
    assert_nothing_left(lora_release)


# Vision tower


def test_vision_tower_replaces_that_of_the_checkpoint(tmp_path, converted):
    variant = "qwen_clip336"
    tower = tmp_path / "tower"
    shutil.copytree(tower_of(variant), tower)
    replaced = {name: tensor.float() + 1 / 3 for name, tensor in tensors_of(tower).items()}
    others = {"logit_scale": torch.tensor(1.0), "text_model.final_layer_norm.weight": torch.ones(4)}
    position_ids = {"vision_model.embeddings.position_ids": torch.arange(17)}
    save_file(replaced | others | position_ids, tower / "model.safetensors")
    lines = []
    output = convert(
        FIXTURES / variant / "original_checkpoint", tmp_path / "out", vision_tower=tower, report=lines.append
    )
    assert lines[0] == f"Vision tower: from {tower}, not from the checkpoint."
    expected = tensors_of(converted[variant][0])
    expected |= {name.replace("vision_model.", "model.vision_tower."): tensor for name, tensor in replaced.items()}
    assert_equal(tensors_of(output), expected)


@pytest.mark.parametrize("variant", ["phi_clip336", "stablelm_siglip384"])
def test_vision_tower_of_the_original_is_that_of_the_checkpoint(tmp_path, converted, variant):
    output = convert(FIXTURES / variant / "original_checkpoint", tmp_path / "out", vision_tower=tower_of(variant))
    assert_equal(tensors_of(output), tensors_of(converted[variant][0]))


def test_checkpoint_without_vision_tower_needs_one(release, originals, converted):
    tensors = {name: tensor for name, tensor in originals["phi_clip336"].items() if TOWER not in name}
    save_file(tensors, release / "model.safetensors")
    with pytest.raises(ValueError, match="has no vision tower.*`--vision-tower`"):
        convert(release)
    assert_nothing_left(release)
    output = convert(release, vision_tower=tower_of("phi_clip336"))
    assert_equal(tensors_of(output), tensors_of(converted["phi_clip336"][0]))


def test_vision_tower_of_another_width(release):
    tower = release.parent / "tower"
    CLIPVisionModel(CLIPVisionConfig.from_pretrained(tower_of("phi_clip336"), hidden_size=64)).save_pretrained(tower)
    with pytest.raises(ValueError, match="width 64"):
        convert(release, vision_tower=tower)
    assert not (release.parent / "out").exists()


# Wrong folders


def edit_weights(edit):
    def apply(folder):
        tensors = tensors_of(folder)
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def leave_adapter(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def give_no_placeholder_room(folder):
    edit_json(folder / "config.json", vocab_size=100)


EXPERT = "model.layers.2.mlp.deepspeed_moe.experts.deepspeed_experts"
HEAD_BIAS = {"lm_head.bias": torch.ones(384, dtype=torch.bfloat16)}
BREAKAGES = {
    "missing tensor": (
        edit_weights(lambda tensors: tensors.pop("model.layers.1.mlp.fc1.weight")),
        r"1 target tensors without a source:\s+model.language_model.layers.1.mlp.fc1.weight",
    ),
    "missing expert": (
        edit_weights(lambda tensors: tensors.pop(f"{EXPERT}.3.fc1.weight")),
        r"mlp.experts.up_proj from .* has shape \(3, 128, 64\), expected \(4, 128, 64\)",
    ),
    "left-over tensor": (
        edit_weights(lambda tensors: tensors.update({"model.mm_projector.video": torch.zeros(2).bfloat16()})),
        r"1 source tensors without a target:\s+model.mm_projector.video",
    ),
    "bias of the head": (edit_weights(lambda tensors: tensors.update(HEAD_BIAS)), r"without a target:\s+lm_head.bias"),
    "too few rows": (
        edit_weights(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(300, 64, dtype=torch.bfloat16)})),
        r"lm_head.weight has shape \(300, 64\), expected \(355, 64\)",
    ),
    "mixed dtypes": (
        edit_weights(lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].float()})),
        "floating point tensors of 2 dtypes",
    ),
    "no weights": (remove_weights, "has no weights"),
    "adapter alone": (leave_adapter, "has only an adapter.*adapter_model.safetensors.*merge_lora_weights.py"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "is no JSON"),
    "LLaVA-1.5": (lambda folder: edit_json(folder / "config.json", model_type="llava_llama"), "'llava_llama'"),
    "other model": (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "'bert'"),
    "other layers": (
        lambda folder: edit_json(folder / "config.json", moe={"moe_layers_idx": [1, 3], "num_experts": [4, 4]}),
        "source tensors without a target",
    ),
    "no tokenizer": (lambda folder: (folder / "vocab.json").unlink(), None),
    "tokenizer of another model": (give_no_placeholder_room, "has 355 tokens"),
    "unknown vision tower": (lambda folder: edit_json(folder / "config.json", mm_image_tower="me/mine"), "'me/mine'"),
}


def assert_nothing_left(folder):
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_wrong_checkpoint_is_one_error_and_leaves_nothing(release, breakage):
    edit, message = BREAKAGES[breakage]
    edit(release)
    with pytest.raises((ValueError, OSError), match=message):
        convert(release)
    assert_nothing_left(release)


def test_placeholder_is_the_processor_ones(converted):
    # Where a tokenizer's files do not say how many tokens it has, the configuration has all of the embeddings' rows.
    config = MoeLlavaConfig.from_pretrained(converted["phi_clip336"][0], image_token_id=384)
    config.text_config.vocab_size = 384
    processor = MoeLlavaProcessor.from_pretrained(converted["phi_clip336"][0])
    set_image_token(config, processor, Path("settings"))
    assert config.image_token_id == processor.image_token_id == 355
    config.text_config.vocab_size = 354
    with pytest.raises(ValueError, match="in settings has 355 tokens, but .* say 354"):
        set_image_token(config, processor, Path("settings"))


def test_options_that_do_not_apply(release):
    with pytest.raises(ValueError, match="`--base`.* is for the output of the first training stage"):
        convert(release, base=release)
    with pytest.raises(ValueError, match="`--lora-alpha`.*has none"):
        convert(release, lora_alpha=16)
    assert_nothing_left(release)


def test_native_checkpoint_is_refused(converted, tmp_path):
    with pytest.raises(ValueError, match="It is converted already"):
        convert(converted["phi_clip336"][0], tmp_path / "out")


def test_output_that_is_not_empty_is_refused_before_anything_else(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        convert("owner/never-downloaded", tmp_path)


@pytest.mark.parametrize("stage", ["weights", "processor"])
def test_interruption_leaves_what_a_rerun_goes_on_with(release, monkeypatch, stage, converted):
    output = release.parent / "out"

    def interrupt(*args, **kwargs):
        assert (output.parent / ".out.incomplete" / "conversion_manifest.json").exists()
        raise KeyboardInterrupt

    owner, name = (writing, "write_shard") if stage == "weights" else (MoeLlavaProcessor, "save_pretrained")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(release)
    assert not output.exists()
    assert (output.parent / ".out.incomplete" / "model.safetensors").exists() == (stage == "processor")
    convert(release)
    assert sorted(path.name for path in output.parent.iterdir()) == ["out", release.name]
    assert_equal(tensors_of(output), tensors_of(converted["phi_clip336"][0]))


def test_push_to_hub(release, monkeypatch):
    calls = []
    monkeypatch.setattr(scripting, "create_repo", lambda repo_id, exist_ok: calls.append(repo_id))
    monkeypatch.setattr(scripting, "upload_folder", lambda **arguments: calls.append(arguments["folder_path"]))
    output = convert(release, push_to_hub="me/mine")
    assert calls == ["me/mine", output]
    with pytest.raises(ValueError, match="Repo id"):
        convert(release, release.parent / "second", push_to_hub="no repo!")


def test_command_line(release, capsys):
    output = release.parent / "out"
    script.main(["--checkpoint", str(release), "--output", str(output), "--dtype", "float32"])
    assert f"in float32, to {output}." in capsys.readouterr().out
    for arguments in (["--checkpoint", str(release.parent), "--output", str(output)], [], ["--lora-alpha", "much"]):
        with pytest.raises(SystemExit) as exit_info:
            script.main(arguments)
        assert exit_info.value.code == 2
