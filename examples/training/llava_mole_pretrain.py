"""First stage of LLaVA-MoLE: a new projector and the embeddings around an image learn to caption."""

from typing import Any

from common import Task, load_options, start
from composing import PartsArguments, compose_llava_mole
from settings import RunArguments
from smoke import SmokeTest

from llava_family.training import freeze_for_pretraining


def build(run: RunArguments, training: Any, parts: PartsArguments) -> Task:
    model, processor = compose_llava_mole(parts, **load_options(run, training))
    freeze_for_pretraining(model)
    return Task(model, processor)


SMOKE = SmokeTest(compose_llava_mole, trained=r"multi_modal_projector|image_boundaries")

if __name__ == "__main__":
    start(__file__, __doc__, build, [PartsArguments], SMOKE)
