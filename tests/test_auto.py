"""Registration with transformers' Auto classes, in fresh interpreters where the order of imports matters."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    LlamaTokenizer,
    pipeline,
)

import llava_family
from llava_family import auto


ROOT = Path(__file__).parents[1]
ORIGINAL = ROOT / "tests" / "fixtures" / "llava_uhd" / "original_checkpoint"
CLIP = ROOT / "tests" / "fixtures" / "llava_uhd" / "clip_vision_tower"


def run(code):
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.slow
def test_importing_costs_at_most_300_ms_over_transformers():
    code = """
        import sys, time
        import transformers
        start = time.perf_counter()
        import llava_family
        print(time.perf_counter() - start, "torch" in sys.modules)
    """
    seconds, torch_imported = run(code)
    assert float(seconds) <= 0.3
    assert torch_imported == "False"


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import llava_family; from transformers import AutoConfig",
        "from transformers import AutoConfig; import llava_family",
        "from transformers import AutoModel; import llava_family; from transformers import AutoConfig",
        "import llava_family; import transformers.pipelines; from transformers import AutoConfig",
        "import llava_family; from llava_family import LlavaUhdModel; from transformers import AutoConfig",
        "import torch, transformers.trainer; import llava_family; from transformers import AutoConfig",
    ],
)
def test_any_order_of_imports(imports):
    assert run(f"{imports}; print(type(AutoConfig.for_model('llava_uhd')).__name__)") == ["LlavaUhdConfig"]


@pytest.mark.slow
def test_threads_that_ask_first_all_wait_for_the_registration():
    code = """
        import threading
        import llava_family
        from transformers import AutoConfig
        found = []
        threads = [threading.Thread(target=lambda: found.append(AutoConfig.for_model("llava_uhd"))) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(len(found))
    """
    assert run(code) == ["8"]


@pytest.mark.slow
def test_failed_registration_is_tried_again():
    code = """
        import llava_family
        from llava_family import auto
        from transformers import AutoConfig
        works, auto.FAMILIES = auto.FAMILIES, (auto.Family("no_such_family", "None", "None", {}),)
        try:
            AutoConfig.for_model("llava_uhd")
        except ModuleNotFoundError:
            auto.FAMILIES = works
            print(AutoConfig.for_model("llava_uhd").model_type)
    """
    assert run(code) == ["llava_uhd"]


def test_registering_twice_changes_nothing():
    auto.register()
    auto.register_on_first_use()
    assert type(AutoConfig.for_model("llava_uhd")) is llava_family.LlavaUhdConfig


def test_every_public_name_is_importable():
    for name in llava_family.__all__:
        assert getattr(llava_family, name) is not None
        assert name in dir(llava_family)
    with pytest.raises(AttributeError, match="no attribute 'Llava'"):
        _ = llava_family.Llava


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto")
    original = {"pretrained_model_name_or_path": ORIGINAL, "mm_vision_tower": CLIP}
    AutoModelForImageTextToText.from_pretrained(**original).save_pretrained(folder, save_original_format=False)
    AutoProcessor.from_pretrained(**original).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", ["original", "converted"])
def test_auto_classes(converted, layout):
    folder = ORIGINAL if layout == "original" else converted
    arguments = {"mm_vision_tower": CLIP} if layout == "original" else {}
    assert type(AutoConfig.from_pretrained(folder, **arguments)) is llava_family.LlavaUhdConfig
    assert type(AutoModel.from_pretrained(folder, **arguments)) is llava_family.LlavaUhdModel
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = auto_class.from_pretrained(folder, **arguments)
        assert type(model) is llava_family.LlavaUhdForConditionalGeneration
    processor = AutoProcessor.from_pretrained(folder, **arguments)
    assert type(processor) is llava_family.LlavaUhdProcessor
    assert type(AutoTokenizer.from_pretrained(folder)) is LlamaTokenizer
    if layout == "converted":  # the original release has no file for it
        assert type(AutoImageProcessor.from_pretrained(folder)) is llava_family.LlavaUhdImageProcessorPil


def test_pipeline(converted):
    ask = pipeline("image-text-to-text", model=str(converted))
    image = Image.open(ROOT / "examples" / "images" / "rocket.jpg")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    arguments = {"return_full_text": False, "generate_kwargs": {"do_sample": False, "max_new_tokens": 4}}
    (one,) = ask(text=[{"role": "user", "content": content}], **arguments)
    batch = ask(text=[[{"role": "user", "content": content}]] * 2, batch_size=2, **arguments)
    assert [answer["generated_text"] for (answer,) in batch] == [one["generated_text"]] * 2


def test_llava_1_5_is_told_apart(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu"}')
    with pytest.raises(ValueError, match=r"mlp2x_gelu.*llava-hf"):
        AutoConfig.from_pretrained(tmp_path)


def test_vision_tower_is_looked_for_where_the_release_says(tmp_path, monkeypatch):
    release = tmp_path / "release"
    shutil.copytree(ORIGINAL, release)
    with pytest.raises(ValueError, match=r"width 32 .*Pass `mm_vision_tower`"):
        AutoConfig.from_pretrained(release)
    shutil.copytree(CLIP, tmp_path / "pretrained_models" / "clip-vit-large-patch14-336")
    expected = AutoConfig.from_pretrained(ORIGINAL, mm_vision_tower=CLIP).vision_config
    assert expected.num_attention_heads == 2
    assert AutoConfig.from_pretrained(release).vision_config == expected  # beside the release
    shutil.move(tmp_path / "pretrained_models", release)
    assert AutoConfig.from_pretrained(release).vision_config == expected  # within it
    (tmp_path / "elsewhere").mkdir()
    shutil.move(release / "pretrained_models", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert AutoConfig.from_pretrained(release).vision_config == expected  # in the working directory, as the authors


def test_vision_tower_may_be_given_where_the_release_names_none(tmp_path, monkeypatch):
    config = json.loads((ORIGINAL / "config.json").read_text())
    del config["mm_vision_tower"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path, mm_vision_tower=CLIP).vision_config.num_attention_heads == 2
    monkeypatch.chdir(CLIP)  # a config.json in the working directory is nobody's vision tower
    with pytest.raises(ValueError, match="Pass `mm_vision_tower`"):
        AutoConfig.from_pretrained(tmp_path)


def test_vision_tower_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        AutoConfig.from_pretrained(ORIGINAL, mm_vision_tower=tmp_path)
