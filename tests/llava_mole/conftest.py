import json
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_family import LlavaMoleForCausalLM, LlavaMoleProcessor


ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "llava_mole"
ORIGINAL = FIXTURES / "original_checkpoint"
CHECKPOINTS = {
    "trained": ORIGINAL / "llava_mole_r16_a32_e3.pt",
    "full": FIXTURES / "original_checkpoint_full" / "llava_mole_r16_a32_e3.pt",
}
PLACEHOLDER = 99999
SCRIPT = ROOT / "conversion_scripts" / "convert_llava_mole_weights_to_hf.py"


class Goldens:
    """What the original code produced, see tests/fixtures/llava_mole/README.md."""

    def __init__(self):
        self.metadata = json.loads((FIXTURES / "expected.json").read_text())
        self.tensors = load_file(FIXTURES / "expected.safetensors")
        self.cases = self.metadata["cases"]

    def __getitem__(self, key):
        return self.tensors[key]

    def image(self, case):
        return Image.open(FIXTURES / self.cases[case]["image"])

    def input_ids(self, case, image_token_id):
        """The case's ids with a placeholder for every feature of the image, `(1, length)`."""
        num_tokens = 2 + self[f"c{case}.projected"].shape[1]
        ids = [
            token
            for original in self.cases[case]["input_ids"]
            for token in ([image_token_id] * num_tokens if original == PLACEHOLDER else [original])
        ]
        return torch.tensor([ids])


@pytest.fixture(scope="session")
def goldens():
    return Goldens()


@pytest.fixture(scope="session", params=["trained", "full", "merged"])
def converted(request, tmp_path_factory):
    """The golden checkpoint converted: from either file that may be meant, and with the attention's LoRA merged."""
    folder = tmp_path_factory.mktemp(request.param) / "converted"
    convert = runpy.run_path(str(SCRIPT))["convert_llava_mole_checkpoint"]
    return convert(
        CHECKPOINTS.get(request.param, CHECKPOINTS["trained"]),
        folder,
        vicuna=ORIGINAL / "vicuna-7b-v1.5",
        clip=ORIGINAL / "clip-vit-large-patch14-336",
        merge_attention_lora=request.param == "merged",
        dtype="float32",
        report=lambda line: None,
    )


@pytest.fixture(scope="session", params=["dense", "sparse"])
def mode(request):
    """The original's `dense_moe`: True, as released, or False, as in the paper."""
    return request.param


@pytest.fixture(scope="session")
def golden_model(converted, mode):
    model = LlavaMoleForCausalLM.from_pretrained(converted).eval()
    assert model.config.text_config.routing == "dense"  # of the released inference code
    set_routing(model, mode)
    return model


@pytest.fixture(scope="session")
def processor(converted):
    return LlavaMoleProcessor.from_pretrained(converted)


def set_routing(model, mode):
    for layer in model.model.language_model.layers:
        layer.mlp.routing = {"dense": "dense", "sparse": "top1"}[mode]
