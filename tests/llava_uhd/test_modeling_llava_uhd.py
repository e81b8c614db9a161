import copy
import math

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llava_family import LlavaUhdConfig, LlavaUhdForConditionalGeneration, plan_slices
from llava_family.llava_uhd import modeling_llava_uhd
from llava_family.llava_uhd.image_processing_pil_llava_uhd import image_grid
from llava_family.llava_uhd.modeling_llava_uhd import (
    LlavaUhdResampler,
    pooling_size,
    region_sampling_weights,
    sample_regions,
)

from .conftest import CLIP, ORIGINAL
from .tiny import tiny_config, tiny_model


GRIDS = [
    (1, 1),
    (1, 40),
    (40, 1),
    (2, 3),
    (5, 5),
    (11, 48),
    (48, 11),
    (12, 12),
    (12, 48),
    (19, 29),
    (24, 24),
    (3, 167),
]


def literal_roi_align(feature_map, box, pool):
    """torchvision's kernel with aligned=False and sampling_ratio=-1, one sample at a time, in float32."""
    (rows, columns), pooled = feature_map.shape, torch.zeros(pool)
    x1, y1, x2, y2 = box
    size = (torch.clamp(y2 - y1, min=1.0), torch.clamp(x2 - x1, min=1.0))
    bins = [size[axis] / pool[axis] for axis in (0, 1)]
    samples = [math.ceil(size[axis] / pool[axis]) for axis in (0, 1)]
    for row in range(pool[0]):
        for column in range(pool[1]):
            total = 0.0
            for sample_y in range(samples[0]):
                for sample_x in range(samples[1]):
                    y = y1 + row * bins[0] + (sample_y + 0.5) * bins[0] / samples[0]
                    x = x1 + column * bins[1] + (sample_x + 0.5) * bins[1] / samples[1]
                    if y < -1 or y > rows or x < -1 or x > columns:
                        continue
                    y, x = max(float(y), 0.0), max(float(x), 0.0)
                    top, left = min(int(y), rows - 1), min(int(x), columns - 1)
                    y, x = (top if top == rows - 1 else y), (left if left == columns - 1 else x)
                    bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
                    below, beside = y - top, x - left
                    total += (1 - below) * (1 - beside) * feature_map[top, left] + (1 - below) * beside * feature_map[
                        top, right
                    ]
                    total += (
                        below * (1 - beside) * feature_map[bottom, left] + below * beside * feature_map[bottom, right]
                    )
            pooled[row, column] = total / (samples[0] * samples[1])
    return pooled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS)
