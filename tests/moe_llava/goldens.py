"""What the original code produced, see tests/fixtures/moe_llava/README.md."""

import json
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file


FIXTURES = Path(__file__).parents[1] / "fixtures" / "moe_llava"
LLAMA = Path(__file__).parents[1] / "fixtures" / "llava_uhd" / "original_checkpoint"
VARIANTS = ("phi_clip336", "qwen_clip336", "stablelm_clip336", "stablelm_siglip384")
IMAGE_TOKEN_INDEX = -200  # of the original


class Goldens:
    def __init__(self, variant: str):
        self.folder = FIXTURES / variant
        self.checkpoint = self.folder / "original_checkpoint"
        (self.tower,) = (path.parent for path in self.folder.glob("*/*/preprocessor_config.json"))
        self.metadata = json.loads((self.folder / "expected.json").read_text())
        self.tensors = load_file(self.folder / "expected.safetensors")

    def __getitem__(self, name: str):
        return self.tensors[name]

    @property
    def images(self):
        return [Image.open(self.folder / f"image_{index}.png") for index in range(2)]


def expand(ids, image_token, num_image_tokens):
    """`ids` with every -200 replaced by `num_image_tokens` of `image_token`."""
    return [
        new
        for token in ids
        for new in ([image_token] * num_image_tokens if token == IMAGE_TOKEN_INDEX else [token])
    ]
