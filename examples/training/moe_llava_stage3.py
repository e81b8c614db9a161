"""Third stage of MoE-LLaVA: experts, copies of the dense feed-forward networks, learn with routers and projector."""

from dataclasses import asdict, dataclass, field
from typing import Any

from common import Task, load_checkpoint, start
from composing import compose_moe_llava, refuse_sharded_loading
from settings import ModelArguments, RunArguments
from smoke import SmokeTest

from llava_family import MoeLlavaForCausalLM
from llava_family.training import freeze_for_moe_tuning, upcycle


@dataclass
class ExpertArguments:
    num_experts: int = field(default=4, metadata={"help": "experts of a layer"})
    top_k: int = field(default=2, metadata={"help": "experts that a token is sent to"})
    moe_layers: str = field(default="sparse", metadata={"help": "sparse, dense, first_half or second_half"})
    capacity_factor: float | None = field(default=None, metadata={"help": "None drops no token"})
    min_capacity: int = field(default=0, metadata={"help": "least capacity of an expert"})
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "weight of the balance loss"})
    use_residual: bool = field(default=False, metadata={"help": "keep the dense network beside the experts"})


def build(run: RunArguments, training: Any, source: ModelArguments, experts: ExpertArguments) -> Task:
    refuse_sharded_loading()
    dense, processor = load_checkpoint(MoeLlavaForCausalLM, source.model, run, training)
    model = upcycle(dense, **asdict(experts))
    freeze_for_moe_tuning(model)
    return Task(model, processor)


SMOKE = SmokeTest(compose_moe_llava, trained=r"multi_modal_projector|language_model\.layers\.\d+\.mlp\.")

if __name__ == "__main__":
    start(__file__, __doc__, build, [ModelArguments, ExpertArguments], SMOKE)