def test_region_sampling_is_roi_align(grid, dtype):
    torch.manual_seed(0)
    rows, columns = grid
    feature_map, regions, pool = torch.randn(grid), 12, pooling_size(grid)
    row_weights, column_weights = region_sampling_weights(grid, regions, dtype)
    sampled = (row_weights @ feature_map @ column_weights.T).unflatten(0, (regions, -1)).unflatten(2, (regions, -1))
    height = math.sqrt(rows * columns / regions**2 / (columns / rows))
    width = height * (columns / rows)
    for i, j in [(0, 0), (0, 11), (11, 0), (11, 11), (5, 7), (10, 2)]:
        corners = torch.tensor([j * width, i * height, j * width + width, i * height + height], dtype=torch.float64)
        box = corners.float().to(dtype).float()
        torch.testing.assert_close(sampled[i, :, j], literal_roi_align(feature_map, box, pool), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("resampler_type", "grid"),
    [
        ("spatial", (4, 6)),
        ("spatial", (1, 16)),  # its samples lie beyond the map in part
        ("perceiver", (4, 6)),
    ],
)
def test_resampler_is_multi_head_attention_of_the_queries(resampler_type, grid):
    """Against torch's own attention, one view and one region at a time: regions are sampled, then projected."""
    model = tiny_model(resampler_type=resampler_type)
    resampler, attention = model.model.resampler, model.model.resampler.attention
    for projection in (attention.k_proj, attention.v_proj):
        nn.init.normal_(projection.bias)
    num_patches = grid[0] * grid[1]
    reference = nn.MultiheadAttention(32, 2, batch_first=True)
    state = {f"out_proj.{kind}": getattr(attention.out_proj, kind) for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        state[f"in_proj_{kind}"] = torch.cat([getattr(getattr(attention, f"{x}_proj"), kind) for x in "qkv"])
    reference.load_state_dict(state)
    features = torch.randn(2 * num_patches, 16)
    with torch.no_grad():
        queries = resampler.ln_q(resampler.query) + resampler.pos_embed
        for view, patches in enumerate(features.split(num_patches)):
            values = resampler.ln_kv(resampler.kv_proj(patches))
            keys = values + resampler.interpolate_positions(grid)
            if resampler_type == "perceiver":
                expected = reference(queries[None], keys[None], values[None])[0][0]
            else:
                key_regions = sample_regions(keys[None], grid, 2)[0]
                value_regions = sample_regions(values[None], grid, 2)[0]
                expected = reference(queries[:, None], key_regions, value_regions)[0][:, 0]
            expected = resampler.output_proj(resampler.ln_post(expected))
            output = resampler(features, [grid, grid])[view]
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_spatial_query_sees_its_own_region_alone():
    resampler = tiny_model().model.resampler
    features = torch.randn(16, 16)
    changed = features.clone()
    changed[-1] += 1.0  # the last patch lies in the last of the 2 x 2 regions
    with torch.no_grad():
        difference = (resampler(features, [(4, 4)]) - resampler(changed, [(4, 4)]))[0].abs().amax(1)
    assert difference[:3].max() == 0
    assert difference[3] > 1e-3


def test_perceiver_defaults():
    config = LlavaUhdConfig(resampler_type="perceiver")
    assert config.num_queries == 64
    assert LlavaUhdConfig().num_queries == 144
    with torch.device("meta"):
        assert LlavaUhdResampler(config).query.shape == (64, 4096)


def test_identity_projection_where_widths_are_equal():
    model = tiny_model(vision_config={**tiny_config().vision_config.to_dict(), "hidden_size": 32})
    assert isinstance(model.model.resampler.kv_proj, nn.Identity)
    assert not any("kv_proj" in name for name in model.state_dict())
    model.get_image_features(torch.randn(16, 588), torch.tensor([[[0, 0], [0, 0], [4, 4]]]))


def image_inputs(model, grids, seed=0):
    """Random patches, and a prompt with one placeholder for every feature, of images with the given `image_grids`."""
    torch.manual_seed(seed)
    num_views = [rows * columns + 1 for (rows, columns), *_ in grids]
    patches = sum(r * c * h * w + oh * ow for (r, c), (h, w), (oh, ow) in grids)
    num_features = sum(num_views) * model.config.num_queries
    text = torch.randint(20, 300, (2, 5))
    placeholders = torch.full((1, num_features), model.config.image_token_id)
    return {
        "input_ids": torch.cat([text[:1], placeholders, text[1:]], dim=1),
        "attention_mask": torch.ones(1, num_features + 10, dtype=torch.long),
        "pixel_values": torch.randn(patches, 588),
        "image_grids": torch.tensor(grids),
    }


MIXED_GRIDS = [[(2, 1), (4, 4), (3, 5)], [(0, 0), (0, 0), (4, 4)], [(1, 2), (3, 5), (4, 4)]]


def packed_attention_reference(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """What a flash attention kernel computes from `cu_seq_lens`, in plain torch."""
    module.packed_calls = getattr(module, "packed_calls", 0) + 1
    assert attention_mask is None
    assert kwargs["is_causal"] is False
    cu_q, cu_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert kwargs["max_length_q"] == cu_q.diff().max()
    assert kwargs["max_length_k"] == cu_k.diff().max()
    outputs = []
    for i in range(len(cu_q) - 1):
        q = query[:, :, cu_q[i] : cu_q[i + 1]]
        k, v = (state[:, :, cu_k[i] : cu_k[i + 1]] for state in (key, value))
        outputs.append((q @ k.transpose(-1, -2) * scaling).softmax(-1) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("resampler_type", ["spatial", "perceiver"])
def test_packed_views_equal_stacked_views(monkeypatch, resampler_type):
    model = tiny_model(resampler_type=resampler_type)
    inputs = image_inputs(model, MIXED_GRIDS)
    arguments = (inputs["pixel_values"], inputs["image_grids"])
    with torch.no_grad():
        stacked = model.get_image_features(*arguments)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", packed_attention_reference)
        # Asking by `set_attn_implementation` would want the kernels themselves.
        model.config._attn_implementation_internal = "flash_attention_2"
        model.config.vision_config._attn_implementation_internal = "flash_attention_2"
        packed = model.get_image_features(*arguments)
    assert [layer.self_attn.packed_calls for layer in model.model.vision_tower.encoder.layers] == [1, 1]
    assert model.model.resampler.attention.packed_calls == 1
    torch.testing.assert_close(packed.last_hidden_state, stacked.last_hidden_state, atol=1e-5, rtol=0)
    for one, other in zip(packed.pooler_output, stacked.pooler_output, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_every_image_is_encoded_as_if_alone(model):
    inputs = image_inputs(model, [[(2, 1), (9, 5), (5, 8)], [(0, 0), (0, 0), (24, 24)], [(1, 2), (5, 8), (9, 5)]])
    with torch.no_grad():
        together = model.get_image_features(inputs["pixel_values"], inputs["image_grids"])
        patches = inputs["pixel_values"].split([130, 576, 125])
        for index, image_patches in enumerate(patches):
            alone = model.get_image_features(image_patches, inputs["image_grids"][index : index + 1])
            torch.testing.assert_close(together.pooler_output[index], alone.pooler_output[0], atol=1e-5, rtol=0)
    lengths = [144 * 3, 144, 144 * 3]
    assert [len(features) for features in together.pooler_output] == lengths
    assert together.last_hidden_state.shape == (831, 32)


def test_unused_clip_layers_are_not_built(model):
    assert model.config.vision_config.num_hidden_layers == 4
    assert len(model.model.vision_tower.encoder.layers) == 3
    assert not any("post_layernorm" in name for name in model.state_dict())


def test_sdpa_equals_eager(model):
    inputs = image_inputs(model, [[(2, 1), (9, 5), (5, 8)]])
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert {module.config._attn_implementation for module in eager.modules() if hasattr(module, "config")} == {"eager"}
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"sdpa"}
    with torch.no_grad():
        torch.testing.assert_close(eager(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_equal_gradients(use_reentrant):
    model = tiny_model().train()
    inputs = image_inputs(model, MIXED_GRIDS)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        inputs["pixel_values"].requires_grad_(True)
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close(model, dtype):
    inputs = image_inputs(model, [[(2, 1), (9, 5), (5, 8)], [(0, 0), (0, 0), (24, 24)]])
    half = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        logits = half(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}).logits
        expected = model(**inputs).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert (logits.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_save_and_load_is_bit_equal(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, save_original_format=False)
    loaded, info = LlavaUhdForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    inputs = image_inputs(model, MIXED_GRIDS)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("dtype", ["auto", torch.float16, torch.float32])
def test_a_model_is_of_one_dtype(dtype):
    loaded = LlavaUhdForConditionalGeneration.from_pretrained(ORIGINAL, mm_vision_tower=CLIP, dtype=dtype)
    expected = torch.bfloat16 if dtype == "auto" else dtype
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {expected}


def test_saved_in_the_original_layout_and_loaded_again(model, tmp_path):
    # transformers' default where a model was loaded from a layout that has a registered mapping
    model.save_pretrained(tmp_path)
    loaded = LlavaUhdForConditionalGeneration.from_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": -1}


def test_static_cache_generates_the_same(model):
    inputs = image_inputs(model, [[(2, 1), (9, 5), (5, 8)]])
    dynamic = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), dynamic)
    assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), dynamic)


@pytest.mark.parametrize(
    "strategy",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
        {"prompt_lookup_num_tokens": 2},
        {"encoder_repetition_penalty": 1.2},
    ],
    ids=lambda strategy: next(iter(strategy)),
)
def test_generation_strategies_with_a_placeholder_outside_of_the_vocabulary(model, strategy):
    assert model.config.image_token_id >= model.config.text_config.vocab_size
    inputs = image_inputs(model, [[(2, 1), (9, 5), (5, 8)]])
    output = model.generate(**inputs, **{**GREEDY, **strategy})
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    assert new_tokens.shape == (strategy.get("num_return_sequences", 1), 8)
    assert new_tokens.max() < model.config.text_config.vocab_size
    if "prompt_lookup_num_tokens" in strategy:
        assert torch.equal(output, model.generate(**inputs, **GREEDY))


