"""What is trained, by which loss, and that training can be interrupted, compiled, checkpointed and watched."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava_family import LlavaMoleConfig, LlavaMoleForCausalLM
from llava_family.llava_mole.layers_llava_mole import MoleRouter, balance_loss
from llava_family.mole import get_mole_model
from llava_family.mole.balance import STATE
from llava_family.training.balance_loss import BalanceLossCallback

from .tiny import CLIP, TEXT, adapted, adapter_parameters, model_of, mole_config, text_model, tiny_batch


@pytest.fixture
def recorded():
    """Logits of all routers that ran, by hooks of the test's own."""
    logits = []

    def watch(model):
        for module in model.modules():
            if isinstance(module, MoleRouter):
                module.register_forward_hook(lambda module, args, output: logits.append(output))
        return model

    watch.logits = logits
    return watch


@pytest.mark.parametrize("kind", ["pooled", "per_layer"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_loss_contains_the_balance_loss_of_all_tokens_but_padding(kind, padding, recorded):
    batch = tiny_batch(padding=padding)
    model = recorded(adapted(balance_loss=kind, balance_loss_coef=0.5))
    outputs = model(**batch)
    expected = balance_loss(tuple(recorded.logits), batch["attention_mask"], kind)
    assert (expected - balance_loss(tuple(recorded.logits), None, kind)).abs() > 1e-4
    torch.testing.assert_close(outputs.balance_loss, expected)
    # the task's loss is that of the base model at these logits
    labels = batch["labels"][:, 1:]
    task = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(outputs.loss, task + 0.5 * expected)


@pytest.mark.parametrize("name", ["phi", "llava_uhd", "moe_llava", "llava_mole"])
def test_losses_of_all_models(name):
    batch = tiny_batch()
    base = model_of(name)
    expected = base(**batch)
    model = get_mole_model(base, mole_config()).eval()
    outputs = model(**batch)
    torch.testing.assert_close(outputs.loss, expected.loss + 0.01 * outputs.balance_loss)
    # what the base model has stays there, such as the balance loss of its own experts
    assert set(outputs) == set(expected)
    if name == "moe_llava":
        torch.testing.assert_close(outputs.aux_loss, expected.aux_loss)
        assert outputs.aux_loss != outputs.balance_loss


def test_gradient_accumulation_weights_by_the_share_of_labels():
    batch = tiny_batch()
    base_loss = text_model()(**batch, num_items_in_batch=30).loss
    model = get_mole_model(text_model(), mole_config(balance_loss_coef=0.5)).eval()
    outputs = model(**batch, num_items_in_batch=30)
    num_labels = (batch["labels"][:, 1:] != -100).sum()
    assert num_labels == 18
    torch.testing.assert_close(outputs.loss, base_loss + 0.5 * 18 / 30 * outputs.balance_loss)


def test_outputs_keep_their_form():
    batch = tiny_batch()
    model = adapted()
    expected = model(**batch)
    values = model(**batch, return_dict=False)
    assert isinstance(values, tuple)
    torch.testing.assert_close(values[0], expected.loss)
    torch.testing.assert_close(values[1], expected.logits)
    assert isinstance(expected, CausalLMOutputWithPast)
    # evaluation hands entries to `compute_metrics`; wrappers of training keep entries alone
    assert "balance_loss" not in expected and expected.balance_loss is not None
    assert "balance_loss" in model.train()(**batch)


def test_distributed_training_keeps_the_balance_loss(tmp_path):
    """DistributedDataParallel takes outputs apart and builds them again where parameters may be unused."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, batch = adapted().train(), tiny_batch()
        expected = model(**batch)
        parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        outputs = parallel(**batch)
        torch.testing.assert_close(outputs.balance_loss, expected.balance_loss)
        outputs.loss.backward()
        assert all(parameter.grad is not None for parameter in adapter_parameters(model).values())
        callback = BalanceLossCallback()
        callback._record(model, (), outputs)
        assert callback._mean(torch.device("cpu")) == pytest.approx(expected.balance_loss.item())
    finally:
        torch.distributed.destroy_process_group()


def test_labels_may_be_given_by_position():
    batch = tiny_batch()
    model = adapted().base_model.model
    outputs = model(batch["input_ids"], batch["attention_mask"], None, None, None, batch["labels"])
    expected = model(**batch)
    torch.testing.assert_close(outputs.loss, expected.loss)
    torch.testing.assert_close(outputs.balance_loss, expected.balance_loss)


def test_nothing_is_recorded_without_labels_or_after_an_error():
    model = adapted()
    batch = tiny_batch()
    labels = batch.pop("labels")
    outputs = model(**batch)
    assert type(outputs) is CausalLMOutputWithPast and not hasattr(outputs, "balance_loss")
    with model.disable_adapter():
        assert not hasattr(model(**batch, labels=labels), "balance_loss")
    with pytest.raises(IndexError):
        model(input_ids=batch["input_ids"] + 1000, labels=labels)
    assert STATE.recording is None


def test_the_router_learns_from_the_balance_loss_alone_in_top1_routing():
    batch = tiny_batch()
    norms = {}
    for routing, coef in (("top1", 0.0), ("top1", 0.1), ("dense", 0.0)):
        model = adapted(routing=routing, balance_loss_coef=coef)
        model(**batch).loss.backward()
        router = model.base_model.model.model.layers[0].mlp.mole_router["default"]
        norms[routing, coef] = router.weight.grad.norm().item()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert norms["top1", 0.0] == 0
    assert norms["top1", 0.1] > 0 and norms["dense", 0.0] > 0


class TestCheckpointing:
    def gradients(self, model, batch):
        model.zero_grad()
        loss = model.train()(**batch, use_cache=False).loss
        loss.backward()
        return loss, {name: p.grad.clone() for name, p in adapter_parameters(model).items()}

    def test_without_reentrance_gradients_are_equal(self):
        model, batch = adapted(balance_loss_coef=0.5), tiny_batch()
        loss, expected = self.gradients(model, batch)
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        assert model.base_model.model.is_gradient_checkpointing
        again, gradients = self.gradients(model, batch)
        torch.testing.assert_close(again, loss)
        torch.testing.assert_close(gradients, expected)

    def test_with_reentrance_is_refused(self):
        model, batch = adapted(), tiny_batch()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
        model.base_model.model.enable_input_require_grads()
        with pytest.raises(ValueError, match="reentrant gradient checkpointing.*use_reentrant.*False"):
            self.gradients(model, batch)
        # who trains no router loses nothing
        for name, parameter in adapter_parameters(model).items():
            parameter.requires_grad_("router" not in name)
        model.train()(**batch, use_cache=False).loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize(("training", "task_type"), [(True, "CAUSAL_LM"), (False, None)])
def test_the_forward_compiles_in_one_graph(training, task_type):
    torch._dynamo.reset()
    model = adapted(text_model(num_hidden_layers=1), task_type=task_type).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = tiny_batch()
    for inputs in ({"input_ids": batch["input_ids"]}, batch, {"input_ids": batch["input_ids"]}):
        expected, outputs = model(**inputs), compiled(**inputs)
        torch.testing.assert_close(outputs.logits, expected.logits)
        if "labels" in inputs:
            torch.testing.assert_close(outputs.loss, expected.loss)
            torch.testing.assert_close(outputs.balance_loss, expected.balance_loss)
        else:
            assert outputs.loss is None


@pytest.mark.slow
def test_layers_that_are_compiled_one_by_one_are_recorded():
    torch._dynamo.reset()
    model, batch = adapted(), tiny_batch()
    expected = model(**batch).balance_loss.detach()
    for layer in model.base_model.model.model.layers:
        layer.mlp.compile(fullgraph=True, backend="eager")
    model(input_ids=batch["input_ids"])
    torch.testing.assert_close(model(**batch).balance_loss, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_trains(dtype, autocast_adapter_dtype):
    model = get_mole_model(text_model().to(dtype), mole_config(), autocast_adapter_dtype=autocast_adapter_dtype)
    outputs = model.train()(**tiny_batch())
    assert outputs.balance_loss.dtype == torch.float32
    outputs.loss.backward()
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0 or "weight_A" in name


def test_dropout_is_active_in_training_only():
    model, batch = adapted(lora_dropout=0.5), tiny_batch()
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


class Rows(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        row = tiny_batch(num_rows=2, seed=index)
        return {name: value[index % 2] for name, value in row.items()}


def make_trainer(model, folder, callbacks=(), **kwargs):
    arguments = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        **kwargs,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        callbacks=list(callbacks),
    )


class TestTrainer:
    @pytest.mark.slow
    def test_interrupted_training_ends_where_the_uninterrupted_one_does(self, tmp_path):
        def train(folder, **kwargs):
            # weights of its own, which the checkpoint must replace
            model = get_mole_model(text_model(), mole_config(balance_loss_coef=0.5))
            trainer = make_trainer(model, folder, save_strategy="steps", save_steps=2, **kwargs)
            return model, trainer

        torch.manual_seed(0)
        whole, trainer = train(tmp_path / "whole")
        initial = {name: value.detach().clone() for name, value in adapter_parameters(whole).items()}
        trainer.train()
        torch.manual_seed(1)
        resumed, trainer = train(tmp_path / "resumed")
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        for name, value in adapter_parameters(resumed).items():
            torch.testing.assert_close(value, adapter_parameters(whole)[name], rtol=0, atol=0)
            assert not torch.equal(value, initial[name])
        saved = sorted(path.name for path in (tmp_path / "whole" / "checkpoint-2").glob("adapter*"))
        assert saved == ["adapter_config.json", "adapter_model.safetensors"]

    @pytest.mark.slow
    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_the_mean_balance_loss_is_logged(self, tmp_path, accumulation):
        losses = []
        model = adapted()
        model.base_model.model.register_forward_hook(
            lambda module, args, outputs: losses.append(outputs.balance_loss.item()) if module.training else None
        )
        evaluation = {"eval_strategy": "steps", "eval_steps": 1}  # does not count
        kwargs = {"gradient_accumulation_steps": accumulation, "max_steps": 2, **evaluation}
        trainer = make_trainer(model, tmp_path, [BalanceLossCallback()], **kwargs)
        trainer.train()
        logged = [entry["balance_loss"] for entry in trainer.state.log_history if "loss" in entry]
        steps = [losses[:accumulation], losses[accumulation:]]
        assert logged == pytest.approx([sum(step) / len(step) for step in steps])
        assert "balance_loss" not in trainer.state.log_history[-1]  # the summary of the run
        assert len(model.base_model.model._forward_hooks) == 2  # the tuner's and the test's

    def test_evaluations_between_two_logs_take_nothing_away(self, tmp_path):
        losses = []
        model = adapted()
        model.base_model.model.register_forward_hook(
            lambda module, args, outputs: losses.append(outputs.balance_loss.item()) if module.training else None
        )
        kwargs = {"logging_steps": 2, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
        trainer = make_trainer(model, tmp_path, [BalanceLossCallback()], **kwargs)
        trainer.train()
        logged = [entry["balance_loss"] for entry in trainer.state.log_history if "balance_loss" in entry]
        assert len(losses) == 2 and logged == pytest.approx([sum(losses) / 2])

    def test_bfloat16_autocast(self, tmp_path):
        trainer = make_trainer(adapted(), tmp_path, [BalanceLossCallback()], bf16=True, max_steps=1)
        trainer.train()
        assert 1 / 3 - 0.01 < trainer.state.log_history[0]["balance_loss"] < 1

    def test_reporting_callbacks_see_it_when_it_comes_first(self, tmp_path):
        class Reporter(BalanceLossCallback.__base__):
            seen = []

            def on_log(self, args, state, control, logs=None, **kwargs):
                self.seen.append(dict(logs))

        trainer = make_trainer(adapted(), tmp_path, [Reporter()], max_steps=1)
        BalanceLossCallback().add_to(trainer)
        trainer.train()
        assert "balance_loss" in Reporter.seen[0]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["moe_llava", "llava_mole", "dense"])
    def test_models_with_experts_of_their_own(self, tmp_path, name):
        if name == "llava_mole":
            text = {"model_type": "llava_mole_text", **TEXT, "r": 4}
            model = LlavaMoleForCausalLM(LlavaMoleConfig(text_config=text, vision_config=CLIP))
        else:
            model = model_of("moe_llava") if name == "moe_llava" else text_model()
        expected = model.train()(**tiny_batch())
        trainer = make_trainer(model, tmp_path, [BalanceLossCallback()], max_steps=1)
        trainer.train()
        logged = trainer.state.log_history[0]
        if name == "dense":
            assert "balance_loss" not in logged
        else:
            assert logged["balance_loss"] == pytest.approx(expected.aux_loss.item(), rel=0.2)

    def test_evaluation_hands_on_logits_alone(self, tmp_path):
        shapes = []

        def compute_metrics(prediction):
            shapes.append(prediction.predictions.shape)
            return {}

        trainer = make_trainer(adapted(), tmp_path, [BalanceLossCallback()])
        trainer.compute_metrics = compute_metrics
        metrics = trainer.evaluate(Rows())
        assert shapes == [(12, 12, 99)]
        assert "balance_loss" not in metrics
