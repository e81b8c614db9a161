"""What users of transformers do with a model, done with this one."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache

from llava_family import (
    LlavaMoleConfig,
    LlavaMoleForCausalLM,
    LlavaMoleImageProcessorPil,
    LlavaMoleTextConfig,
    LlavaMoleTextModel,
    LlavaUhdConfig,
    LlavaUhdForConditionalGeneration,
)
from llava_family.llava_mole import layers_llava_mole
from llava_family.llava_mole.layers_llava_mole import MoleExperts
from llava_family.training import freeze_for_mole_tuning

from .tiny import NUM_IMAGE_TOKENS, SQUARE, TEXT_CONFIG, give_experts_weight, labels_of, tiny_batch, tiny_model


ROUTINGS = ("top1", "dense")


def gradients(model, batch, **kwargs):
    model.zero_grad()
    model(**batch, labels=labels_of(batch, model), **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradient_checkpointing(routing):
    model = tiny_model(routing=routing).train()
    batch = tiny_batch(model)
    expected = gradients(model, batch)
    model.activation_checkpointing_enable()
    actual = gradients(model, batch)
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-5)
    router = "model.language_model.layers.0.mlp.mole_router.weight"
    assert actual[router].abs().max() > 0


def test_reentrant_checkpointing_does_not_leave_routers_untrained_in_silence():
    model = tiny_model().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    batch = tiny_batch(model)
    with pytest.raises(ValueError, match="use_reentrant"):
        model(**batch, labels=labels_of(batch, model))
    # Nothing to learn, nothing to complain of
    freeze_for_mole_tuning(model)
    for module in model.modules():
        if isinstance(module, layers_llava_mole.MoleRouter):
            module.requires_grad_(False)
    model(**batch, labels=labels_of(batch, model)).loss.backward()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_with_and_without_a_cache(routing):
    model = tiny_model(routing=routing)
    batch = tiny_batch(model)
    with torch.no_grad():
        whole = model(**batch, use_cache=False)
        assert whole.past_key_values is None
        cache = DynamicCache(config=model.config)
        prompt = {"input_ids": batch["input_ids"][:, :25], "pixel_values": batch["pixel_values"]}
        steps = [model(**prompt, past_key_values=cache).logits]
        for position in range(25, 30):
            one = batch["input_ids"][:, position : position + 1]
            steps.append(model(input_ids=one, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole.logits, atol=1e-5, rtol=1e-5)
    cached = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=False), cached)
    static = model.generate(**batch, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(static, cached)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(routing, side):
    model = tiny_model(routing=routing)
    batch = tiny_batch(model)
    short, padding = batch["input_ids"][1:, :24], torch.zeros(1, 6, dtype=torch.long)
    parts = (padding, short) if side == "left" else (short, padding)
    masks = (padding, torch.ones_like(short)) if side == "left" else (torch.ones_like(short), padding)
    padded = {
        "input_ids": torch.cat([batch["input_ids"][:1], torch.cat(parts, dim=1)]),
        "attention_mask": torch.cat([batch["attention_mask"][:1], torch.cat(masks, dim=1)]),
        "pixel_values": batch["pixel_values"],
    }
    alone = {"input_ids": short, "pixel_values": batch["pixel_values"][1:]}
    with torch.no_grad():
        logits = model(**padded).logits
        real = logits[1, 6:] if side == "left" else logits[1, :24]
        torch.testing.assert_close(real, model(**alone).logits[0], atol=1e-5, rtol=1e-5)
        # What the loss counts is real as well.
        rows = [
            model(**{name: value[row : row + 1] for name, value in padded.items()}, output_router_logits=True).aux_loss
            for row in range(2)
        ]
        whole = model(**padded, output_router_logits=True).aux_loss
        torch.testing.assert_close(whole, torch.stack(rows).mean(), atol=1e-6, rtol=0)
        torch.testing.assert_close(model(**alone, output_router_logits=True).aux_loss, rows[1], atol=1e-6, rtol=0)
    if side == "left":
        generated = model.generate(**padded, max_new_tokens=5, do_sample=False)
        expected = model.generate(**alone, max_new_tokens=5, do_sample=False)
        assert torch.equal(generated[1, 30:], expected[0, 24:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_half_precision(routing, dtype):
    exact = tiny_model(routing=routing, initializer_range=0.02)
    half = copy.deepcopy(exact).to(dtype)
    batch = tiny_batch(exact)
    half_batch = {**batch, "pixel_values": batch["pixel_values"].to(dtype)}
    with torch.no_grad():
        expected = exact(**batch, output_router_logits=True)
        actual = half(**half_batch, output_router_logits=True)
    assert actual.logits.dtype == dtype and actual.router_logits[0].dtype == actual.aux_loss.dtype == torch.float32
    drift = (actual.logits.float() - expected.logits).norm() / expected.logits.norm()
    # Rounded inputs may send single tokens to another expert under top-1 routing.
    assert drift < (0.05 if routing == "dense" else 0.3), drift
    half.train()(**half_batch, labels=labels_of(batch, half)).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in half.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS)
def test_compilation_without_graph_breaks(routing):
    model = tiny_model(routing=routing, num_experts=8, r=16)
    batch = tiny_batch(model, num_rows=16)  # many tokens, which grouped products would compute without compilation
    assert model.model.language_model.layers[0].mlp.gate_proj.mole_experts.can_group(torch.zeros(16, 30, 32))
    labels = labels_of(batch, model)
    # First without compilation: transformers adds the hooks that capture outputs under a lock, which dynamo refuses.
    with torch.no_grad():
        expected = model(**batch, labels=labels)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, expected.logits, atol=1e-5, rtol=1e-5)
    loss = compiled(**batch, labels=labels).loss
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    assert model.model.language_model.layers[0].mlp.mole_router.weight.grad.abs().max() > 0


def test_grouped_products_are_used_and_change_nothing(monkeypatch):
    model = tiny_model(num_experts=8, r=16)
    batch = tiny_batch(model, num_rows=16)
    grouped, original = [], MoleExperts._grouped
    monkeypatch.setattr(MoleExperts, "_grouped", lambda self, *args: grouped.append(self) or original(self, *args))
    actual = gradients(model, batch)
    assert len(grouped) == 3 * 2  # three products in each of two layers
    monkeypatch.setattr(layers_llava_mole, "GROUPED_TOKENS", 10**9)
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6 * max(1, gradient.abs().max().item()), rtol=1e-4)
    assert len(grouped) == 3 * 2


def test_without_experts_weight_the_base_is_bit_equal():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {key: value for key, value in TEXT_CONFIG.items() if key in LlamaConfig.__dataclass_fields__}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**config)).eval()
    for routing in ROUTINGS:
        adapted = LlavaMoleTextModel(LlavaMoleTextConfig(**{**TEXT_CONFIG, "routing": routing})).eval()
        missing, unexpected = adapted.load_state_dict(base.model.state_dict(), strict=False)
        assert not unexpected and all("mole_" in name for name in missing)
        ids = torch.arange(3, 40)[None]
        with torch.no_grad():
            assert torch.equal(adapted(ids).last_hidden_state, base.model(ids).last_hidden_state)


def test_dense_checkpoints_load_into_a_mixture(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    config = {key: value for key, value in TEXT_CONFIG.items() if key in LlamaConfig.__dataclass_fields__}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(tmp_path)
    adapted = LlavaMoleTextModel.from_pretrained(tmp_path, config=LlavaMoleTextConfig(**TEXT_CONFIG)).eval()
    base = LlamaModel.from_pretrained(tmp_path).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(adapted(ids).last_hidden_state, base(ids).last_hidden_state)
    experts = adapted.layers[1].mlp.up_proj.mole_experts
    assert (experts.weight_B == 0).all() and 0 < experts.weight_A.abs().max() <= 32**-0.5
    assert adapted.layers[1].mlp.mole_router.bias.abs().max() > 0


def test_saving_and_loading(tmp_path):
    model = tiny_model(routing="dense")
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == set(model.state_dict())
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = model(**batch).logits
        for auto_class in (LlavaMoleForCausalLM, AutoModelForCausalLM, AutoModelForImageTextToText):
            loaded = auto_class.from_pretrained(tmp_path)
            assert type(loaded) is LlavaMoleForCausalLM and loaded.config.text_config.routing == "dense"
            assert torch.equal(loaded(**batch).logits, expected)
        headless = AutoModel.from_pretrained(tmp_path)
        hidden_states = headless(**batch).last_hidden_state
    assert torch.equal(model.lm_head(hidden_states), expected)


@pytest.mark.parametrize("vision_encoding", ["square", "slices"])
def test_uint8_pixels_are_normalised_by_the_model(vision_encoding):
    model = tiny_model(vision_encoding)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8))
    processor = LlavaMoleImageProcessorPil(
        vision_encoding=vision_encoding,
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        base_size=56,
        max_slices=1,
    )
    usual = processor(image, return_tensors="pt")
    raw = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
    assert raw["pixel_values"].dtype == torch.uint8
    num_features = 4 if vision_encoding == "slices" else 16
    input_ids = torch.tensor([[5] + [model.config.image_token_id] * (num_features + 2) + [6]])
    with torch.no_grad():
        expected, actual = (model(input_ids=input_ids, **inputs).logits for inputs in (usual, raw))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_start_and_end_are_learned():
    model = tiny_model()
    batch = tiny_batch(model, num_rows=1)
    with torch.no_grad():
        (features,) = model.get_image_features(batch["pixel_values"]).pooler_output
    assert features.shape == (NUM_IMAGE_TOKENS, 32)
    assert torch.equal(features[0], model.model.image_boundaries.start[0, 0])
    assert torch.equal(features[-1], model.model.image_boundaries.end[0, 0])
    found = gradients(model, batch)
    for name in ("start", "end"):
        assert found[f"model.image_boundaries.{name}"].abs().max() > 0
    torch.manual_seed(0)
    fresh = LlavaMoleForCausalLM(LlavaMoleConfig(text_config=TEXT_CONFIG, vision_config=SQUARE))
    assert 0.1 < fresh.model.image_boundaries.start.std() / 32**-0.5 < 3


def test_several_images_and_none():
    model = tiny_model()
    image = [model.config.image_token_id] * NUM_IMAGE_TOKENS
    ids = torch.tensor([[5, *image, 6, *image, 7], [8] * (2 * NUM_IMAGE_TOKENS + 3)])
    pixel_values = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixel_values).logits
        torch.testing.assert_close(model(input_ids=ids[:1], pixel_values=pixel_values).logits[0], logits[0])
        torch.testing.assert_close(model(input_ids=ids[1:]).logits[0], logits[1])
    with pytest.raises(ValueError, match="tokens: 36, features: 18"):
        model(input_ids=ids, pixel_values=pixel_values[:1])


def test_slices():
    model = tiny_model("slices")
    torch.manual_seed(0)
    # Two slices of 2x4 patches and an overview of 3x3, four features each; a comma and a newline between them
    grids = torch.tensor([[[1, 2], [4, 2], [3, 3]]])
    pixel_values = torch.randn(2 * 8 + 9, 3 * 14 * 14)
    with torch.no_grad():
        (features,) = model.get_image_features(pixel_values, image_grids=grids).pooler_output
    assert features.shape == (1 + 3 * 4 + 1, 32)
    assert torch.equal(features[0], model.model.image_boundaries.start[0, 0])
    image = model.config.image_token_id
    ids = torch.tensor([[5, image, *[image] * 4, 6, *[image] * 4, 7, *[image] * 4, image, 8]])
    inputs = {"input_ids": ids, "pixel_values": pixel_values, "image_grids": grids}
    outputs = model(**inputs, labels=ids.masked_fill(ids == image, -100))
    outputs.loss.backward()
    assert outputs.logits.shape == (1, ids.shape[1], 99)
    assert model.model.resampler.query.grad.abs().max() > 0
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)


def test_text_model_in_llava_uhd():
    torch.manual_seed(0)
    vision_config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaUhdConfig(
        text_config=TEXT_CONFIG, vision_config={**vision_config, "image_size": 56}, resampler_num_attention_heads=2
    )
    model = give_experts_weight(LlavaUhdForConditionalGeneration(config)).eval()
    assert isinstance(model.model.language_model, LlavaMoleTextModel)
    assert model(input_ids=torch.arange(3, 20)[None]).logits.shape == (1, 17, 99)


def test_one_expert_has_no_balance_loss():
    model = tiny_model(num_experts=1)
    batch = tiny_batch(model)
    outputs = model(**batch, labels=labels_of(batch, model), output_router_logits=True)
    assert outputs.aux_loss is None and outputs.router_logits[0].shape == (2, 30, 1)


def test_without_adapters_of_the_attention():
    model = tiny_model(attention_target_modules=[])
    assert not any("self_attn" in name and "mole_" in name for name in model.state_dict())
    assert not any("self_attn" in name and "mole_" in name for name in model.tp_plan)
    assert any(name.endswith("mlp.down_proj.mole_experts") for name in model.tp_plan)


def test_balance_loss_counts_as_configured():
    model = tiny_model()
    batch = tiny_batch(model)
    labels = labels_of(batch, model)
    with torch.no_grad():
        losses = {}
        for coefficient in (0.0, 0.5):
            model.config.router_aux_loss_coef = coefficient
            losses[coefficient] = model(**batch, labels=labels)
        torch.testing.assert_close(losses[0.5].loss, losses[0.0].loss + 0.5 * losses[0.5].aux_loss)
        pooled = losses[0.5].aux_loss
        model.config.text_config.balance_loss = "per_layer"
        assert abs(model(**batch, labels=labels).aux_loss - pooled) > 0.1
        # Gradient accumulation averages it.
        whole = model(**batch, labels=labels)
        num_items = 4 * (labels[:, 1:] != -100).sum()
        share = model(**batch, labels=labels, num_items_in_batch=num_items)
        torch.testing.assert_close(4 * share.loss, whole.loss)


def test_penalty_of_repetition_leaves_the_prompt_alone():
    model = tiny_model()
    batch = tiny_batch(model, num_rows=2)
    inputs = {**batch, "do_sample": False, "max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    outputs = model.generate(**inputs, repetition_penalty=3.0, output_scores=True)
    generated = outputs.sequences[:, 30:]
    for step, (logits, scores) in enumerate(zip(outputs.logits, outputs.scores, strict=True)):
        expected = logits.clone()
        for row in range(2):
            for token in {1, *generated[row, :step].tolist()}:  # 1 is BOS
                value = logits[row, token]
                expected[row, token] = value * 3 if value < 0 else value / 3
        torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 0}, "`num_experts` must be at least 1"),
        ({"r": 0}, "`r` must be at least 1"),
        ({"lora_alpha": 0}, "`lora_alpha` must be positive"),
        ({"lora_dropout": 1.0}, "`lora_dropout` must lie in"),
        ({"attention_target_modules": ["q_proj", "qkv"]}, "has \\['qkv'\\] in it"),
        ({"routing": "top2"}, "routing"),
        ({"balance_loss": "per_sample"}, "balance_loss"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(Exception, match=message):
        LlavaMoleTextConfig(**settings)


# Paper and code train the same parts (specification, section 9); counts at 7B.
TRAINABLE = {(16, 3): 107_757_664, (32, 3): 194_134_112, (32, 8): 426_787_072, (128, 3): 712_392_800}


@pytest.mark.parametrize(("r", "num_experts"), TRAINABLE)
def test_trainable_parameters_at_7b(r, num_experts):
    hidden, inner, layers, vision = 4096, 11008, 32, 1024
    with torch.device("meta"):
        config = LlavaMoleConfig(
            text_config={
                "model_type": "llava_mole_text",
                "intermediate_size": inner,
                "r": r,
                "num_experts": num_experts,
            }
        )
        model = LlavaMoleForCausalLM(config)
    trainable = freeze_for_mole_tuning(model)
    counted = sum(model.get_parameter(name).numel() for name in trainable)
    closed_form = (
        layers * num_experts * 3 * r * (hidden + inner)  # experts
        + layers * 4 * r * 2 * hidden  # adapters of the attention
        + layers * num_experts * (hidden + 1)  # routers
        + (vision + 1) * hidden
        + (hidden + 1) * hidden  # projector
        + 2 * hidden  # start and end
    )
    assert counted == closed_form == TRAINABLE[r, num_experts]
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(trainable)
