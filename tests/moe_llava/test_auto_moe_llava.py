"""Auto classes and pipelines on every variant, original and native."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)

from llava_family import MoeLlavaConfig, MoeLlavaForCausalLM, MoeLlavaModel, MoeLlavaProcessor


FIXTURES = Path(__file__).parents[1] / "fixtures" / "moe_llava"


@pytest.mark.slow
def test_auto_classes(checkpoint):
    assert type(AutoConfig.from_pretrained(checkpoint)) is MoeLlavaConfig
    model, report = AutoModel.from_pretrained(checkpoint, output_loading_info=True)
    assert type(model) is MoeLlavaModel
    # Where transformers looks up the mapping of a model type, a head that it does not need is left over.
    assert not report["missing_keys"] and not report["unexpected_keys"] - {"lm_head.weight"}
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert type(auto_class.from_pretrained(checkpoint)) is MoeLlavaForCausalLM


def test_saved_and_loaded_again(checkpoint, tmp_path):
    model = MoeLlavaForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path)
    again, report = MoeLlavaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("eos_token", "expected"),
    [("<|endoftext|>", 346), ({"content": "<|endoftext|>"}, 346), (None, None), (["x"], None)],
)
def test_end_of_sequence_of_phi_is_its_tokenizers(tmp_path, eos_token, expected):
    for file in (FIXTURES / "phi_clip336" / "original_checkpoint").glob("*.json"):
        shutil.copyfile(file, tmp_path / file.name)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    tower = FIXTURES / "phi_clip336" / "openai" / "clip-vit-tiny-patch14-56"
    config = AutoConfig.from_pretrained(tmp_path, mm_image_tower=tower)
    assert config.text_config.eos_token_id == expected


def test_pipeline(variant):
    model = AutoModelForImageTextToText.from_pretrained(variant.original)
    processor = AutoProcessor.from_pretrained(variant.original)
    assert type(processor) is MoeLlavaProcessor
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": Image.new("RGB", (40, 30))}, {"type": "text", "text": "What is this?"}]
    arguments = {"return_full_text": False, "generate_kwargs": {"do_sample": False, "max_new_tokens": 4}}
    (one,) = ask(text=[{"role": "user", "content": content}], **arguments)
    batch = ask(text=[[{"role": "user", "content": content}]] * 3, batch_size=3, **arguments)
    assert [answer["generated_text"] for (answer,) in batch] == [one["generated_text"]] * 3
