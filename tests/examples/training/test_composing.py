"""A model of parts has their weights, sees through them as they did, and can be trained and upcycled."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionModel,
    GPT2Config,
    PhiConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
    StableLmConfig,
)

from llava_family.training import upcycle


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 260,
}
BACKBONES = {
    "phi": PhiConfig(**TEXT),
    "stablelm": StableLmConfig(**TEXT),
    "qwen2": Qwen2Config(**TEXT, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=260),
}
SIGLIP = SiglipVisionConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
)


@pytest.fixture
def composing(run_script):
    import composing

    return composing


@pytest.fixture
def parts(composing, tmp_path):
    """Folders of a tiny Llama and CLIP; other ones by name."""
    import smoke

    def parts(backbone=None, siglip=False):
        torch.manual_seed(0)
        made = composing.PartsArguments(*smoke.save_parts(tmp_path))
        if backbone:
            made.language_model = str(tmp_path / backbone)
            AutoModelForCausalLM.from_config(BACKBONES[backbone]).save_pretrained(made.language_model)
            smoke.tiny_tokenizer().save_pretrained(made.language_model)
        if siglip:
            made.vision_tower = str(tmp_path / "siglip")
            SiglipVisionModel(SIGLIP).save_pretrained(made.vision_tower)
        return made

    return parts


def answer_of(model, processor):
    from smoke import SIZES, ask, draw

    image = draw("red", SIZES[0])
    inputs = processor(images=[image], text="<image>\nWhat?", return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()
    return ask(model, processor)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["phi", "stablelm", "qwen2"])
@pytest.mark.parametrize("siglip", [False, True], ids=["clip", "siglip"])
def test_moe_llava(composing, parts, backbone, siglip):
    made = parts(backbone, siglip)
    model, processor = composing.compose_moe_llava(made)
    text = AutoModelForCausalLM.from_pretrained(made.language_model)
    tensors = model.state_dict()
    for name, tensor in text.base_model.state_dict().items():
        assert torch.equal(tensors[f"model.language_model.{name}"], tensor), name
    assert torch.equal(tensors["lm_head.weight"], text.get_output_embeddings().weight)
    tower = (SiglipVisionModel if siglip else CLIPVisionModel).from_pretrained(made.vision_tower)
    for name, tensor in tower.state_dict().items():
        assert torch.equal(tensors[f"model.vision_tower.{name}"], tensor), name
    assert processor.num_image_tokens == 16
    answer = answer_of(model.eval(), processor)
    assert answer_of(upcycle(model).eval(), processor) == answer


def test_the_text_model_answers_as_before(composing, parts):
    made = parts()
    text = AutoModelForCausalLM.from_pretrained(made.language_model).eval()
    ids = torch.tensor([[1, 50, 60, 70]])
    for compose in (composing.compose_llava_uhd, composing.compose_moe_llava, composing.compose_llava_mole):
        model, processor = compose(made)
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, text(input_ids=ids).logits)
        assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id == 2
        assert processor.tokenizer.padding_side == "left"


def test_what_does_not_fit_is_refused(composing, parts):
    with pytest.raises(ValueError, match="makes experts of llama.*gpt2 is a 'gpt2'"):
        composing.compose_moe_llava(parts("gpt2"))
    with pytest.raises(ValueError, match="must be a 'llama', but .*phi is a 'phi'"):
        composing.compose_llava_mole(parts("phi"))
    with pytest.raises(ValueError, match="must be of clip_vision_model, but .*siglip is a 'siglip_vision_model'"):
        composing.compose_llava_uhd(parts(siglip=True))
    swapped = parts()
    swapped.vision_tower = swapped.language_model
    with pytest.raises(ValueError, match="vision tower must be of clip_vision_model"):
        composing.compose_llava_uhd(swapped)


def test_zero_3_is_refused(composing, parts, monkeypatch):
    made = parts()
    monkeypatch.setattr(composing, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3"):
        composing.compose_llava_uhd(made)
