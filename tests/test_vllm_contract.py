"""What vLLM's backend for transformers' models asks of a model and its processor, on a CPU.

vLLM itself is not installed here, and none of this was run with it. The contract was read in its source as of
autumn 2026 (`vllm/model_executor/models/transformers/{base,multimodal,moe,utils}.py` and `models/registry.py` at
several commits), its page on custom models and transformers' "Transformers as modeling backend". Helpers here do what
that source does, as far as it concerns a model: they replace the attention, cut the layers for pipeline parallelism,
name the weights, expand the prompt and split the processor's outputs into images.
"""

import importlib
import json
import math
import re
import runpy
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel
from transformers.conversion_mapping import WeightRenaming, get_model_conversion_mapping
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import llava_family
from llava_family import (
    LlavaMoleConfig,
    LlavaMoleForCausalLM,
    LlavaUhdConfig,
    LlavaUhdForConditionalGeneration,
    MoeLlavaConfig,
    MoeLlavaForCausalLM,
)


ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
MOLE = FIXTURES / "llava_mole" / "original_checkpoint"
BACKBONES = ("phi", "stablelm", "qwen2", "llama", "mistral")
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
HEADS = {
    "uhd": LlavaUhdForConditionalGeneration,
    "mole": LlavaMoleForCausalLM,
    **dict.fromkeys(BACKBONES, MoeLlavaForCausalLM),
}
MODELS = tuple(HEADS)
CHECKPOINTS = ("uhd", "phi_clip336", "stablelm_clip336", "qwen_clip336", "stablelm_siglip384", "mole")


