"""Second stage of MoE-LLaVA: the dense language model and the projector learn to answer."""

from typing import Any

from common import Task, load_checkpoint, start
from composing import compose_moe_llava
from settings import ModelArguments, RunArguments
from smoke import SmokeTest

from llava_family import MoeLlavaForCausalLM
from llava_family.training import freeze_for_finetuning


def build(run: RunArguments, training: Any, source: ModelArguments) -> Task:
    model, processor = load_checkpoint(MoeLlavaForCausalLM, source.model, run, training)
    freeze_for_finetuning(model)
    return Task(model, processor)


SMOKE = SmokeTest(compose_moe_llava, trained=r"multi_modal_projector|language_model|lm_head")

if __name__ == "__main__":
    start(__file__, __doc__, build, [ModelArguments], SMOKE)
