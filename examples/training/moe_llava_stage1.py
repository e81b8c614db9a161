"""First stage of MoE-LLaVA: a new projector learns to caption; all else is frozen."""

from dataclasses import dataclass, field
from typing import Any

from common import Task, load_options, start
from composing import PartsArguments, compose_moe_llava
from settings import RunArguments
from smoke import SmokeTest

from llava_family.training import freeze_for_pretraining


@dataclass
class ImageArguments:
    do_pad: bool = field(default=False, metadata={"help": "pad images to squares, instead of cropping them"})


def build(run: RunArguments, training: Any, parts: PartsArguments, images: ImageArguments) -> Task:
    model, processor = compose_moe_llava(parts, **load_options(run, training))
    freeze_for_pretraining(model)
    return Task(model, processor, {"do_pad": images.do_pad})


SMOKE = SmokeTest(compose_moe_llava, trained=r"\.multi_modal_projector\.")

if __name__ == "__main__":
    start(__file__, __doc__, build, [PartsArguments, ImageArguments], SMOKE)