def test_n_gram_that_ends_in_a_placeholder_is_not_banned(model):
    """A processor that would ban the token behind a repeated prefix must not reach for the placeholder's score."""
    inputs = image_inputs(model, [[(0, 0), (0, 0), (5, 8)]])
    before_image = inputs["input_ids"][0, 4].item()
    output = model.generate(
        **inputs, **GREEDY, no_repeat_ngram_size=2, prefix_allowed_tokens_fn=lambda row, ids: [before_image, 7]
    )
    assert before_image in output[0, -8:]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padded_rows_have_the_positions_they_have_alone(model, padding_side):
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1] if padding_side == "left" else [1, 1, 0, 0]])
    with torch.no_grad(), hook:
        model(input_ids=torch.randint(20, 300, (2, 4)), attention_mask=mask)
    assert seen[0][mask.bool()].tolist() == [0, 1, 2, 3, 0, 1]


def test_beam_search_keeps_every_row_its_own_images():
    model = tiny_model()
    one, two = image_inputs(model, MIXED_GRIDS[:1], seed=1), image_inputs(model, MIXED_GRIDS[:1], seed=2)
    both = {name: torch.cat([one[name], two[name]]) for name in one}
    together = model.generate(**both, **GREEDY, num_beams=3)
    for row, inputs in enumerate((one, two)):
        assert torch.equal(together[row], model.generate(**inputs, **GREEDY, num_beams=3)[0])


