"""Everything that the original code produced, by the directly loaded original checkpoint and by its conversion."""

import copy
import json
import re

import pytest
import torch

from llava_family.llava_uhd.modeling_llava_uhd import pooling_size, region_sampling_weights
from llava_family.training import ConversationCollator, ConversationDataset

from .conftest import FIXTURES, METADATA_CASES


INFERENCE = [name for name, case in METADATA_CASES.items() if case["kind"] == "inference"]
WITH_IMAGES = [name for name in INFERENCE if METADATA_CASES[name]["images"]]
TRAINING = [name for name, case in METADATA_CASES.items() if case["kind"] == "training"]


def encode(goldens, processor, name):
    case = goldens.case(name)
    images_kwargs = {"pre_resize_longest_edge": case.get("pre_resize_longest")}
    return processor(
        images=goldens.images(name) or None, text=case["prompt"], images_kwargs=images_kwargs, return_tensors="pt"
    )


def assert_sampled_close(goldens, name, actual, atol):
    """Compares with the golden `name`, which holds every N-th row where it is called `name_sN`."""
    key = next(key for key in goldens.tensors if re.fullmatch(rf"{re.escape(name)}(_s\d+)?", key))
    step = int(key.removeprefix(name).removeprefix("_s") or 1)
    torch.testing.assert_close(actual[::step], goldens[key], atol=atol, rtol=0)


