"""Exported repositories, loaded where llava_family is not installed, equal the checkpoints in the package."""

import shutil
import textwrap

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from llava_family.auto import FAMILIES

from .conftest import CASES, run_without_package
from .read_without_package import answer, generated_text, inputs_for


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.fixture
def family(name):
    return next(family for family in FAMILIES if family.model_type == CASES[name].family)


@pytest.mark.slow
@torch.no_grad()
def test_equals_the_installed_package(name, checkpoints, readings):
    case, tensors = CASES[name], readings[name]["tensors"]
    model = AutoModelForImageTextToText.from_pretrained(checkpoints(name), dtype=torch.float32, **case.load_options)
    processor = AutoProcessor.from_pretrained(checkpoints(name), **case.load_options)
    image = Image.open(case.image).convert("RGB")
    inputs = inputs_for(processor, image)
    for key, expected in inputs.items():
        assert torch.equal(tensors[key], expected), key
    for key, expected in answer(model.eval(), inputs).items():
        torch.testing.assert_close(tensors[key], expected, rtol=0, atol=1e-6)
    assert readings[name]["text"] == generated_text(image, model=model, processor=processor)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["AutoModelForImageTextToText", "AutoProcessor"])
@pytest.mark.parametrize("name", ["uhd-moe", "phi-original"], indirect=True)
def test_loads_from_the_hubs_cache_whatever_comes_first(name, first, repositories, tmp_path):
    """From the Hub, all code runs as one package; from a local folder, there are copies by what they import."""
    repository, commit = tmp_path / "cache" / "models--someone--some-model-1.0", "0123456789" * 4
    shutil.copytree(repositories(name), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    second = {"AutoProcessor": "AutoModelForImageTextToText"}.get(first, "AutoProcessor")
    code = f"""
        import transformers
        for name in ("{first}", "{second}"):
            part = getattr(transformers, name).from_pretrained("someone/some-model-1.0", trust_remote_code=True)
            print(type(part).__module__)
    """
    printed = run_without_package(textwrap.dedent(code), tmp_path, HF_HUB_CACHE=str(tmp_path / "cache"))
    packages = {module.rpartition(".")[0] for module in printed.split()}
    assert packages == {f"transformers_modules.someone.some_hyphen_model_hyphen_1_dot_0.{commit}"}


@pytest.mark.slow
def test_every_auto_class_finds_the_repositorys_code(name, family, readings):
    classes = readings[name]["classes"]
    prefix, head = family.prefix, f"{family.prefix}{family.head}"
    expected = {
        "AutoConfig": f"{prefix}Config",
        "AutoModel": f"{prefix}Model",
        "AutoProcessor": f"{prefix}Processor",
        "AutoImageProcessor": f"{prefix}ImageProcessorPil",
        **dict.fromkeys(CASES[name].heads, head),
    }
    for auto_class, class_name in expected.items():
        assert classes[auto_class].startswith("transformers_modules."), auto_class
        assert classes[auto_class].endswith(f".{class_name}"), auto_class
    assert classes["AutoTokenizer"].startswith("transformers.")
    assert len(classes) == len(expected) + 1


@pytest.mark.slow
def test_pixels_are_the_originals_unless_torchvision_is_asked_for(name, family, readings):
    expected = [f"{family.prefix}ImageProcessorPil", f"{family.prefix}ImageProcessor"]
    assert readings[name]["image_processors"] == expected


@pytest.mark.slow
def test_explain_asks_for_the_package(name, readings):
    assert "pip install llava-family" in readings[name]["explain_error"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uhd-converted", "phi-converted", "mole-converted"], indirect=True)
def test_explain_with_the_package(name, checkpoints, repositories):
    """The repository's own class of processor is explained as the package's is."""
    processor = AutoProcessor.from_pretrained(checkpoints(name))
    reference = f"processing_{CASES[name].family}.{type(processor).__name__}"
    exported_class = get_class_from_dynamic_module(reference, repositories(name))
    assert not isinstance(processor, exported_class)
    exported = exported_class.from_pretrained(repositories(name))
    explanation, expected = (each.explain(CASES[name].image, prompt="What?") for each in (exported, processor))
    assert explanation.facts() == expected.facts()
    assert explanation.model == expected.model