def test_encoder_outputs_can_be_reused(model):
    inputs = image_inputs(model, [[(2, 1), (9, 5), (5, 8)]])
    pixels = {name: inputs.pop(name) for name in ("pixel_values", "image_grids")}
    with torch.no_grad():
        expected = model(**inputs, **pixels).logits
        image_outputs = model.get_image_features(**pixels)
        torch.testing.assert_close(model(**inputs, mm_encoder_outputs={"image": image_outputs}).logits, expected)
        with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
            model(**inputs, **pixels, mm_encoder_outputs={"image": image_outputs})


def test_generate_from_merged_embeddings(model):
    inputs = image_inputs(model, [[(2, 1), (9, 5), (5, 8)]])
    with torch.no_grad():
        features = torch.cat(model.get_image_features(inputs["pixel_values"], inputs["image_grids"]).pooler_output)
        is_image = inputs["input_ids"] == model.config.image_token_id
        embeddings = model.get_input_embeddings()(inputs["input_ids"].masked_fill(is_image, 0))
        embeddings[is_image] = features
        generated = model.generate(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], **GREEDY)
    assert torch.equal(generated[0], model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :])


def test_logits_to_keep(model):
    inputs = image_inputs(model, [[(0, 0), (0, 0), (5, 8)]])
    with torch.no_grad():
        everything = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, logits_to_keep=3).logits, everything[:, -3:])
        kept = torch.tensor([1, 4])
        torch.testing.assert_close(model(**inputs, logits_to_keep=kept).logits, everything[:, kept])


def test_outputs(model):
    inputs = image_inputs(model, [[(2, 1), (9, 5), (5, 8)]])
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, use_cache=True)
        as_tuple = model(**inputs, return_dict=False)
    assert outputs.image_hidden_states.shape == (144 * 3, 256)
    assert len(outputs.hidden_states) == 3
    assert isinstance(outputs.past_key_values, DynamicCache)
    torch.testing.assert_close(as_tuple[0], outputs.logits)


