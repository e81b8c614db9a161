"""Training by one process: the same twice, resumed, with less memory, and with the options of its own."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from llava_family import LlavaUhdForConditionalGeneration
from llava_family.mole import MoleConfig, get_mole_model
from llava_family.training import BalanceLossCallback, LlavaTrainer, LlavaTrainingArguments
from llava_family.training.trainer import encode_blank_image

from .tiny import losses_of, make_trainer, tiny_model, tiny_processor, tiny_samples, weights_of, without_randomness


FAMILIES = ("llava_uhd", "moe_llava", "llava_mole")
STEPS = 50
# In the third epoch, of 12 steps each
INTERRUPTED_AT = 25


def run(family, folder, **arguments):
    trainer = make_trainer(family, folder, **{"max_steps": STEPS, **arguments})
    trainer.train()
    return trainer


@pytest.fixture(scope="module", params=FAMILIES)
def whole(request, tmp_path_factory):
    """A family, and a training of it that wrote a checkpoint half way."""
    folder = tmp_path_factory.mktemp("whole")
    return request.param, run(request.param, folder, save_strategy="steps", save_steps=INTERRUPTED_AT)


@pytest.mark.slow
def test_same_seed_same_training(whole, tmp_path):
    family, trainer = whole
    again = run(family, tmp_path)
    assert losses_of(again) == losses_of(trainer) and len(losses_of(trainer)) == STEPS
    assert_equal_weights(again.model, trainer.model)
    other = run(family, tmp_path, seed=4, max_steps=3)
    assert losses_of(other) != losses_of(trainer)[:3]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_training_equals_uninterrupted(whole, tmp_path, num_workers):
    family, trainer = whole
    checkpoint = f"{trainer.args.output_dir}/checkpoint-{INTERRUPTED_AT}"
    # Weights and random numbers of its own, which the checkpoint must replace
    model = tiny_model(family, seed=1)
    torch.manual_seed(99)
    resumed = make_trainer(family, tmp_path, model=model, max_steps=STEPS, dataloader_num_workers=num_workers)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert losses_of(resumed) == losses_of(trainer)
    assert_equal_weights(model, trainer.model)


def assert_equal_weights(actual, expected):
    expected = weights_of(expected)
    assert len(expected) > 30
    for name, value in weights_of(actual).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [True, False])
def test_every_epoch_has_an_order_of_its_own(tmp_path, grouped):
    orders = []

    class Spy(TrainerCallback):
        def on_epoch_end(self, args, state, control, train_dataloader=None, **kwargs):
            orders.append(list(train_dataloader.batch_sampler.sampler))

    trainer = make_trainer("llava_uhd", tmp_path, num_train_epochs=2, group_by_modality_length=grouped)
    trainer.add_callback(Spy())
    trainer.train()
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(24)) and orders[0] != orders[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_nothing(family, tmp_path):
    results = []
    for enabled in (False, True):
        model = without_randomness(tiny_model(family))
        trainer = make_trainer(family, tmp_path, model=model, max_steps=4, activation_checkpointing=enabled)
        trainer.train()
        assert model.is_activation_checkpointing == enabled
        results.append((losses_of(trainer), model))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    for name, value in weights_of(results[0][1]).items():
        torch.testing.assert_close(weights_of(results[1][1])[name], value, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_learns(family, tmp_path, checkpointing):
    trainer = run(
        family, tmp_path, max_steps=12, bf16=True, learning_rate=1e-2, activation_checkpointing=checkpointing
    )
    losses = losses_of(trainer)
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.1
    assert all(value.isfinite().all() for value in weights_of(trainer.model).values())
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_bfloat16_train(family, tmp_path):
    trainer = make_trainer(family, tmp_path, model=tiny_model(family).to(torch.bfloat16), max_steps=3, bf16=True)
    trainer.train()
    assert all(torch.tensor(losses_of(trainer)).isfinite())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_blank_image_changes_nothing_but_reaches_the_projector(family):
    model = without_randomness(tiny_model(family)).train()
    inputs = {"input_ids": torch.arange(3, 23)[None], "labels": torch.arange(3, 23)[None]}
    expected = model(**inputs).loss
    with encode_blank_image(model):
        actual = model(**inputs).loss
    assert torch.equal(actual, expected)
    actual.backward()
    missing = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not missing
    connector = [value for name, value in model.named_parameters() if "projector" in name or "resampler" in name]
    assert connector and all(not value.grad.any() for value in connector)
    model.zero_grad()
    model(**inputs).loss.backward()  # the hook is gone
    assert all(value.grad is None for value in connector)


@pytest.mark.slow
def test_text_alone_trains_and_evaluates(tmp_path):
    samples = [sample for sample in tiny_samples() if sample["image"] is None]
    trainer = make_trainer("llava_uhd", tmp_path, samples=samples, max_steps=2)
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_loss_is_that_of_the_model(family, tmp_path):
    trainer = make_trainer(family, tmp_path, model=without_randomness(tiny_model(family)))
    metrics = trainer.evaluate(trainer.train_dataset)
    losses = []
    for start in range(0, 24, 8):
        samples = [trainer.train_dataset[index] for index in range(start, start + 8)]
        with torch.no_grad():
            losses.append(trainer.model.eval()(**trainer.data_collator(samples)).loss.item())
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 3, abs=1e-4)


def rates_of(trainer):
    """Learning rate and weight decay of every trained parameter, by name."""
    names = {id(value): name for name, value in trainer.model.named_parameters()}
    return {
        names[id(value)]: (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for value in group["params"]
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_projector_learning_rate(family, tmp_path):
    arguments = {"weight_decay": 0.1, "lr_scheduler_type": "constant"}
    base = make_trainer(family, tmp_path, **arguments)
    base.create_optimizer()
    expected = rates_of(base)
    trainer = make_trainer(family, tmp_path, projector_learning_rate=5e-5, max_steps=1, **arguments)
    trainer.train()
    actual = rates_of(trainer)
    trained = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert set(actual) == set(expected) == trained
    assert {rate for rate, _ in expected.values()} == {1e-3}
    between = ("multi_modal_projector", "resampler", "image_boundaries")
    for name, (rate, decay) in actual.items():
        assert rate == (5e-5 if any(part in name for part in between) else 1e-3), name
        assert decay == expected[name][1]
    assert {decay for _, decay in actual.values()} == {0.0, 0.1}
    assert {rate for rate, _ in actual.values()} == {1e-3, 5e-5}
    assert trainer.state.log_history[0]["learning_rate"] == 1e-3  # the text model's is the one that is logged


@pytest.mark.slow
def test_projector_learning_rate_is_kept_over_an_interruption(tmp_path):
    options = {"projector_learning_rate": 5e-5, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = run("llava_uhd", tmp_path / "whole", **options)
    resumed = make_trainer("llava_uhd", tmp_path / "resumed", model=tiny_model("llava_uhd", seed=1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_equal_weights(resumed.model, whole.model)


def test_projector_learning_rate_is_not_ignored(tmp_path):
    trainer = make_trainer("llava_uhd", tmp_path, projector_learning_rate=5e-5)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="`projector_learning_rate` needs the optimizer that this trainer creates"):
        trainer.train()


def test_options_that_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="`remove_unused_columns` must be False"):
        LlavaTrainingArguments(output_dir=tmp_path, use_cpu=True, remove_unused_columns=True)
    with pytest.raises(ValueError, match="must stay 'random', but is 'sequential'"):
        LlavaTrainingArguments(
            output_dir=tmp_path, use_cpu=True, group_by_modality_length=True, train_sampling_strategy="sequential"
        )
    trainer = make_trainer("llava_uhd", tmp_path, max_steps=1)
    trainer.train_dataset = list(trainer.train_dataset)
    with pytest.raises(ValueError, match="must have `modality_lengths`.*but it is a list"):
        trainer.train()
    with pytest.raises(ValueError, match="`args` must be `LlavaTrainingArguments`, but is a TrainingArguments"):
        LlavaTrainer(model=trainer.model, args=TrainingArguments(output_dir=tmp_path, use_cpu=True))


@pytest.mark.slow
def test_adapters_train_and_resume(tmp_path):
    """LoRA experts put on a model by PEFT."""

    def adapted(seed):
        model = tiny_model("llava_uhd")
        torch.manual_seed(seed)
        return get_mole_model(model, MoleConfig(r=4, lora_alpha=8, lora_dropout=0.1))

    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer("llava_uhd", tmp_path / "whole", model=adapted(0), **options)
    whole.train()
    resumed = make_trainer("llava_uhd", tmp_path / "resumed", model=adapted(1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses_of(resumed) == losses_of(whole)
    assert_equal_weights(resumed.model, whole.model)
    assert whole.state.log_history[0]["balance_loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_balance_loss_is_logged(family, tmp_path):
    trainer = run(family, tmp_path, max_steps=3)
    logged = [entry.get("balance_loss") for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    if family == "llava_uhd":
        assert logged == [None] * 3
    else:
        # 1 where tokens are dealt evenly by MoE-LLaVA's formula, and 1 / 3 by LLaVA-MoLE's
        even = 1.0 if family == "moe_llava" else 1 / 3
        assert all(even - 1e-3 < value < 1.5 * even for value in logged)
    assert sum(isinstance(callback, BalanceLossCallback) for callback in trainer.callback_handler.callbacks) == 1


@pytest.mark.slow
def test_checkpoints_of_a_converted_model_are_native(tmp_path):
    """They would be in the original's layout otherwise, which resuming cannot read."""
    tiny_model("llava_uhd").save_pretrained(tmp_path / "original")
    assert any(name.startswith("model.mm_projector") for name in load_file(tmp_path / "original/model.safetensors"))
    model = LlavaUhdForConditionalGeneration.from_pretrained(tmp_path / "original")
    trainer = make_trainer("llava_uhd", tmp_path / "run", model=model, max_steps=1)
    trainer.processing_class = tiny_processor("llava_uhd")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    # A table in the state, which no checkpoint needs
    assert set(load_file(tmp_path / "saved/model.safetensors")) == set(model.state_dict())
    loaded = LlavaUhdForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert_equal_weights(loaded, model)
    assert json.loads((tmp_path / "saved/processor_config.json").read_text())["num_queries"] == 4
    model.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again/model.safetensors")) == set(
        load_file(tmp_path / "original/model.safetensors")
    )
