"""Small checkpoints of all families, as released and in transformers' layout."""

import runpy
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor


ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
LLAVA_UHD = FIXTURES / "llava_uhd" / "original_checkpoint"
CLIP = FIXTURES / "llava_uhd" / "clip_vision_tower"
LLAVA_MOLE = FIXTURES / "llava_mole" / "original_checkpoint"
MOE_LLAVA = ("phi_clip336", "stablelm_clip336", "qwen_clip336", "stablelm_siglip384")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that lies in a folder together with its vision tower."""

    family: str
    top: Path
    name: str = "."
    vision_tower: str | None = None

    @property
    def arguments(self):
        """Arguments of `from_pretrained`."""
        arguments = {"pretrained_model_name_or_path": self.top / self.name, "trust_remote_code": False}
        return arguments | ({"mm_vision_tower": self.top / self.vision_tower} if self.vision_tower else {})

    def texts(self):
        """What is no weights."""
        return sorted(path for path in self.top.rglob("*") if path.suffix in (".json", ".jinja"))


def make_checkpoints(folder):
    """Copies or converts them into `folder`."""
    checkpoints = []
    shutil.copytree(LLAVA_UHD, folder / "llava_uhd" / "release")
    shutil.copytree(CLIP, folder / "llava_uhd" / "clip")
    checkpoints.append(Checkpoint("LlavaUhd", folder / "llava_uhd", "release", "clip"))
    for name in MOE_LLAVA:
        ignored = shutil.ignore_patterns("expected.*", "image_*")
        shutil.copytree(FIXTURES / "moe_llava" / name, folder / name, ignore=ignored)
        checkpoints.append(Checkpoint("MoeLlava", folder / name, "original_checkpoint"))
    for index in (0, 1):
        native = Checkpoint(checkpoints[index].family, folder / f"native_{index}")
        arguments = checkpoints[index].arguments
        AutoModelForImageTextToText.from_pretrained(**arguments).save_pretrained(
            native.top, save_original_format=False
        )
        AutoProcessor.from_pretrained(**arguments).save_pretrained(native.top)
        checkpoints.append(native)
    convert = runpy.run_path(str(ROOT / "conversion_scripts" / "convert_llava_mole_weights_to_hf.py"))
    convert["convert_llava_mole_checkpoint"](
        LLAVA_MOLE / "llava_mole_r16_a32_e3.pt",
        folder / "llava_mole",
        vicuna=LLAVA_MOLE / "vicuna-7b-v1.5",
        clip=LLAVA_MOLE / "clip-vit-large-patch14-336",
        dtype="float32",
        report=lambda line: None,
    )
    (folder / "llava_mole" / "conversion_manifest.json").unlink()  # nothing that is loaded
    return [*checkpoints, Checkpoint("LlavaMole", folder / "llava_mole")]
