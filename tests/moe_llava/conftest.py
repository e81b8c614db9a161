import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_family import MoeLlavaForCausalLM


ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "moe_llava"
VARIANTS = ("phi_clip336", "stablelm_clip336", "qwen_clip336", "stablelm_siglip384")
ACCURATE = {"output_router_logits": True}


class Variant:
    """What the original code produced for one backbone and tower, see tests/fixtures/moe_llava/README.md."""

    def __init__(self, name):
        self.name = name
        self.folder = FIXTURES / name
        self.original = self.folder / "original_checkpoint"
        self.metadata = json.loads((self.folder / "expected.json").read_text())
        self.tensors = load_file(self.folder / "expected.safetensors")

    def __getitem__(self, key):
        return self.tensors[key]

    def layers(self, prefix):
        """Sparse layers for which there are goldens of this prefix."""
        return sorted(int(key.removeprefix(f"{prefix}.")) for key in self.tensors if key.startswith(f"{prefix}."))

    def merged(self, ids, image_token_id):
        """`ids` with every -200 replaced by placeholders, `(1, length)`."""
        num_features = self["projected_features"].shape[1]
        merged = []
        for token in ids.flatten().tolist():
            merged += [image_token_id] * num_features if token == -200 else [token]
        return torch.tensor([merged])


@pytest.fixture(scope="session", params=VARIANTS)
def variant(request):
    return Variant(request.param)


def load(folder, **kwargs):
    return MoeLlavaForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


@pytest.fixture(scope="session", params=["direct", "converted"])
def checkpoint(request, variant, tmp_path_factory):
    """The golden checkpoint, in the original's layout and natively."""
    if request.param == "direct":
        return variant.original
    folder = tmp_path_factory.mktemp(variant.name)
    MoeLlavaForCausalLM.from_pretrained(variant.original).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def golden_model(checkpoint):
    return load(checkpoint).eval()
