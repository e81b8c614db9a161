"""Everything that the original code produced, by the directly loaded original checkpoints and natively saved ones."""

import pytest
import torch

from llava_family import MoeLlavaProcessor
from llava_family.moe_llava import modeling_moe_llava
from llava_family.moe_llava.modeling_moe_llava import route_tokens
from llava_family.training import ConversationCollator, ConversationDataset

from .conftest import load


def inputs_of(variant, model, prompt=0):
    ids = variant.merged(variant[f"input_ids.{prompt}"], model.config.image_token_id)
    return {"input_ids": ids, "pixel_values": variant["pixel_values"][prompt : prompt + 1]}


def routing_of(model, router_logits, training=False):
    text_config = model.config.text_config
    capacity_factor = text_config.capacity_factor if training else text_config.eval_capacity_factor
    return route_tokens(
        router_logits,
        text_config.num_experts_per_tok,
        text_config.second_expert_policy,
        capacity_factor,
        text_config.min_capacity,
    )


def assert_routing(variant, model, case, router_logits, training=False):
    for logits, layer in zip(router_logits, variant.layers(f"{case}.selected_experts"), strict=True):
        index, weights = routing_of(model, logits, training)
        assert torch.equal(index, variant[f"{case}.selected_experts.{layer}"])
        if f"{case}.combine_weights.{layer}" in variant.tensors:
            dense = torch.zeros_like(logits).scatter_add(1, index, weights)
            torch.testing.assert_close(dense, variant[f"{case}.combine_weights.{layer}"], atol=1e-5, rtol=0)


@pytest.fixture
def recorded_noise(monkeypatch):
    """Replaces the Gumbel noise by recorded tensors, layer by layer, as often as the model runs."""

    def use(*noise):
        calls = iter(list(noise) * 10)
        monkeypatch.setattr(modeling_moe_llava, "gumbel_noise", lambda logits: next(calls))

    return use


def test_image_features(variant, golden_model):
    with torch.no_grad():
        outputs = golden_model.get_image_features(variant["pixel_values"])
    hidden_states = golden_model.model.vision_tower(variant["pixel_values"], output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden_states[-2][:, 1:], variant["vision_features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.stack(outputs.pooler_output), variant["projected_features"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("case", "prompt"), [("eval", 0), ("eval_image1", 1)])
def test_logits_and_routing(variant, golden_model, case, prompt):
    with torch.no_grad():
        outputs = golden_model(**inputs_of(variant, golden_model, prompt), output_router_logits=True)
    torch.testing.assert_close(outputs.logits, variant[f"{case}.logits"], atol=1e-4, rtol=0)
    assert_routing(variant, golden_model, case, outputs.router_logits)
    coefficient = golden_model.config.router_aux_loss_coef
    assert abs(coefficient * outputs.aux_loss.item() - variant.metadata[case]["moe_loss"]) <= 1e-5
    if case == "eval":
        for logits, layer in zip(outputs.router_logits, variant.layers("eval.router_logits"), strict=True):
            torch.testing.assert_close(logits, variant[f"eval.router_logits.{layer}"], atol=1e-4, rtol=0)


def test_greedy_generation(variant, golden_model):
    inputs, expected = inputs_of(variant, golden_model), variant["eval.generated_ids"]
    generated = golden_model.generate(**inputs, do_sample=False, max_new_tokens=len(expected), eos_token_id=-1)
    assert torch.equal(generated[0, inputs["input_ids"].shape[1] :], expected)


def test_answers_end(variant, golden_model):
    tokenizer = variant.metadata["variant"]["tokenizer"]
    assert golden_model.generation_config.eos_token_id == tokenizer["eos_id"]
    # Qwen's own settings pad with the token that ends an answer.
    pad = tokenizer["eos_id"] if "qwen" in variant.name else tokenizer["pad_id"]
    assert golden_model.generation_config.pad_token_id == pad


def test_text_alone(variant, golden_model):
    with torch.no_grad():
        logits = golden_model(input_ids=variant["text_only.input_ids"]).logits
    torch.testing.assert_close(logits, variant["text_only.logits"], atol=1e-4, rtol=0)


def test_padded_batch(variant, golden_model):
    rows = [inputs_of(variant, golden_model, prompt)["input_ids"][0] for prompt in (0, 1)]
    length = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (0, length - len(row))) for row in rows])
    mask = torch.stack([(torch.arange(length) < len(row)).long() for row in rows])
    with torch.no_grad():
        logits = golden_model(input_ids=ids, attention_mask=mask, pixel_values=variant["pixel_values"]).logits
    last = torch.stack([logits[row, len(tokens) - 1] for row, tokens in enumerate(rows)])
    torch.testing.assert_close(last, variant["eval_batch.last_logits"], atol=1e-4, rtol=0)


