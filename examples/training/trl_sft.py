"""Tunes a sparse MoE-LLaVA further with TRL's SFTTrainer: experts, routers and the projector learn to answer.

Two things are ours and not TRL's:
- The loss. TRL computes the balance loss by itself, as Mixtral defines it: over all layers at once, with every expert
  that a token is sent to. MoE-LLaVA's is the sum of the layers', with the first expert.
- The collator. TRL's, with `assistant_only_loss`, makes the same labels, but leaves out the token that begins a
  sequence, where a tokenizer has one, and `max_length` cuts into images.
"""

from typing import Any

from common import Task, load_checkpoint, start
from composing import compose_moe_llava
from datasets import Dataset
from settings import ModelArguments, RunArguments
from smoke import SmokeTest
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from llava_family import MoeLlavaForCausalLM
from llava_family.training import (
    BalanceLossCallback,
    ConversationCollator,
    ConversationDataset,
    freeze_for_moe_tuning,
    upcycle,
)


class SftTrainer(SFTTrainer):
    """TRL's trainer with the loss that the model returns."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


def build(run: RunArguments, training: SFTConfig, source: ModelArguments) -> Task:
    model, processor = load_checkpoint(MoeLlavaForCausalLM, source.model, run, training)
    freeze_for_moe_tuning(model)
    return Task(model, processor)


def make_trainer(task: Task, dataset: ConversationDataset, run: RunArguments, training: SFTConfig) -> SftTrainer:
    trainer = SftTrainer(
        model=task.model,
        args=training,
        train_dataset=as_datasets(dataset),
        data_collator=ConversationCollator(task.processor, max_length=training.max_length),
        processing_class=task.processor,
    )
    BalanceLossCallback().add_to(trainer)
    return trainer


def as_datasets(dataset: ConversationDataset) -> Dataset:
    """Rows with `id`, `messages` and `images`, which are read when they are asked for."""

    def read(batch: dict[str, list]) -> dict[str, list]:
        items = [dataset[index] for index in batch["index"]]
        return {name: [item[name] for item in items] for name in ("id", "messages", "images")}

    return Dataset.from_dict({"index": list(range(len(dataset)))}).with_transform(read)


def compose_sparse(parts: Any) -> tuple[Any, Any]:
    dense, processor = compose_moe_llava(parts)
    return upcycle(dense), processor


SMOKE = SmokeTest(compose_sparse, trained=r"multi_modal_projector|language_model\.layers\.\d+\.mlp\.")

if __name__ == "__main__":
    start(
        __file__,
        __doc__,
        build,
        [ModelArguments],
        SMOKE,
        run_types=(RunArguments, SFTConfig),
        make_trainer=make_trainer,
    )
