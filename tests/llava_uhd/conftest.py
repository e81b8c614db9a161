import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_family import LlavaUhdForConditionalGeneration, LlavaUhdProcessor


ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "llava_uhd"
ORIGINAL = FIXTURES / "original_checkpoint"
CLIP = FIXTURES / "clip_vision_tower"


METADATA_CASES = json.loads((FIXTURES / "expected.json").read_text())["cases"]


class Goldens:
    """What the original code produced, see tests/fixtures/llava_uhd/README.md."""

    def __init__(self):
        self.metadata = json.loads((FIXTURES / "expected.json").read_text())
        self.tensors = load_file(FIXTURES / "expected.safetensors")

    def __getitem__(self, name):
        return self.tensors[name]

    @property
    def components(self):
        return self.metadata["components"]

    def case(self, name):
        return self.metadata["cases"][name]

    def images(self, name):
        return [Image.open(FIXTURES / "images" / file).convert("RGB") for file in self.case(name)["images"] if file]

    def merged_ids(self, name, input_ids, image_token_id, num_queries=144):
        """The original's `input_ids` with every -200 replaced by what the original inserts for it."""
        infos, merged = iter(info for info in self.case(name)["image_info"] if info), []
        for token in input_ids:
            if token != -200:
                merged.append(token)
                continue
            for separator in next(infos)["separator_ids"]:
                merged += [image_token_id] * num_queries + [separator]
            merged += [image_token_id] * num_queries
        return merged


@pytest.fixture(scope="session")
def goldens():
    return Goldens()


def load_conversion_script():
    path = ROOT / "conversion_scripts" / "convert_llava_uhd_weights_to_hf.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The golden checkpoint, converted by the script."""
    folder = tmp_path_factory.mktemp("converted") / "llava-uhd-tiny"
    load_conversion_script().convert_llava_uhd_checkpoint(str(ORIGINAL), str(folder), vision_tower=str(CLIP))
    return folder


@pytest.fixture(scope="session")
def processor():
    return LlavaUhdProcessor.from_pretrained(ORIGINAL)


@pytest.fixture(scope="session", params=["direct", "converted"])
def checkpoint(request):
    """Arguments of `from_pretrained` for the original folder and for its conversion."""
    if request.param == "direct":
        return {"pretrained_model_name_or_path": ORIGINAL, "mm_vision_tower": CLIP}
    return {"pretrained_model_name_or_path": request.getfixturevalue("converted")}


@pytest.fixture(scope="session")
def golden_model(checkpoint):
    return LlavaUhdForConditionalGeneration.from_pretrained(**checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def golden_processor(checkpoint):
    return LlavaUhdProcessor.from_pretrained(checkpoint["pretrained_model_name_or_path"])


@pytest.fixture(scope="session")
def model():
    return LlavaUhdForConditionalGeneration.from_pretrained(ORIGINAL, mm_vision_tower=CLIP, dtype=torch.float32).eval()