def test_dropped_tokens(variant, checkpoint):
    model = load(checkpoint).eval()
    model.config.text_config.eval_capacity_factor = 0.75
    with torch.no_grad():
        outputs = model(**inputs_of(variant, model), output_router_logits=True)
    torch.testing.assert_close(outputs.logits, variant["eval_drop.logits"], atol=1e-4, rtol=0)
    assert_routing(variant, model, "eval_drop", outputs.router_logits)
    dropped = sum((routing_of(model, logits)[1] == 0).sum().item() for logits in outputs.router_logits)
    assert dropped == sum(layer["dropped_assignments"] for layer in variant.metadata["eval_drop"]["layers"]) > 0


def test_sampled_second_expert(variant, checkpoint, recorded_noise):
    model = load(checkpoint).eval()
    model.config.text_config.second_expert_policy = "sampling"
    recorded_noise(*(variant[f"eval_gumbel.gumbel_noise.{layer}"] for layer in variant.layers("eval.router_logits")))
    with torch.no_grad():
        outputs = model(**inputs_of(variant, model), output_router_logits=True)
    torch.testing.assert_close(outputs.logits, variant["eval_gumbel.logits"], atol=1e-4, rtol=0)
    assert_routing(variant, model, "eval_gumbel", outputs.router_logits)


def collate(variant, samples, template="chat"):
    """Entries of a data set, with images of the variant's folder, as a batch."""
    dataset = ConversationDataset(samples, variant.folder)
    collator = ConversationCollator(MoeLlavaProcessor.from_pretrained(variant.original), template)
    return collator([dataset[index] for index in range(len(dataset))])


def training_batch(variant):
    conversations = enumerate(variant.metadata["train_conversations"])
    return collate(variant, [{"image": f"image_{i}.png", "conversations": turns} for i, turns in conversations])


def test_training_batch(variant):
    batch, image_token_id = training_batch(variant), variant.metadata["variant"]["tokenizer"]["len_tokenizer"]
    assert torch.equal(batch["pixel_values"], variant["pixel_values"])
    for row, ids in enumerate(variant["train.input_ids"]):
        is_image = ids == -200
        expected = {
            "input_ids": (ids, image_token_id),
            "labels": (variant["train.labels"][row], -100),
            "attention_mask": (variant["train.attention_mask"][row].long(), 1),
        }
        for name, (values, at_image) in expected.items():
            merged = variant.merged(values.masked_fill(is_image, -200), at_image)[0]
            assert torch.equal(batch[name][row], merged), name
    assert (batch["labels"] != -100).any(dim=1).all()


