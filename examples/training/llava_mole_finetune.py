"""Second stage of LLaVA-MoLE: LoRA experts, or as their baseline plain LoRA of the same rank, and the projector.

Both begin with the first stage's dense model. The experts stay apart in the trained checkpoint, for a router chooses
among them; the plain LoRA is merged into the weights.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from common import Task, load_checkpoint, start
from composing import compose_llava_mole, refuse_sharded_loading
from peft import LoraConfig, get_peft_model
from settings import ModelArguments, RunArguments
from smoke import SmokeTest

from llava_family import LlavaMoleConfig, LlavaMoleForCausalLM, LlavaMoleTextConfig
from llava_family.training import freeze_for_mole_tuning


CONNECTORS = ["multi_modal_projector", "image_boundaries"]


@dataclass
class MethodArguments:
    method: str = field(default="mole", metadata={"help": '"mole", or "lora" for the baseline'})


@dataclass
class ExpertArguments:
    r: int = field(default=16, metadata={"help": "rank of an expert, and of the attention's adapters"})
    lora_alpha: float = field(default=32, metadata={"help": "adapters count by lora_alpha / r"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout of the adapters' input"})
    num_experts: int = field(default=3, metadata={"help": "experts of a layer; the baseline has none"})
    routing: str = field(default="top1", metadata={"help": '"top1" or "dense"'})
    scale_by_gate: bool = field(default=False, metadata={"help": "weight the chosen expert by its probability"})
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "weight of the balance loss"})
    balance_loss: str = field(default="pooled", metadata={"help": '"pooled" or "per_layer"'})


def build(
    run: RunArguments, training: Any, source: ModelArguments, method: MethodArguments, experts: ExpertArguments
) -> Task:
    dense_config = LlavaMoleConfig.from_pretrained(source.model)
    if dense_config.text_config.model_type != "llama":
        raise ValueError(
            f"`--model` must be the first stage's, a 'llama' without experts, but {source.model} has a "
            f"{dense_config.text_config.model_type!r}."
        )
    if method.method == "mole":
        config = with_experts(dense_config, experts)
        model, processor = load_checkpoint(LlavaMoleForCausalLM, source.model, run, training, config=config)
        freeze_for_mole_tuning(model)
        return Task(model, processor)
    if method.method != "lora":
        raise ValueError(f"`--method` must be 'mole' or 'lora', but is {method.method!r}.")
    refuse_sharded_loading()

    def load() -> tuple[Any, Any]:
        dense, processor = load_checkpoint(LlavaMoleForCausalLM, source.model, run, training)
        return get_peft_model(dense, lora_config(experts)), processor

    def merge(tensors: dict[str, torch.Tensor]) -> Any:
        model, _ = load()
        model.load_state_dict(tensors)
        return model.merge_and_unload()

    return Task(*load(), merge=merge)


def with_experts(config: LlavaMoleConfig, experts: ExpertArguments) -> LlavaMoleConfig:
    """The configuration of the same model with experts."""
    text_config = {name: value for name, value in config.text_config.to_dict().items() if name != "model_type"}
    config.text_config = LlavaMoleTextConfig(**{**text_config, **asdict(experts)})
    return config


def lora_config(experts: ExpertArguments) -> LoraConfig:
    """Adapters of the same rank at the same places: attention and feed-forward networks of the language model."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=experts.r,
        lora_alpha=experts.lora_alpha,
        lora_dropout=experts.lora_dropout,
        target_modules=r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
        modules_to_save=CONNECTORS,
    )


TRAINED = {
    "mole": r"multi_modal_projector|image_boundaries|\.mole_",
    "lora": r"multi_modal_projector|image_boundaries|language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight",
}
SMOKE = SmokeTest(compose_llava_mole, trained=TRAINED)

if __name__ == "__main__":
    start(__file__, __doc__, build, [ModelArguments, MethodArguments, ExpertArguments], SMOKE)
