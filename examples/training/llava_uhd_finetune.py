"""Second stage of LLaVA-UHD: language model and resampler learn to answer, of slices and overview."""

from functools import partial
from typing import Any

from common import Task, load_checkpoint, start
from composing import compose_llava_uhd
from settings import ModelArguments, RunArguments
from smoke import SmokeTest

from llava_family import LlavaUhdForConditionalGeneration
from llava_family.training import freeze_for_finetuning


def build(run: RunArguments, training: Any, source: ModelArguments) -> Task:
    model, processor = load_checkpoint(LlavaUhdForConditionalGeneration, source.model, run, training)
    freeze_for_finetuning(model)
    return Task(model, processor)


SMOKE = SmokeTest(
    partial(compose_llava_uhd, num_queries=4), trained=r"\.resampler\.(?!pos_embed)|language_model|lm_head"
)

if __name__ == "__main__":
    start(__file__, __doc__, build, [ModelArguments], SMOKE)
