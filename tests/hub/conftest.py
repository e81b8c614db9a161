import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from llava_family import LlavaUhdConfig, LlavaUhdForConditionalGeneration, LlavaUhdProcessor
from llava_family.hub import export_model

from . import read_without_package


ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
UHD, MOE, MOLE = (FIXTURES / name for name in ("llava_uhd", "moe_llava", "llava_mole"))
CLIP = UHD / "clip_vision_tower"


def convert(family, *arguments, **options):
    script = runpy.run_path(str(ROOT / "conversion_scripts" / f"convert_{family}_weights_to_hf.py"))
    return script[f"convert_{family}_checkpoint"](*arguments, **options, report=lambda line: None)


def converted_uhd(folder):
    return convert("llava_uhd", UHD / "original_checkpoint", folder, vision_tower=CLIP, dtype="float32")


def converted_moe(variant):
    return lambda folder: convert("moe_llava", MOE / variant / "original_checkpoint", folder, dtype="float32")


def converted_mole(folder):
    original = MOLE / "original_checkpoint"
    return convert(
        "llava_mole",
        original / "llava_mole_r16_a32_e3.pt",
        folder,
        vicuna=original / "vicuna-7b-v1.5",
        clip=original / "clip-vit-large-patch14-336",
        dtype="float32",
    )


def uhd_with(text_type, **settings):
    """Makes a LLaVA-UHD model whose text model is of another family, with the golden release's tokenizer."""

    def make(folder):
        processor = LlavaUhdProcessor.from_pretrained(UHD / "original_checkpoint")
        processor.num_queries = 4
        text = {
            "model_type": text_type,
            "vocab_size": processor.image_token_id,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "initializer_range": 0.2,
            **settings,
        }
        vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        torch.manual_seed(0)
        model = LlavaUhdForConditionalGeneration(
            LlavaUhdConfig(text_config=text, vision_config=vision, num_queries=4, resampler_num_attention_heads=2)
        )
        model.save_pretrained(folder, save_original_format=False)
        processor.save_pretrained(folder)
        return folder

    return make


@dataclass(frozen=True)
class Case:
    """A checkpoint to export, by what makes it or by where it lies in the original's layout."""

    family: str
    image: Path
    make: Callable[[Path], Path] | None = None
    original: Path | None = None
    export_options: dict = field(default_factory=dict)
    load_options: dict = field(default_factory=dict)

    @property
    def heads(self):
        heads = ["AutoModelForImageTextToText", "AutoModelForMultimodalLM"]
        return heads if self.family == "llava_uhd" else [*heads, "AutoModelForCausalLM"]


PHOTO = UHD / "images" / "wide.png"
PHI, STABLELM, QWEN = (f"{name}_clip336" for name in ("phi", "stablelm", "qwen"))
CASES = {
    # Those with a text model of another family come first: no other repository has registered it by then.
    "uhd-moe": Case("llava_uhd", PHOTO, uhd_with("moe_llava_phi_text")),
    "uhd-mole": Case("llava_uhd", PHOTO, uhd_with("llava_mole_text", r=4)),
    "uhd-converted": Case("llava_uhd", PHOTO, converted_uhd),
    "uhd-original": Case(
        "llava_uhd",
        PHOTO,
        original=UHD / "original_checkpoint",
        export_options={"vision_tower": CLIP},
        load_options={"mm_vision_tower": CLIP},
    ),
    "phi-converted": Case("moe_llava", MOE / PHI / "image_0.png", converted_moe(PHI)),
    "phi-original": Case("moe_llava", MOE / PHI / "image_0.png", original=MOE / PHI / "original_checkpoint"),
    "stablelm-converted": Case("moe_llava", MOE / STABLELM / "image_0.png", converted_moe(STABLELM)),
    "stablelm-original": Case(
        "moe_llava",
        MOE / STABLELM / "image_0.png",
        original=MOE / STABLELM / "original_checkpoint",
        export_options={"vision_tower": MOE / STABLELM / "openai" / "clip-vit-tiny-patch14-56"},
    ),
    "siglip-original": Case(
        "moe_llava",
        MOE / "stablelm_siglip384" / "image_0.png",
        original=MOE / "stablelm_siglip384" / "original_checkpoint",
    ),
    "qwen-converted": Case("moe_llava", MOE / QWEN / "image_0.png", converted_moe(QWEN)),
    "mole-converted": Case("llava_mole", MOLE / "images" / "img0.png", converted_mole),
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Makes the checkpoint of a case when it is first asked for."""
    made = {}

    def checkpoint(name):
        case = CASES[name]
        if name not in made:
            made[name] = case.original or case.make(tmp_path_factory.mktemp(name) / "checkpoint")
        return made[name]

    return checkpoint


@pytest.fixture(scope="session")
def repositories(tmp_path_factory, checkpoints):
    """Exports the checkpoint of a case when it is first asked for."""
    parent, exported = tmp_path_factory.mktemp("repositories"), {}

    def repository(name):
        if name not in exported:
            options = CASES[name].export_options
            exported[name] = export_model(checkpoints(name), parent / name, **options, report=lambda line: None)
        return exported[name]

    return repository


# None makes an import fail: of what the cards say that a reader does not need.
WITHOUT_PACKAGE = """\
import sys
sys.modules |= dict.fromkeys(
    ("accelerate", "matplotlib", "peft", "rich", "sentencepiece", "torchao", "torchvision", "typer")
)
try:
    import llava_family
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("llava_family can be imported, so nothing is shown.")
"""


def run_without_package(code, folder, **environment):
    """Runs code where llava_family is not installed; returns what it prints."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(transformers.__file__).parents[1]),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    # `-S` ignores `.pth` files, by which an editable install works.
    command = [sys.executable, "-S", "-c", WITHOUT_PACKAGE + code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
    return result.stdout


@pytest.fixture(scope="session")
def readings(repositories, tmp_path_factory):
    """What every repository gives to who does not have llava_family, all in one process."""
    folder = tmp_path_factory.mktemp("reader")
    jobs = {
        name: {
            "repository": str(repositories(name)),
            "image": str(case.image),
            "heads": case.heads,
            "tensors": str(folder / f"{name}.safetensors"),
        }
        for name, case in CASES.items()
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    read = f"import runpy; runpy.run_path({read_without_package.__file__!r})['main']('jobs.json', 'results.json')"
    run_without_package(read, folder)
    results = json.loads((folder / "results.json").read_text())
    return {name: {**results[name], "tensors": load_file(jobs[name]["tensors"])} for name in CASES}
