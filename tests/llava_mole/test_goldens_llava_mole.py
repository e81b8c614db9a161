"""Everything that the original code produced, by converted checkpoints in both modes of routing."""

import pytest
import torch

from llava_family import LlavaMoleForCausalLM
from llava_family.llava_mole.layers_llava_mole import balance_loss
from llava_family.training import ConversationCollator, ConversationDataset

from .conftest import FIXTURES, PLACEHOLDER, set_routing


CASES = (0, 1, 2)


def inputs_of(goldens, model, case):
    return {
        "input_ids": goldens.input_ids(case, model.config.image_token_id),
        "pixel_values": goldens[f"c{case}.pixel_values"][None],
    }


@pytest.mark.parametrize("case", CASES)
def test_image_features(goldens, golden_model, case):
    pixel_values = goldens[f"c{case}.pixel_values"][None]
    with torch.no_grad():
        outputs = golden_model.get_image_features(pixel_values, output_hidden_states=True)
    torch.testing.assert_close(
        outputs.hidden_states[-1][:, 1:], goldens[f"c{case}.vision_features"], atol=1e-5, rtol=0
    )
    (features,) = outputs.pooler_output
    torch.testing.assert_close(features[None, 1:-1], goldens[f"c{case}.projected"], atol=1e-5, rtol=0)


