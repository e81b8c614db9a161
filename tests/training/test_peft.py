"""PEFT's LoRA on our models: on attention, and on packed experts, which are parameters of no linear layer."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from llava_family import MoeLlavaConfig, MoeLlavaForCausalLM, MoeLlavaPhiConfig
from llava_family.training import ConversationCollator, ConversationDataset

from .tiny import TEXT, VISION, VOCABULARY, tiny_model, tiny_processor, tiny_samples, without_randomness


FAMILIES = ("llava_uhd", "moe_llava", "llava_mole")
ATTENTION = {"target_modules": r".*language_model.*\.(q_proj|v_proj)"}
# Of `MoeLlavaExperts` and of `MoeLlavaPhiExperts`, by the end of their names
GATED = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
PHI = {"target_modules": [], "target_parameters": ["mlp.experts.up_proj", "mlp.experts.down_proj"]}


def phi_model():
    torch.manual_seed(0)
    experts = {"num_experts": 4, "moe_layers": [0, 1]}
    config = MoeLlavaConfig(
        text_config=MoeLlavaPhiConfig(**TEXT, **experts),
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_id=VOCABULARY,
    )
    return MoeLlavaForCausalLM(config)


def base_model(family):
    return without_randomness(phi_model() if family == "phi" else tiny_model(family)).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "target"),
    [*((family, ATTENTION) for family in FAMILIES), ("moe_llava", GATED), ("phi", PHI)],
    ids=[*(f"{family}-attention" for family in FAMILIES), "experts-gated", "experts-phi"],
)
def test_trains_saves_loads_and_merges(family, target, tmp_path):
    processor = tiny_processor("moe_llava" if family == "phi" else family)
    batch = ConversationCollator(processor)(list(ConversationDataset(tiny_samples(6))))
    before = base_model(family).state_dict()
    model = get_peft_model(base_model(family), LoraConfig(r=2, lora_alpha=4, **target))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)

    start = model(**batch)
    losses = []
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model.train()
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses
    model.eval()

    with torch.no_grad():
        trained = model(**batch).logits
        assert (trained - start.logits).abs().max() > 0.1
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(base_model(family), tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(**batch).logits, trained, rtol=0, atol=0)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, trained, rtol=1e-4, atol=1e-4)
        assert merged.state_dict().keys() == before.keys()
        merged.save_pretrained(tmp_path / "merged", save_original_format=False)
        again = type(merged).from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(again(**batch).logits, merged(**batch).logits, rtol=0, atol=0)

    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    ends = tuple(target.get("target_parameters", ("q_proj.weight", "v_proj.weight")))
    assert changed == {name for name in before if "language_model" in name and name.endswith(ends)}