@pytest.mark.parametrize("name", INFERENCE)
def test_input_ids(goldens, golden_processor, name):
    inputs = encode(goldens, golden_processor, name)
    case = goldens.case(name)
    expected = (
        goldens.merged_ids(name, case["input_ids"], golden_processor.image_token_id)
        if case["images"]
        else case["input_ids"]
    )
    assert inputs["input_ids"][0].tolist() == expected
    assert len(expected) == case.get("sequence_length", len(expected))


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_prompt_is_the_chat_template(goldens, golden_processor, name):
    case = goldens.case(name)
    content = [{"type": "image"} for _ in case["images"]] + [{"type": "text", "text": case["question"]}]
    messages = [{"role": "user", "content": content}]
    assert golden_processor.apply_chat_template(messages, add_generation_prompt=True) == case["prompt"]


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_pixels(goldens, golden_processor, name):
    pixel_values = encode(goldens, golden_processor, name)["pixel_values"]
    for image, info in enumerate(goldens.case(name)["image_info"]):
        means, stds = goldens[f"{name}.img{image}.pixel_mean"], goldens[f"{name}.img{image}.pixel_std"]
        for view, (rows, columns) in enumerate(info["patch_grids_hw"]):
            patches, pixel_values = pixel_values.split([rows * columns, len(pixel_values) - rows * columns])
            pixels = patches.view(rows, columns, 3, 14, 14).permute(2, 0, 3, 1, 4).reshape(3, rows * 14, columns * 14)
            expected = goldens[f"{name}.img{image}.enc{view}.pixels_s32"]
            torch.testing.assert_close(pixels[:, ::32, ::32], expected, atol=1e-6, rtol=0)
            torch.testing.assert_close(pixels.mean((1, 2)), means[view], atol=1e-5, rtol=0)
            torch.testing.assert_close(pixels.std((1, 2), correction=0), stds[view], atol=1e-3, rtol=0)
    assert len(pixel_values) == 0


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_vision_and_resampled_features(goldens, golden_model, golden_processor, name):
    inputs = encode(goldens, golden_processor, name)
    with torch.no_grad():
        outputs = golden_model.get_image_features(inputs["pixel_values"], inputs["image_grids"])
    vision = outputs.last_hidden_state
    for image, info in enumerate(goldens.case(name)["image_info"]):
        resampled = outputs.pooler_output[image].split(144)
        assert len(resampled) == info["num_encoded"]
        for view, (rows, columns) in enumerate(info["patch_grids_hw"]):
            key = f"{name}.img{image}.enc{view}"
            patches, vision = vision.split([rows * columns, len(vision) - rows * columns])
            assert_sampled_close(goldens, f"{key}.vision", patches, atol=1e-4)
            assert_sampled_close(goldens, f"{key}.resampled", resampled[view], atol=1e-4)
            torch.testing.assert_close(
                resampled[view].norm(dim=1), goldens[f"{key}.resampled_rownorm"], atol=1e-4, rtol=0
            )


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_merged_embeddings(goldens, golden_model, golden_processor, name):
    merged = []
    hook = golden_model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: merged.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    with torch.no_grad(), hook:
        golden_model(**encode(goldens, golden_processor, name))
    assert_sampled_close(goldens, f"{name}.inputs_embeds", merged[0], atol=1e-4)
    torch.testing.assert_close(merged[0].norm(dim=1), goldens[f"{name}.inputs_embeds_rownorm"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", INFERENCE)
def test_logits(goldens, golden_model, golden_processor, name):
    with torch.no_grad():
        logits = golden_model(**encode(goldens, golden_processor, name)).logits[0]
    if f"{name}.logits" in goldens.tensors:
        torch.testing.assert_close(logits, goldens[f"{name}.logits"], atol=2e-4, rtol=0)
    else:
        torch.testing.assert_close(logits[-8:], goldens[f"{name}.logits_last8"], atol=2e-4, rtol=0)
        torch.testing.assert_close(logits[::97], goldens[f"{name}.logits_s97"], atol=2e-4, rtol=0)
    if f"{name}.logits_argmax" in goldens.tensors:
        assert logits.argmax(-1).tolist() == goldens[f"{name}.logits_argmax"].tolist()


@pytest.mark.parametrize("name", INFERENCE)
def test_generation(goldens, golden_model, golden_processor, name):
    inputs, case = encode(goldens, golden_processor, name), goldens.case(name)
    arguments = {"do_sample": False, "max_new_tokens": len(case["generated_ids"]), "eos_token_id": -1}
    output = golden_model.generate(**inputs, **arguments, return_dict_in_generate=True, output_logits=True)
    generated = output.sequences[0, inputs["input_ids"].shape[1] :]
    assert generated.tolist() == case["generated_ids"]
    if f"{name}.generate_scores_first3" in goldens.tensors:
        scores = torch.cat(output.logits[:3])
        torch.testing.assert_close(scores, goldens[f"{name}.generate_scores_first3"], atol=2e-4, rtol=0)
    for beams, expected in (case.get("beam_generated_ids") or {}).items():
        searched = golden_model.generate(**inputs, **arguments, num_beams=int(beams))
        assert searched[0, inputs["input_ids"].shape[1] :].tolist() == expected


def training_batch(goldens, processor, name):
    """A training case, from entries of a data set to the model's inputs and labels."""
    case = goldens.case(name)
    samples = [
        {"conversations": conversation, "image": image}
        for conversation, image in zip(case["conversations"], case["images"], strict=True)
    ]
    dataset = ConversationDataset(samples, FIXTURES / "images")
    template = {"v1": "chat", "plain": "plain"}[case["template"]]
    collator = ConversationCollator(processor, template, images_kwargs={"max_slices": 1} if case["single"] else None)
    return collator([dataset[index] for index in range(len(dataset))])


@pytest.mark.parametrize("name", TRAINING)
def test_training_labels(goldens, golden_processor, name):
    batch = training_batch(goldens, golden_processor, name)
    original_ids = goldens[f"{name}.input_ids"][goldens[f"{name}.attention_mask"].bool()].tolist()
    expected = goldens.merged_ids(name, original_ids, golden_processor.image_token_id)
    assert batch["input_ids"][batch["attention_mask"].bool()].tolist() == expected
    torch.testing.assert_close(batch["labels"].int(), goldens[f"{name}.merged_labels"])
    torch.testing.assert_close(batch["attention_mask"].int(), goldens[f"{name}.merged_attention_mask"])
    assert (batch["labels"] != -100).sum() == goldens.case(name)["num_label_tokens"]


# The original's names of the gradients, in ours
PROJECTOR = "model.resampler."
RENAMED = {
    "model.mm_projector.kv_proj.weight": f"{PROJECTOR}kv_proj.weight",
    "model.mm_projector.attn.out_proj.weight": f"{PROJECTOR}attention.out_proj.weight",
    "model.mm_projector.attn.out_proj.bias": f"{PROJECTOR}attention.out_proj.bias",
    "model.mm_projector.query": f"{PROJECTOR}query",
}


def gradient_of(model, name):
    """Gradient of the original's parameter `name`, in its layout."""
    if name == "model.mm_projector.proj":
        return model.get_parameter(f"{PROJECTOR}output_proj.weight").grad.T
    if name.startswith("model.mm_projector.attn.in_proj_"):
        kind = name.removeprefix("model.mm_projector.attn.in_proj_")
        return torch.cat([model.get_parameter(f"{PROJECTOR}attention.{x}_proj.{kind}").grad for x in "qkv"])
    if name.startswith("model.mm_projector.ln_"):
        return model.get_parameter(name.replace("model.mm_projector.", PROJECTOR)).grad
    if name in RENAMED:
        return model.get_parameter(RENAMED[name]).grad
    return model.get_parameter(name.replace("model.", "model.language_model.", 1)).grad


@pytest.mark.parametrize("name", TRAINING)
def test_training_loss_and_gradients(goldens, golden_model, golden_processor, name):
    batch, case = training_batch(goldens, golden_processor, name), goldens.case(name)
    golden_model.zero_grad()
    golden_model.model.vision_tower.requires_grad_(False)
    outputs = golden_model(**batch)
    torch.testing.assert_close(outputs.loss, goldens[f"{name}.loss"][0], atol=1e-5, rtol=0)
    learned = (batch["labels"] != -100).nonzero()
    before = outputs.logits[learned[:, 0], learned[:, 1] - 1]
    torch.testing.assert_close(before, goldens[f"{name}.logits_label_positions"], atol=2e-4, rtol=0)

    outputs.loss.backward()
    for parameter, norm in case["grad_norms"].items():
        gradient = (
            golden_model.lm_head.weight.grad if parameter == "lm_head.weight" else gradient_of(golden_model, parameter)
        )
        torch.testing.assert_close(gradient.norm(), torch.tensor(norm), rtol=1e-3, atol=1e-5)
    checked = 0
    for key in (key for key in goldens.tensors if key.startswith(f"{name}.grad")):
        kind, parameter = key.removeprefix(f"{name}.").split(".", 1)
        gradient = gradient_of(golden_model, parameter)
        if kind == "grad_rows_comma_newline":
            gradient = gradient[case["grad_comma_newline_order"]]
        elif kind.startswith("grad_s"):
            gradient = gradient[:: int(kind.removeprefix("grad_s"))]
        torch.testing.assert_close(gradient, goldens[key], rtol=1e-3, atol=1e-5)
        checked += 1
    assert checked >= 13
    golden_model.zero_grad()
    golden_model.model.vision_tower.requires_grad_(True)


def closed_form_features(rows, columns, channels):
    index = torch.arange(rows * columns, dtype=torch.float64)[:, None]
    channel = torch.arange(channels, dtype=torch.float64)[None]
    wave = torch.sin(0.37 * index + 1.3 * channel + 0.011 * index * channel)
    return (wave + 0.5 * torch.cos(0.05 * index * (channel % 5 + 1))).float()


COMPONENTS = {
    f"{case['h']}x{case['w']}": case for case in json.loads((FIXTURES / "expected.json").read_text())["components"]
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_resampler_of_any_grid(goldens, golden_model, name):
    case = COMPONENTS[name]
    grid, key, resampler = (case["h"], case["w"]), case["name"], golden_model.model.resampler
    assert list(pooling_size(grid)) == case["pool_hw"]
    with torch.no_grad():
        output = resampler(closed_form_features(*grid, 32), [grid])[0]
        vision_positions = golden_model.model.vision_tower.embeddings.position_embedding(grid)
    assert_sampled_close(goldens, f"{key}.out", output, atol=1e-4)
    torch.testing.assert_close(output.norm(dim=1), goldens[f"{key}.out_rownorm"], atol=1e-4, rtol=0)
    assert_sampled_close(goldens, f"{key}.clip_pos", vision_positions, atol=1e-6)
    assert_sampled_close(goldens, f"{key}.resampler_pos", resampler.interpolate_positions(grid), atol=1e-6)


HALF_PRECISION = ["19x29", "29x19", "60x9", "7x60"]  # the grids that were recorded


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
@pytest.mark.parametrize("name", HALF_PRECISION)
def test_resampler_in_half_precision(goldens, golden_model, name, dtype, tolerance):
    case = COMPONENTS[name]
    expected = goldens[f"{case['name']}.out_s29_{str(dtype).removeprefix('torch.')}"]
    grid, resampler = (case["h"], case["w"]), copy.deepcopy(golden_model.model.resampler).to(dtype)
    with torch.no_grad():
        output = resampler(closed_form_features(*grid, 32).to(dtype), [grid])[0]
    torch.testing.assert_close(output[::29], expected, atol=tolerance, rtol=0)


def test_box_corners_are_rounded_to_the_feature_dtype():
    in_float32 = region_sampling_weights((19, 29), 12, torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = region_sampling_weights((19, 29), 12, dtype)
        assert not torch.equal(rounded[0], in_float32[0])
        assert not torch.equal(rounded[1], in_float32[1])