def test_embeddings(goldens, golden_model):
    inputs = inputs_of(goldens, golden_model, 0)
    with torch.no_grad():
        embeddings, _ = golden_model.model.merge_images(inputs["input_ids"], None, inputs["pixel_values"], None, None)
    torch.testing.assert_close(embeddings, goldens["c0.inputs_embeds"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_routing(goldens, golden_model, mode, case):
    with torch.no_grad():
        outputs = golden_model(
            **inputs_of(goldens, golden_model, case), output_router_logits=True, output_hidden_states=True
        )
    if case == 0:
        torch.testing.assert_close(outputs.logits[0], goldens[f"c0.{mode}.logits"], atol=1e-4, rtol=0)
        hidden_states = torch.cat(outputs.hidden_states)
        torch.testing.assert_close(hidden_states, goldens[f"c0.{mode}.hidden_states"], atol=1e-4, rtol=0)
    else:
        torch.testing.assert_close(outputs.logits[0, -8:], goldens[f"c{case}.{mode}.logits_last8"], atol=1e-4, rtol=0)
    logits = torch.cat(outputs.router_logits)  # (layers, length, experts)
    torch.testing.assert_close(logits, goldens[f"c{case}.{mode}.router_logits"], atol=1e-4, rtol=0)
    probabilities = logits.softmax(dim=-1)
    torch.testing.assert_close(probabilities, goldens[f"c{case}.{mode}.routing_probs"], atol=1e-5, rtol=0)
    assert torch.equal(probabilities.argmax(dim=-1).int(), goldens[f"c{case}.{mode}.selected_expert"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("penalty", [10.0, 1.0])
def test_greedy_generation(goldens, golden_model, mode, case, penalty):
    expected = goldens.cases[case][f"{mode}_generated_rep{penalty:g}"]
    inputs = inputs_of(goldens, golden_model, case)
    generated = golden_model.generate(
        **inputs, do_sample=False, repetition_penalty=penalty, max_new_tokens=len(expected) - 1
    )
    # The original's ids begin with the BOS token, which its model never sees.
    assert [1, *generated[0, inputs["input_ids"].shape[1] :].tolist()] == expected


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_beam_search(goldens, golden_model, mode, case):
    expected = goldens.cases[case][f"{mode}_generated_rep1_beam3"]
    inputs = inputs_of(goldens, golden_model, case)
    generated = golden_model.generate(
        **inputs, do_sample=False, num_beams=3, repetition_penalty=1.0, max_new_tokens=len(expected) - 1
    )
    assert [1, *generated[0, inputs["input_ids"].shape[1] :].tolist()] == expected


def test_generation_from_embeddings(goldens, golden_model, mode):
    """As the original does it: the penalty then knows the BOS token and what was generated, and no prompt."""
    expected = goldens.cases[0][f"{mode}_generated_rep10"]
    generated = golden_model.generate(
        inputs_embeds=goldens["c0.inputs_embeds"],
        do_sample=False,
        repetition_penalty=10.0,
        max_new_tokens=len(expected) - 1,
    )
    assert [1, *generated[0].tolist()] == expected


def test_settings_of_generation(golden_model):
    settings = golden_model.generation_config
    assert (settings.do_sample, settings.repetition_penalty, settings.max_new_tokens) == (False, 10.0, 256)
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize("case", CASES)
def test_processor_and_model_together(goldens, golden_model, processor, mode, case):
    inputs = processor(images=goldens.image(case), text=goldens.cases[case]["prompt"], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], goldens[f"c{case}.pixel_values"][None])
    assert torch.equal(inputs["input_ids"], goldens.input_ids(case, golden_model.config.image_token_id))
    expected = goldens.cases[case][f"{mode}_generated_rep10"]
    generated = golden_model.generate(**inputs, max_new_tokens=len(expected) - 1)
    answer = generated[0, inputs["input_ids"].shape[1] :]
    assert [1, *answer.tolist()] == expected


def unpadded(tensor, mask):
    return [row[is_token.bool()].tolist() for row, is_token in zip(tensor, mask, strict=True)]


def test_training_batch(goldens, processor):
    """Labels, and the ids that they belong to, are the original's; so is the extra space before the last answer."""
    train = goldens.metadata["train"]
    samples = []
    for sample in train["samples"]:
        first, *others = sample["messages"]
        image = None if sample["image"] is None else goldens.cases[sample["image"]]["image"]
        question = {**first, "content": ("<image>\n" if image else "") + first["content"]}
        answer = {"role": "assistant", "content": sample["answer"]}
        samples.append({"images": image, "messages": [question, *others, answer]})
    dataset = ConversationDataset(samples, FIXTURES)
    batch = ConversationCollator(processor)([dataset[index] for index in range(3)])

    actual = unpadded(batch["labels"], batch["attention_mask"])
    expected = unpadded(goldens["train.labels"], goldens["train.attention_mask"])
    ids = unpadded(batch["input_ids"], batch["attention_mask"])
    features = [processor.image_token_id] * processor.num_image_tokens
    assert actual[0] == expected[0]
    prompt = train["instruction_ids"][0]
    start = prompt.index(PLACEHOLDER)
    assert ids[0] == prompt[:start] + features + prompt[start + 1 :] + train["answer_ids"][0]
    # The original puts a masked blank image into a text, which splits a space off the question. Ours comes without.
    space = processor.tokenizer.convert_tokens_to_ids("\u2581")
    prompt = train["instruction_ids"][1]
    start = prompt.index(PLACEHOLDER)
    assert prompt[start - 1] == space
    assert ids[1] == prompt[: start - 1] + prompt[start + 1 :] + train["answer_ids"][1]
    assert actual[1] == expected[1][:1] + expected[1][2:]
    # These ids of the second turn are of a turn by itself; ours are those of the prompts that the original makes.
    assert [label for label in actual[2] if label != -100] == [label for label in expected[2] if label != -100]
    first_turn = expected[2].index(processor.tokenizer.eos_token_id) + 1
    assert actual[2][:first_turn] == expected[2][:first_turn]
    assert ids[2][-4 - 3 :] == [*train["instruction_ids"][2][-3:], *train["answer_ids"][2]]
    for row, row_ids in zip(actual, ids, strict=True):
        assert all(label in (-100, token) for label, token in zip(row, row_ids, strict=True))


def training_inputs(goldens, model):
    """The original's batch, from its parts, so that gradients reach projector, start and end."""
    embeddings = goldens["train.inputs_embeds"].clone()
    samples, ids = goldens.metadata["train"]["samples"], goldens.metadata["train"]["instruction_ids"]
    pixel_values = torch.stack(
        [
            torch.zeros_like(goldens["c0.pixel_values"])
            if sample["image"] is None
            else goldens[f"c{sample['image']}.pixel_values"]
            for sample in samples
        ]
    )
    features = model.get_image_features(pixel_values).pooler_output
    for row, (instruction, image) in enumerate(zip(ids, features, strict=True)):
        start = instruction.index(99999)
        torch.testing.assert_close(image, embeddings[row, start : start + len(image)], atol=1e-5, rtol=0)
        embeddings[row, start : start + len(image)] = image
    batch_size, length = embeddings.shape[:2]
    return {
        "inputs_embeds": embeddings,
        "attention_mask": goldens["train.attention_mask"].long(),
        # Counted over the dummy image of a text alone too
        "position_ids": torch.arange(length).expand(batch_size, -1),
        "labels": goldens["train.labels"].long(),
    }


def gradient_of(model, name, merged):
    """Gradient of the original's parameter `name`, in its layout; None where it was merged into another one."""
    model = model.model
    if name.startswith("in_adaptor.visual_"):
        return getattr(model.image_boundaries, name.split("_")[2]).grad
    if name.startswith("in_adaptor.projector"):
        _, _, layer, kind = name.split(".")
        return model.multi_modal_projector.get_parameter(f"{ {'0': 'linear_1', '2': 'linear_2'}[layer] }.{kind}").grad
    name = name.removeprefix("llm_model.base_model.model.model.")
    layer = model.language_model.layers[int(name.split(".")[1])]
    if ".router." in name:
        return getattr(layer.mlp.mole_router, name.split(".")[-1]).grad
    if "moe_" in name:
        _, _, _, kind, expert, side = name.split(".")
        experts = getattr(layer.mlp, f"{kind.removeprefix('moe_')}_proj").mole_experts
        gradient = getattr(experts, f"weight_{side[-1]}").grad[int(expert)]
        return gradient.T if side == "lora_B" else gradient
    _, _, _, projection, side, _, _ = name.split(".")
    if merged:
        return None
    experts = getattr(layer.self_attn, projection).mole_experts
    gradient = getattr(experts, f"weight_{side[-1]}").grad[0]
    return gradient.T if side == "lora_B" else gradient


def test_training(goldens, converted, mode):
    model = LlavaMoleForCausalLM.from_pretrained(converted).eval()  # dropout off, as in the goldens
    set_routing(model, mode)
    model.model.vision_tower.requires_grad_(False)
    expected = goldens.metadata["train"][mode]
    outputs = model(**training_inputs(goldens, model), output_router_logits=True)
    assert model.config.router_aux_loss_coef == goldens.metadata["train"]["moe_balance_w"]
    probabilities = torch.stack(outputs.router_logits).softmax(dim=-1)
    torch.testing.assert_close(probabilities, goldens[f"train.{mode}.routing_probs"], atol=1e-5, rtol=0)
    assert abs(outputs.aux_loss.item() - expected["balance_loss_unweighted"]) <= 1e-5
    assert abs(outputs.loss.item() - expected["total_loss"]) <= 1e-5
    task_loss = outputs.loss - model.config.router_aux_loss_coef * outputs.aux_loss
    assert abs(task_loss.item() - expected["ce_loss"]) <= 1e-5

    outputs.loss.backward()
    merged = not model.config.text_config.attention_target_modules
    checked, prefix = 0, f"train.{mode}.grad."
    for name, norm in expected["grad_norms"].items():
        gradient = gradient_of(model, name, merged)
        if gradient is not None:
            torch.testing.assert_close(gradient.norm(), torch.tensor(norm), rtol=1e-4, atol=1e-6, msg=name)
        if gradient is not None and prefix + name in goldens.tensors:
            # Single entries may be sums that cancel.
            atol = 1e-5 * gradient.abs().max().item()
            torch.testing.assert_close(gradient, goldens[prefix + name], rtol=1e-4, atol=atol, msg=name)
            checked += 1
    known = [key for key in goldens.tensors if key.startswith(prefix) and not (merged and "self_attn" in key)]
    assert checked == len(known) > 0


def test_sparse_routers_learn_from_the_balance_loss_alone(goldens, converted, mode):
    model = LlavaMoleForCausalLM.from_pretrained(converted).eval()
    set_routing(model, mode)
    model.config.router_aux_loss_coef = 0.0
    model(**training_inputs(goldens, model)).loss.backward()
    for name, norm in goldens.metadata["train"][mode]["router_grad_norm_from_ce_only"].items():
        gradient = gradient_of(model, name, merged=False)
        torch.testing.assert_close(gradient.norm(), torch.tensor(norm), rtol=1e-4, atol=1e-6)


def test_balance_loss_per_layer(goldens, mode):
    """A formula that the goldens hold for comparison; the original's code pools the layers."""
    probabilities, mask = goldens[f"train.{mode}.routing_probs"], goldens["train.attention_mask"]
    expected = goldens.metadata["train"][mode]["FORMULA_per_layer_balance_loss_normalised"]
    for layer, value in zip(probabilities.log(), expected, strict=True):
        actual = balance_loss((layer,), mask, "per_layer") / layer.shape[-1]
        assert abs(actual.item() - value) <= 1e-5
    mean = balance_loss(tuple(probabilities.log()), mask, "per_layer") / probabilities.shape[-1]
    assert abs(mean.item() - sum(expected) / len(expected)) <= 1e-5
