"""First stage of LLaVA-UHD: a new resampler learns to caption, of overviews alone; all else is frozen."""

from dataclasses import dataclass, field
from typing import Any

from common import Task, load_options, start
from composing import PartsArguments, compose_llava_uhd
from settings import RunArguments
from smoke import SmokeTest

from llava_family.training import freeze_for_pretraining


@dataclass
class ViewArguments:
    num_queries: int = field(default=144, metadata={"help": "features of a view"})
    max_slices: int = field(default=1, metadata={"help": "1 keeps the overview alone"})


def build(run: RunArguments, training: Any, parts: PartsArguments, views: ViewArguments) -> Task:
    model, processor = compose_llava_uhd(parts, views.num_queries, **load_options(run, training))
    freeze_for_pretraining(model)
    return Task(model, processor, {"max_slices": views.max_slices})


SMOKE = SmokeTest(compose_llava_uhd, trained=r"\.resampler\.(?!pos_embed)", num_queries=4)

if __name__ == "__main__":
    start(__file__, __doc__, build, [PartsArguments, ViewArguments], SMOKE)