def conversation_of(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def test_training_batch_of_text(variant):
    ids = variant["train_text.input_ids"]
    prompt = MoeLlavaProcessor.from_pretrained(variant.original).decode(ids)
    question, answer = prompt.split("USER: ")[1].removesuffix("<|endoftext|>").split(" ASSISTANT: ")
    batch = collate(variant, [{"conversations": conversation_of(question, answer)}])
    assert torch.equal(batch["input_ids"][0], ids)
    assert torch.equal(batch["labels"][0], variant["train_text.labels"])
    assert batch["attention_mask"].all() and set(batch) == {"input_ids", "attention_mask", "labels"}


def test_first_stage_batch(variant):
    ids = variant["stage1_plain.input_ids"]
    caption = MoeLlavaProcessor.from_pretrained(variant.original).decode(ids[1:]).removesuffix("\n")
    conversation = conversation_of("Describe the image.\n<image>", caption)
    batch = collate(variant, [{"image": "image_0.png", "conversations": conversation}], "plain")
    image_token_id = variant.metadata["variant"]["tokenizer"]["len_tokenizer"]
    assert torch.equal(batch["input_ids"], variant.merged(ids, image_token_id))
    labels = variant["stage1_plain.labels"].masked_fill(ids == -200, -200)
    assert torch.equal(batch["labels"], variant.merged(labels, -100))


def training_inputs(variant, model):
    """The collator's batch as the original spliced it: padding is zero embeddings, at positions of its own."""
    batch, token = training_batch(variant), model.config.image_token_id
    ids, mask = batch["input_ids"], batch["attention_mask"]
    features = torch.cat(model.get_image_features(batch["pixel_values"]).pooler_output)
    is_image = ids == token
    embeddings = model.get_input_embeddings()(ids.masked_fill(is_image, 0)) * mask[..., None]
    return {
        "inputs_embeds": embeddings.masked_scatter(is_image[..., None], features),
        "attention_mask": mask,
        "position_ids": torch.arange(ids.shape[1]).expand(len(ids), -1),
        "labels": batch["labels"],
    }


CASES = {"train": (1.5, False), "train_drop": (0.75, False), "train_gumbel": (1.5, True)}


@pytest.mark.parametrize("case", CASES)
def test_training(variant, checkpoint, case, recorded_noise):
    capacity_factor, sampling = CASES[case]
    model = load(checkpoint)
    text_config = model.config.text_config
    text_config.capacity_factor, text_config.aux_loss_includes_padding = capacity_factor, True
    if sampling:
        text_config.second_expert_policy = "sampling"
        recorded_noise(*(variant[f"{case}.gumbel_noise.{layer}"] for layer in variant.layers("train.router_logits")))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    model.model.vision_tower.requires_grad_(False).eval()
    outputs = model(**training_inputs(variant, model), output_router_logits=True)

    metadata = variant.metadata[case]
    torch.testing.assert_close(outputs.loss, variant[f"{case}.loss"], atol=1e-5, rtol=0)
    moe_loss = model.config.router_aux_loss_coef * outputs.aux_loss
    torch.testing.assert_close(moe_loss, variant[f"{case}.moe_loss"], atol=1e-5, rtol=0)
    if not sampling:
        assert_routing(variant, model, case, outputs.router_logits, training=True)

    outputs.loss.backward()
    checked = 0
    for name, norm in metadata.get("all_grad_norms", metadata["grad_norms"]).items():
        gradient = gradient_of(model, name)
        torch.testing.assert_close(gradient.norm(), torch.tensor(norm), rtol=1e-3, atol=1e-5, msg=name)
        key = f"{case}.grad.{name}"
        if key in variant.tensors:
            torch.testing.assert_close(gradient, variant[key], rtol=1e-3, atol=1e-5, msg=name)
            checked += 1
    assert checked == len([key for key in variant.tensors if key.startswith(f"{case}.grad.")]) > 0


def gradient_of(model, name):
    """Gradient of the original's parameter `name`, in its layout."""
    name = name.replace("transformer.h.", "model.layers.").replace("transformer.", "model.")
    name = name.replace(".attn.c_proj.", ".self_attn.o_proj.").replace(".attn.", ".self_attn.")
    for old, new in (
        (".ln_1.", ".input_layernorm."),
        (".ln_2.", ".post_attention_layernorm."),
        ("model.ln_f.", "model.norm."),
    ):
        name = name.replace(old, new)
    name = name.replace("model.wte.", "model.embed_tokens.").replace("mlp.deepspeed_moe.gate.wg.", "mlp.gate.")
    name = name.replace(".w2.", ".gate_proj.").replace(".w1.", ".up_proj.").replace(".c_proj.", ".down_proj.")
    if name == "lm_head.weight":
        return model.lm_head.weight.grad
    model = model.model
    if "mm_projector" in name:
        linear = {"0": "linear_1", "2": "linear_2"}[name.split(".")[-2]]
        return model.multi_modal_projector.get_parameter(f"{linear}.{name.split('.')[-1]}").grad
    name = name.removeprefix("model.")
    if "c_attn" in name:
        layer, kind = name.split(".c_attn.")
        parts = [model.language_model.get_parameter(f"{layer}.{x}_proj.{kind}").grad for x in "qkv"]
        return torch.cat(parts)
    if "deepspeed_experts" in name:
        prefix, rest = name.split("deepspeed_moe.experts.deepspeed_experts.")
        expert, projection, kind = rest.split(".")
        experts = model.language_model.get_submodule(f"{prefix}experts")
        if projection in ("gate_proj", "up_proj") and hasattr(experts, "gate_up_proj"):
            return experts.gate_up_proj.grad[int(expert)].chunk(2)[("gate_proj", "up_proj").index(projection)]
        packed = {"fc1": "up_proj", "fc2": "down_proj"}.get(projection, projection)
        return getattr(experts, packed if kind == "weight" else f"{packed}_bias").grad[int(expert)]
    return model.language_model.get_parameter(name).grad


def test_gradient_accumulation_averages_the_balance_loss(golden_model):
    ids = torch.arange(24).reshape(2, 12)
    labels = ids.masked_fill(ids < 3, -100)
    with torch.no_grad():
        whole = golden_model(input_ids=ids, labels=labels)
        share = golden_model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(4 * 20))
    torch.testing.assert_close(4 * share.loss, whole.loss)
    assert whole.aux_loss > 0
