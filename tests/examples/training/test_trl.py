"""What TRL's SFTTrainer computes with our processor and models: its labels are ours, its balance loss is not."""

import runpy

import pytest
import torch
from tokenizers import processors
from transformers import AutoProcessor
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from llava_family import MoeLlavaForCausalLM
from llava_family.training import ConversationCollator, ConversationDataset

from .conftest import TRAINING


@pytest.fixture
def script(run_script):
    return runpy.run_path(str(TRAINING / "trl_sft.py"))


@pytest.fixture
def parts(run_script, script, tmp_path):
    """Model, processor, and data with pictures in different numbers."""
    import smoke

    torch.manual_seed(0)
    model, processor = script["compose_sparse"](smoke.PartsArguments(*smoke.save_parts(tmp_path)))
    # As the backbones of all releases have it: nothing begins a sequence.
    processor.tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    processor.save_pretrained(tmp_path / "processor")
    smoke.draw_conversations(tmp_path / "images", tmp_path / "data.json", captions_only=False)
    data = ConversationDataset(tmp_path / "data.json", tmp_path / "images")
    return model, AutoProcessor.from_pretrained(tmp_path / "processor"), data


def trainer_of(trainer_class, parts, script, folder):
    model, processor, data = parts
    arguments = SFTConfig(
        output_dir=str(folder), max_length=None, assistant_only_loss=True, use_cpu=True, report_to=[], bf16=False
    )
    rows = script["as_datasets"](data)
    return trainer_class(model=model, args=arguments, train_dataset=rows, processing_class=processor)


def test_labels_and_inputs_are_those_of_our_collator(parts, script, tmp_path):
    _, processor, data = parts
    trainer = trainer_of(SFTTrainer, parts, script, tmp_path / "trl")
    assert isinstance(trainer.data_collator, DataCollatorForVisionLanguageModeling)
    rows = [trainer.train_dataset[index] for index in range(len(data))]
    assert [len(row["images"]) for row in rows] == [2, *[1] * 14, 0]
    batch = trainer.data_collator(rows)
    expected = ConversationCollator(processor)([data[index] for index in range(len(data))])
    assert set(batch) == set(expected) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    ours, theirs = expected["labels"] != -100, batch["labels"] != -100
    assert ours.any() and not ours.all()
    assert torch.equal(ours, theirs)
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name


def test_the_script_s_loss_is_the_model_s_own_and_trl_s_is_mixtral_s(parts, script, tmp_path):
    model, processor, data = parts
    batch = ConversationCollator(processor)([data[index] for index in range(4)])
    num_items = (batch["labels"] != -100).sum()
    expected = model.train()(**batch, num_items_in_batch=num_items)
    assert model.config.router_aux_loss_coef == 0.01
    task = expected.loss - 0.01 * expected.aux_loss
    losses = {}
    for trainer_class in (script["SftTrainer"], SFTTrainer):
        trainer = trainer_of(trainer_class, parts, script, tmp_path / trainer_class.__name__)
        trainer.current_gradient_accumulation_steps = 1
        losses[trainer_class] = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items)
        assert isinstance(trainer.model, MoeLlavaForCausalLM)
    torch.testing.assert_close(losses[script["SftTrainer"]], expected.loss)
    # The share of labels aside, TRL's is the same loss of the task, and about twice our balance loss: it counts both
    # experts of a token.
    theirs = (losses[SFTTrainer] - task) / 0.01
    assert theirs > 1.5 * expected.aux_loss