def test_decoding_step_by_step_equals_one_pass(model):
    inputs = image_inputs(model, [[(0, 0), (0, 0), (5, 8)]])
    with torch.no_grad():
        expected = model(**inputs).logits[:, -2:]
        length = inputs["input_ids"].shape[1]
        prompt = {name: inputs[name][:, : length - 2] for name in ("input_ids", "attention_mask")}
        outputs = model(**{**inputs, **prompt}, use_cache=True)
        for step in (length - 2, length - 1):
            outputs = model(
                input_ids=inputs["input_ids"][:, step : step + 1],
                attention_mask=inputs["attention_mask"][:, : step + 1],
                past_key_values=outputs.past_key_values,
            )
            torch.testing.assert_close(outputs.logits[:, 0], expected[:, step - length + 2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", [1, -1])
def test_wrong_number_of_placeholders(model, change):
    inputs = image_inputs(model, [[(0, 0), (0, 0), (5, 8)]])
    ids, image = inputs["input_ids"], torch.tensor([[model.config.image_token_id]])
    ids = torch.cat([ids, image], dim=1) if change > 0 else ids.clone().index_fill_(1, torch.tensor([10]), 20)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(ValueError, match=f"tokens: {144 + change}, features: 144"):
        model(**inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_grids": None}, "belong together"),
        ({"pixel_values": None}, "belong together"),
        ({"image_grids": torch.tensor([[[0, 0], [0, 0], [5, 9]]])}, "one row for each of the 45 patches"),
        ({"image_grids": torch.tensor([[5, 8]])}, r"shape \(num_images, 3, 2\)"),
        ({"image_grids": torch.tensor([[[0, 0], [0, 0], [0, 40]]])}, "describes no views"),
        ({"image_grids": torch.tensor([[[2, 1], [0, 0], [5, 8]]])}, "describes no views"),
        ({"input_ids": None}, "exactly one of input_ids or inputs_embeds"),
    ],
)
def test_bad_inputs(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**{**image_inputs(model, [[(0, 0), (0, 0), (5, 8)]]), **arguments})


def test_images_cannot_be_found_in_embeddings(model):
    inputs = image_inputs(model, [[(0, 0), (0, 0), (5, 8)]])
    embeddings = torch.randn(*inputs.pop("input_ids").shape, 256)
    with pytest.raises(ValueError, match="placeholder has no embedding"):
        model(**inputs, inputs_embeds=embeddings)


def test_forgotten_images_are_an_error(model):
    inputs = image_inputs(model, [[(0, 0), (0, 0), (5, 8)]])
    with pytest.raises(ValueError, match="144 image placeholders, but no images"):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    with pytest.raises(ValueError, match="144 image placeholders, but no images"):
        model(input_ids=inputs["input_ids"], past_key_values=DynamicCache())  # as `generate` passes it


def test_placeholders_of_the_vocabulary_are_found_in_embeddings():
    model = tiny_model(image_token_id=383)
    inputs = image_inputs(model, MIXED_GRIDS)
    with torch.no_grad():
        expected = model(**inputs).logits
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
        torch.testing.assert_close(model(**inputs, inputs_embeds=embeddings).logits, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_queries": 5}, "square number"),
        ({"num_queries": 0}, "square number"),
        ({"resampler_num_attention_heads": 3}, "resampler_num_attention_heads"),
        ({"resampler_type": "linear"}, "resampler_type"),
        ({"vision_config": {"num_hidden_layers": 3, "vision_feature_layer": -5}}, "vision_feature_layer"),
        ({"vision_config": {"hidden_size": 30, "num_attention_heads": 4}}, "num_attention_heads"),
    ],
)
def test_bad_configurations(arguments, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**arguments)


def test_weights_can_be_offloaded():
    """accelerate brings a module's weights when the module is called, not when they are merely read."""
    model = tiny_model()
    inputs = image_inputs(model, MIXED_GRIDS)
    with torch.no_grad():
        expected = model(**inputs).logits
        offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
        assert next(offloaded.parameters()).device.type == "meta"
        torch.testing.assert_close(offloaded(**inputs).logits, expected)


@pytest.mark.parametrize("text_type", ["qwen2", "mistral", "phi", "stablelm"])
def test_any_causal_text_model(text_type):
    text_config = {**tiny_config().text_config.to_diff_dict(), "model_type": text_type, "num_key_value_heads": 4}
    model = tiny_model(text_config=text_config)
    inputs = image_inputs(model, MIXED_GRIDS)
    assert model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 8


@pytest.mark.parametrize("max_patches", [1, 40])
def test_views_encoded_in_parts_are_those_encoded_at_once(monkeypatch, max_patches):
    model = tiny_model()
    plans = [plan_slices(*size, base_size=56) for size in ((300, 200), (56, 56), (200, 300))]
    pixel_values = torch.randn(sum(plan.num_patches for plan in plans), 588)
    image_grids = torch.tensor([image_grid(plan) for plan in plans])
    calls = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[1]))
    with torch.no_grad():
        at_once = model.get_image_features(pixel_values, image_grids, return_dict=True)
        monkeypatch.setattr(modeling_llava_uhd, "MAX_CPU_PATCHES", max_patches)
        in_parts = model.get_image_features(pixel_values, image_grids, return_dict=True)
        recorded = model.get_image_features(pixel_values, image_grids, output_hidden_states=True, return_dict=True)
    assert len(calls) > 3 and calls[0] == calls[-1] == [grid for part in calls[1:-1] for grid in part]
    assert all(len(part) == 1 or sum(math.prod(grid) for grid in part) <= max_patches for part in calls[1:-1])
    assert len(recorded.hidden_states[-1]) == len(pixel_values) + len(calls[0])  # one class embedding a view
    for found in (in_parts, recorded):
        torch.testing.assert_close(found.last_hidden_state, at_once.last_hidden_state, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.pooler_output, at_once.pooler_output, atol=1e-6, rtol=0)
