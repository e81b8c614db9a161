"""The trained checkpoints in the repository are small and safe, load by Auto classes, and know their origin."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import llava_family
from llava_family.llava_uhd.modeling_llava_uhd import LlavaUhdForConditionalGeneration

from .conftest import EXAMPLES, MINIATURE


CHECKPOINTS = MINIATURE / "checkpoints"
CLASSES = {
    "llava-uhd-miniature": LlavaUhdForConditionalGeneration,
    "llava-square-miniature": llava_family.MoeLlavaForCausalLM,
    "moe-llava-miniature": llava_family.MoeLlavaForCausalLM,
    "llava-mole-miniature": llava_family.LlavaMoleForCausalLM,
}
MEGABYTES = 12
BASELINE = "llava-square-miniature"  # which need not answer right


@pytest.fixture(scope="module", params=CLASSES)
def checkpoint(request):
    folder = CHECKPOINTS / request.param
    assert (folder / "config.json").is_file(), (
        "run the experiments with --checkpoints, see examples/miniature/README.md"
    )
    return folder


def test_every_checkpoint_is_tested(miniature):
    assert set(CLASSES) == set(miniature("cards").MINIATURES)
    assert {folder.name for folder in CHECKPOINTS.iterdir() if folder.is_dir()} == set(CLASSES)


def test_checkpoint_is_small_and_safe(checkpoint):
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < MEGABYTES * 10**6
    assert (checkpoint / "model.safetensors").is_file()
    # Nothing that runs code when it is loaded
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja", ".md"}


def test_base_is_small_and_safe():
    files = [file for file in (MINIATURE / "base").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json", ".md"}
    assert sum(file.stat().st_size for file in files) < MEGABYTES * 10**6
    card = ModelCard.load(MINIATURE / "base" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.eval_results is None
    assert "python examples/miniature/base.py" in card.text and "seed 0" in card.text


def test_checkpoint_loads_by_auto_classes(checkpoint):
    model, loading = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    assert type(model) is CLASSES[checkpoint.name]
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32 and all(parameter.isfinite().all() for parameter in model.parameters())
    assert AutoProcessor.from_pretrained(checkpoint).chat_template


def test_checkpoint_has_a_card(checkpoint, miniature):
    card = ModelCard.load(checkpoint / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["license"], data["language"]) == (
        "transformers",
        "image-text-to-text",
        "apache-2.0",
        ["en"],
    )
    assert {"llava", "miniature"} <= set(data["tags"])
    made = miniature("cards").MINIATURES[checkpoint.name]
    assert (
        f"python examples/miniature/{made.experiment}.py --checkpoints examples/miniature/checkpoints\n" in card.text
    )
    assert re.search(r"with seed \d+:", card.text)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    assert f"of {count:,} parameters" in card.text
    results = json.loads((MINIATURE / "results" / f"{made.experiment}.json").read_text("utf-8"))
    (run,) = (each for each in results["runs"] if (each["arm"], each["seed"]) == (made.arm, results["seeds"][0]))
    assert [each.metric_value for each in card.data.eval_results] == [round(x, 4) for x in run["scores"].values()]


def test_card_answers_right(checkpoint, monkeypatch, capsys):
    """The code of its card prints what its picture says."""
    if checkpoint.name == BASELINE:
        pytest.skip("this is the baseline, which does not read its picture")
    code = re.search(
        r"^```python\n(.+?)^```$", (checkpoint / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )[1]
    picture = re.search(r"examples/images/miniature/([\w.]+)", code)[1]
    questions = json.loads((EXAMPLES / "images" / "miniature" / "questions.json").read_text("utf-8"))
    (item,) = (each for group in questions.values() for each in group if each["image"] == picture)
    assert item["question"] in code
    monkeypatch.chdir(EXAMPLES.parent)
    exec(compile(code, "card", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.split() == [item["answer"]]


@pytest.fixture(scope="module")
def dense(miniature):
    """A MoE-LLaVA before it has experts, and its processor."""
    moe = miniature("moe_skills")
    torch.manual_seed(0)
    parts = moe.PartsArguments(str(moe.BASE / "language_model"), str(moe.BASE / "vision_tower"))

    def make():
        return moe.compose_moe_llava(parts)

    return make


def activated(config, intermediate_size, routers=0):
    """Of the layers: attention, two norms, three matrices of the feed-forward network, and a router's one."""
    width = config.hidden_size
    layer = 4 * width**2 + 2 * width + 3 * width * intermediate_size + routers * width
    return config.num_hidden_layers * layer


def test_activated_parameters(miniature, dense):
    moe = miniature("moe_skills")
    model, _ = dense()
    config = model.config.text_config
    assert (config.num_attention_heads, config.attention_bias) == (config.num_key_value_heads, False)
    size = config.intermediate_size
    assert moe.count_activated(model) == activated(config, size)
    sparse = moe.make_experts(model)
    expected = activated(config, moe.TOP_K * size, routers=moe.NUM_EXPERTS)
    assert moe.count_activated(sparse) == expected
    # The dense model has no fewer, and less than a neuron in each layer more: they cannot be closer.
    wide = moe.make_wide(dense()[0], seed=0)
    assert expected <= moe.count_activated(wide) < expected + config.num_hidden_layers * 3 * config.hidden_size
    stored = sum(
        parameter.numel()
        for name, parameter in sparse.named_parameters()
        if ".layers." in name and "language_model" in name
    )
    assert stored == activated(config, moe.NUM_EXPERTS * size, routers=moe.NUM_EXPERTS)


@torch.no_grad()
def test_all_arms_begin_with_the_same_function(miniature, dense):
    moe = miniature("moe_skills")
    model, processor = dense()
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": Image.new("RGB", (64, 64), "navy")},
                {"type": "text", "text": "What?"},
            ],
        }
    ]
    processor.chat_template = moe.CHAT_TEMPLATE
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = model(**inputs).logits
    torch.testing.assert_close(moe.make_experts(model)(**inputs).logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(moe.make_wide(model, seed=0)(**inputs).logits, expected, rtol=0, atol=1e-4)
    assert model.config.text_config.intermediate_size == model.model.language_model.layers[0].mlp.up_proj.out_features