def build_config(name, **text):
    if name == "uhd":
        config = {"vision_config": VISION, "text_config": {"model_type": "llama", **TEXT, **text}}
        return LlavaUhdConfig(**config, num_queries=4, resampler_num_attention_heads=2)
    vision = {"model_type": "clip_vision_model", **VISION}
    if name == "mole":
        return LlavaMoleConfig(vision_config=vision, text_config={"r": 4, **TEXT, **text})
    text = {"model_type": f"moe_llava_{name}_text", **TEXT, **text}
    return MoeLlavaConfig(vision_config=vision, text_config=text)


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def head(name):
    """A model with weights of a size that lets every layer matter."""
    torch.manual_seed(0)
    model = HEADS[name](build_config(name)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The goldens' checkpoints, converted."""
    folders = {}
    for checkpoint in CHECKPOINTS:
        family = {"uhd": "llava_uhd", "mole": "llava_mole"}.get(checkpoint, "moe_llava")
        convert = runpy.run_path(str(ROOT / "conversion_scripts" / f"convert_{family}_weights_to_hf.py"))
        original, parts = FIXTURES / family / checkpoint / "original_checkpoint", {}
        if checkpoint == "uhd":
            original, parts = (
                FIXTURES / family / "original_checkpoint",
                {"vision_tower": FIXTURES / family / "clip_vision_tower"},
            )
        if checkpoint == "mole":
            original = MOLE / "llava_mole_r16_a32_e3.pt"
            parts = {"vicuna": MOLE / "vicuna-7b-v1.5", "clip": MOLE / "clip-vit-large-patch14-336"}
        output = tmp_path_factory.mktemp("vllm") / checkpoint
        convert[f"convert_{family}_checkpoint"](original, output, dtype="float32", report=lambda line: None, **parts)
        folders[checkpoint] = output
    return folders


# 1. The class is found


@pytest.fixture
def entry_points(monkeypatch):
    arguments = {}
    monkeypatch.setattr("setuptools.setup", arguments.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return arguments["entry_points"]["vllm.general_plugins"]


@pytest.mark.slow
def test_a_worker_knows_the_families_from_the_entry_point_alone(entry_points):
    (entry,) = entry_points
    label, _, value = (part.strip() for part in entry.partition("="))
    module, _, function = value.partition(":")
    assert label == "llava_family"
    assert callable(getattr(importlib.import_module(module), function))
    code = f"""
import importlib, transformers
register = getattr(importlib.import_module({module!r}), {function!r})
register(); register()
for model_type, head in (("llava_uhd", "LlavaUhdForConditionalGeneration"), ("moe_llava", "MoeLlavaForCausalLM"),
                         ("llava_mole", "LlavaMoleForCausalLM")):
    config = transformers.AutoConfig.for_model(model_type)
    found = getattr(transformers, head)  # as vLLM's registry looks it up
    assert issubclass(found, transformers.PreTrainedModel) and found.config_class is type(config)
    assert found.is_backend_compatible()
    print(head)
"""
    environment = {"PATH": "", "PYTHONPATH": str(Path(llava_family.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [HEADS["uhd"].__name__, HEADS["phi"].__name__, HEADS["mole"].__name__]


# 2. The configuration


def test_configuration_has_what_vllm_reads(name):
    config = build_config(name)
    text_config = config.get_text_config()
    assert text_config is config.text_config and config != text_config  # which makes it multimodal
    assert isinstance(config.image_token_id, int) and config.vision_config is not None
    for field in ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        assert getattr(text_config, field) > 0
    assert text_config.num_key_value_heads == 2


# 3. The base model


def base_model(name, head=None, attention=None):
    """As vLLM builds it: by AutoModel, from the configuration, with its own attention in the text model."""
    config = build_config(name)
    if attention is not None:
        config.get_text_config()._attn_implementation = attention
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    if head is not None:
        model.load_state_dict(head.model.state_dict())
    return model


def test_base_model_has_no_head_and_names_its_parts(name, head):
    model = base_model(name)
    assert isinstance(model, PreTrainedModel) and type(model) is type(head.model)
    assert model.base_model_prefix == "model"
    assert model._supports_attention_backend and model.get_decoder()._supports_attention_backend
    assert model.get_decoder() is model.language_model
    assert model.get_encoder(modality="image") is model.vision_tower
    assert model.get_input_embeddings() is model.language_model.embed_tokens
    assert not any("lm_head" in key for key, _ in model.named_parameters())


class Requests:
    """In the place of vLLM's `Attention`: causal within every request, whatever mask the model made."""

    def __init__(self, lengths):
        self.lengths, self.calls = lengths, []

    def forward(self, query, key, value, scaling):  # of shape (tokens, heads, head size)
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        outputs, start = [], 0
        for length in self.lengths:
            q, k, v = (tensor[start : start + length].transpose(0, 1) for tensor in (query, key, value))
            hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
            weights = (q @ k.transpose(1, 2) * scaling).masked_fill(hidden, -math.inf).softmax(-1)
            outputs.append((weights @ v).transpose(0, 1))
            start += length
        return torch.cat(outputs).flatten(1)


def vllm_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    instance = attention_instances[module.layer_idx]
    instance.calls.append(module.layer_idx)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return instance.forward(query, key, value, scaling), None


@pytest.fixture(autouse=True, scope="module")
def registered_attention():
    ALL_ATTENTION_FUNCTIONS["vllm_contract"] = vllm_attention
    yield
    del ALL_ATTENTION_FUNCTIONS._local_mapping["vllm_contract"]


def run(model, inputs_embeds, positions, attention):
    with torch.no_grad():
        outputs = model(
            input_ids=None,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            position_ids=positions,
            attention_instances=attention,
            return_dict=False,
        )
    return outputs[0]


LENGTHS = (5, 9, 1)


@pytest.fixture(scope="module")
def requests(head):
    """Embeddings and positions of several requests, and the text model's last hidden states of each by itself.

    Positions are three apart, since rotary embeddings depend on distances alone.
    """
    generator = torch.Generator().manual_seed(1)
    embeddings = [torch.randn(1, length, TEXT["hidden_size"], generator=generator) for length in LENGTHS]
    positions = [torch.arange(0, 3 * length, 3)[None] for length in LENGTHS]
    with torch.no_grad():
        expected = [
            head.model.language_model(inputs_embeds=one, position_ids=at).last_hidden_state[0]
            for one, at in zip(embeddings, positions, strict=True)
        ]
    return torch.cat(embeddings, dim=1), torch.cat(positions, dim=1), torch.cat(expected)


def test_attention_receives_what_vllm_passes_and_no_layer_needs_a_mask(name, head, requests):
    """Several requests in one row, told apart by positions and by the attention alone."""
    inputs_embeds, positions, expected = requests
    attention = {layer: Requests(LENGTHS) for layer in range(TEXT["num_hidden_layers"])}
    found = run(base_model(name, head, "vllm_contract"), inputs_embeds, positions, attention)
    assert [instance.calls for instance in attention.values()] == [[0], [1]]
    torch.testing.assert_close(found[0], expected, atol=2e-5, rtol=1e-4)


# 4. Parallelism


class Missing(nn.Identity):
    """A layer of another rank: hands its first input on."""

    def forward(self, *args, **kwargs):
        return args[0] if args else next(iter(kwargs.values()))


def test_pipeline_parallelism(name, head, requests):
    """Each rank keeps one layer. Layers of other ranks have no attributes that the model may read."""
    inputs_embeds, positions, expected = requests
    attention = {layer: Requests(LENGTHS) for layer in range(2)}
    hidden_states = inputs_embeds
    for rank in range(2):
        model = base_model(name, head, "vllm_contract")
        assert model.supports_pp_plan
        names = list(model._pp_plan)
        (lists,) = [part for part in names if isinstance(attrgetter(part)(model), nn.ModuleList)]
        position = names.index(lists)
        layers = attrgetter(lists)(model)
        layers[1 - rank] = Missing()
        for part in names[position + 1 :] if rank == 0 else names[:position]:
            parent, _, child = part.rpartition(".")
            setattr(attrgetter(parent)(model), child, Missing())
        assert {part.rpartition(".")[2] for part in names[:position]} >= {"embed_tokens"}
        assert names[position + 1 :], "the last norm"
        hidden_states = run(model, hidden_states, positions, attention)
    torch.testing.assert_close(hidden_states[0], expected, atol=2e-5, rtol=1e-4)


def test_tensor_parallel_plan_names_layers_of_the_text_model(name):
    """vLLM knows the styles below and copies a layer of another style to every rank, whose attention has its share of
    the heads alone: StableLM is for one rank."""
    model = base_model(name)
    plan = {f"model.{pattern}": style for pattern, style in model.tp_plan.items()}
    styles = {}
    for key, module in model.named_modules(prefix="model"):
        pattern = next((pattern for pattern in plan if re.match(pattern, key)), None)
        if isinstance(module, nn.Linear):
            styles[key] = plan.get(pattern, "replicate")
    attention = {style for key, style in styles.items() if ".language_model." in key and ".self_attn." in key}
    sharded = {"colwise_gather_output", "rowwise_split_input"} if name == "stablelm" else {"colwise", "rowwise"}
    assert attention == sharded
    assert all(style == "replicate" for key, style in styles.items() if ".language_model." not in key)


def test_linear_layers_are_no_more_than_linear(name):
    """vLLM makes its own layer of every `nn.Linear`. LLaVA-MoLE's hold their experts, which would be lost: their
    weights then have no place, so vLLM refuses to load them. It cannot serve this family."""
    kinds = {type(module).__name__ for module in base_model(name).modules() if isinstance(module, nn.Linear)}
    assert kinds == ({"Linear", "MoleLinear", "MoleRouter"} if name == "mole" else {"Linear"})


@pytest.mark.parametrize("backbone", BACKBONES)
def test_experts_are_what_vllm_fuses(backbone):
    """Packed matrices, a gate before `silu`, chosen by the block. Phi has neither: its experts stay as they are."""
    model = base_model(backbone)
    config = model.config.get_text_config()
    blocks = [layer.mlp for layer in model.language_model.layers if hasattr(layer.mlp, "experts")]
    assert len(blocks) == 1 and config.num_experts == 4 and config.num_experts_per_tok == 2
    parameters = dict(blocks[0].experts.named_parameters())
    fused = all(parameter.ndim == 3 for parameter in parameters.values())
    assert fused == (backbone != "phi")
    if fused:
        assert config.hidden_act == "silu"
        shapes = {key: tuple(parameter.shape) for key, parameter in parameters.items()}
        assert shapes == {"gate_up_proj": (4, 2 * 48, 32), "down_proj": (4, 32, 48)}
    calls = []

    class Experts(nn.Module):
        def forward(self, hidden_states, topk_ids, topk_weights):
            calls.append((hidden_states.shape, topk_ids.shape, topk_weights.sum(-1)))
            assert topk_ids.dtype == torch.int64
            return hidden_states

    blocks[0].experts = Experts()
    blocks[0](torch.randn(1, 6, 32))
    ((*shapes, total),) = calls
    assert shapes == [(6, 32), (6, 2)]
    torch.testing.assert_close(total, torch.ones(6))


# 5. Weights


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_weights_are_found_by_their_prefix(checkpoint, converted):
    """`model.` and the base model's own names, beside the head. Renamings leave native names alone."""
    with safe_open(converted[checkpoint] / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(converted[checkpoint]))
    assert names == {f"model.{key}" for key in model.state_dict()} | {"lm_head.weight"}
    for renaming in get_model_conversion_mapping(model):
        if isinstance(renaming, WeightRenaming):
            assert {key: renaming.rename_source_key(key)[0] for key in names} == {key: key for key in names}


# 6. The processor

# Of several views, of one, and of another shape; `(width, height)`
SIZES = ((640, 427), (100, 90), (200, 700))


def images():
    generator = torch.Generator().manual_seed(2)
    arrays = [torch.randint(0, 256, (height, width, 3), generator=generator) for width, height in SIZES]
    return [Image.fromarray(array.to(torch.uint8).numpy()) for array in arrays]


def processed(processor, pictures):
    """As vLLM calls it: with placeholders for text. Outputs, and the tokens of each placeholder."""
    outputs = processor(
        text=processor.image_token * len(pictures),
        images=pictures,
        return_tensors="pt",
        return_text_replacement_offsets=True,
    )
    (offsets,) = outputs.pop("text_replacement_offsets")
    assert [entry["type"] for entry in offsets] == ["image"] * len(pictures)
    texts = [entry["replacement"] for entry in offsets]
    return outputs, [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_token_counts_follow_from_sizes(checkpoint, converted):
    processor = AutoProcessor.from_pretrained(converted[checkpoint])
    config = AutoConfig.from_pretrained(converted[checkpoint])
    assert processor.image_token_id == config.image_token_id
    assert processor.tokenizer.convert_tokens_to_ids(processor.image_token) == processor.image_token_id
    assert processor.image_token_ids == [processor.image_token_id]
    counts = processor._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in SIZES])
    outputs, replacements = processed(processor, images())
    # vLLM takes the most frequent token for the one that stands for features.
    assert [max(ids, key=ids.count) for ids in replacements] == [processor.image_token_id] * len(SIZES)
    assert [ids.count(processor.image_token_id) for ids in replacements] == counts["num_image_tokens"]
    assert sum(counts["num_image_patches"]) == len(outputs["pixel_values"])
    largest = processor._get_num_multimodal_tokens(image_sizes=([10_000, 10_000],))  # what vLLM profiles with
    assert largest["num_image_tokens"][0] >= max(counts["num_image_tokens"])
    marked = processor(
        text=processor.image_token * 3, images=images(), return_tensors="pt", return_mm_token_type_ids=True
    )
    assert marked["mm_token_type_ids"].sum() == sum(counts["num_image_tokens"])


@pytest.mark.parametrize("checkpoint", CHECKPOINTS[:-1])
def test_expanding_a_tokenized_prompt_gives_the_processors_own(checkpoint, converted):
    """vLLM expands placeholders of a prompt that is tokenized already. The space that SentencePiece begins the text
    behind an image with is then the chat template's to write."""
    processor = AutoProcessor.from_pretrained(converted[checkpoint])
    content = [{"type": "image"}, {"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is this?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = processor(text=prompt, images=images())["input_ids"][0]
    replacements = iter(processed(processor, images())[1])
    if checkpoint == "uhd":
        prompt = prompt.replace("<image>\n", "<image> \n")
    ids = []
    for token in processor.tokenizer(prompt)["input_ids"]:
        ids += next(replacements) if token == processor.image_token_id else [token]
    assert ids == list(expected)


# 7. Image features


def split_into_images(processor, outputs):
    """vLLM's items: rows of every output by image, as many as the processor counts; one image alone is all of it."""
    counts = processor._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in SIZES])
    rows = counts["num_image_patches"]
    items, start = [], 0
    for number in rows:
        items.append({key: value[start : start + number] for key, value in outputs.items()})
        start += number
    return items


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_features_come_by_image_as_many_as_placeholders(checkpoint, converted):
    processor = AutoProcessor.from_pretrained(converted[checkpoint])
    model = AutoModel.from_pretrained(converted[checkpoint]).eval()
    outputs, replacements = processed(processor, images())
    inputs = {key: value for key, value in outputs.items() if key not in ("input_ids", "attention_mask")}
    pixel_values = inputs.pop("pixel_values")
    with torch.no_grad():
        together = model.get_image_features(pixel_values, **inputs).pooler_output
        assert isinstance(together, list) and len(together) == len(SIZES)
        for features, ids in zip(together, replacements, strict=True):
            assert features.shape == (ids.count(processor.image_token_id), model.config.text_config.hidden_size)
        # Cached by image, so that no image may depend on the others of its prompt
        for picture, features in zip(images(), together, strict=True):
            alone = {key: value for key, value in processed(processor, [picture])[0].items() if key in outputs}
            alone = {key: value for key, value in alone.items() if key not in ("input_ids", "attention_mask")}
            (found,) = model.get_image_features(alone.pop("pixel_values"), **alone).pooler_output
            torch.testing.assert_close(found, features, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_outputs_split_by_rows_are_the_images_own_or_refused(checkpoint, converted):
    """vLLM cuts every output by rows of `pixel_values`. LLaVA-UHD's `image_grids` has one row for an image, so that
    prompts of several images are for square views alone; what is cut wrongly is an error, not another answer."""
    processor = AutoProcessor.from_pretrained(converted[checkpoint])
    model = AutoModel.from_pretrained(converted[checkpoint]).eval()
    outputs, _ = processed(processor, images())
    outputs = {key: value for key, value in outputs.items() if key not in ("input_ids", "attention_mask")}
    items = split_into_images(processor, outputs)
    for picture, item in zip(images(), items, strict=True):
        alone = processed(processor, [picture])[0]
        assert torch.equal(item["pixel_values"], alone["pixel_values"])
        if checkpoint == "uhd":
            with pytest.raises(ValueError, match="image_grids"), torch.no_grad():
                model.get_image_features(**item)
        else:
            assert item.keys() == {"pixel_values"}
    # All images of a prompt at once, as vLLM encodes them while its budget lasts, join to what was cut.
    assert all(torch.equal(torch.cat([item[key] for item in items]), value) for key, value in outputs.items())


# 8. All of it together


def extended(folder):
    """The model with an embedding for the placeholder, which vLLM looks up before it puts features in its place."""
    config = json.loads((folder / "config.json").read_text())
    model = HEADS[{"llava_uhd": "uhd", "moe_llava": "phi", "llava_mole": "mole"}[config["model_type"]]]
    model = model.from_pretrained(folder).eval()
    model.resize_token_embeddings(model.config.image_token_id + 1, mean_resizing=False)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", CHECKPOINTS[:-1])
def test_a_request_with_an_image_gives_the_logits_of_the_model(checkpoint, converted, tmp_path):
    folder = converted[checkpoint]
    processor = AutoProcessor.from_pretrained(folder)
    prompt = f"USER: {processor.image_token} Hello"
    inputs = processor(text=prompt, images=images()[:1], return_tensors="pt")
    head = HEADS["uhd" if checkpoint == "uhd" else "phi"].from_pretrained(folder).eval()
    with torch.no_grad():
        expected = head(**inputs).logits[0]
    # Without that embedding the placeholder is behind the table.
    with pytest.raises(IndexError):
        head.get_input_embeddings()(inputs["input_ids"])

    extended(folder).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.image_token_id == config.get_text_config().vocab_size - 1
    config.get_text_config()._attn_implementation = "vllm_contract"
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model.load_state_dict({key.removeprefix("model."): weights[key] for key in weights if key != "lm_head.weight"})

    input_ids, pixels = inputs.pop("input_ids")[0], inputs.pop("pixel_values")
    inputs.pop("attention_mask")
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(input_ids)
        features = torch.cat(model.get_image_features(pixels, **inputs).pooler_output)
    embeddings[input_ids == processor.image_token_id] = features
    attention = {layer: Requests([len(input_ids)]) for layer in range(config.get_text_config().num_hidden_layers)}
    hidden_states = run(model, embeddings[None], torch.arange(len(input_ids))[None], attention)[0]
    logits = hidden_states @ weights["lm_head.weight"].T
    torch.testing.assert_close(logits[:, : expected.shape[1]], expected, atol=1e-4, rtol=1e-4)
