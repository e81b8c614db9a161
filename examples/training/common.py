"""What all training scripts share: the run, and the checkpoint behind it.

Design choices:
- Trainer's own checkpoints go to `<output>-run`. The output appears by a rename when it is complete.
- Who trains in bfloat16 reads the weights in bfloat16 and trains a float32 copy of what is trained, as the originals
  do under DeepSpeed. What is frozen stays in bfloat16.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from settings import ConversationArguments, RunArguments, SettingsParser, input_errors, parse
from smoke import SmokeTest
from transformers import AutoProcessor, Trainer, TrainingArguments, set_seed

from llava_family.conversion.writing import check_output_folder, move_to_output
from llava_family.training import ConversationCollator, ConversationDataset, LlavaTrainer, LlavaTrainingArguments


BAD_SAMPLES = "bad_samples.json"


def run_folder(output: str | Path) -> Path:
    """Where the checkpoints of an unfinished training lie."""
    output = Path(output).resolve()
    return output.with_name(f"{output.name}-run")


def check_folders(run: RunArguments) -> None:
    """
    Raises:
        ValueError: if the output is not empty, or there is an earlier run that is not to be resumed, or none that is.
    """
    check_output_folder(run.output)
    folder = run_folder(run.output)
    if run.resume:
        if last_checkpoint(folder) is None:
            raise ValueError(f"There is nothing to resume: {folder} has no complete checkpoint. Leave out `--resume`.")
    elif folder.exists() and (not folder.is_dir() or any(path.name != BAD_SAMPLES for path in folder.iterdir())):
        raise ValueError(
            f"{folder} is not empty: an earlier run's checkpoints are written there. Go on with it by `--resume`, "
            "choose another `--output`, or delete it."
        )


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint of a run that is complete: an interruption may have left a later one that is not."""
    found = []
    for path in folder.glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        try:  # Trainer writes it last
            json.loads((path / "trainer_state.json").read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if step:
            found.append((int(step[1]), path))
    return max(found)[1] if found else None


def load_options(run: RunArguments, training: TrainingArguments) -> dict[str, Any]:
    """Arguments of `from_pretrained`."""
    return {"dtype": load_dtype(training), "attn_implementation": run.attn_implementation}


def load_checkpoint(
    model_class: type, checkpoint: str, run: RunArguments, training: TrainingArguments, **kwargs: Any
) -> tuple[Any, Any]:
    """The model of an earlier stage, converted or as the original code wrote it, and its processor."""
    model = model_class.from_pretrained(checkpoint, **load_options(run, training), **kwargs)
    return model, AutoProcessor.from_pretrained(checkpoint)


def load_dtype(training: TrainingArguments) -> torch.dtype:
    """The dtype to read weights in: what was never more exact than bfloat16 in the original's training is not here."""
    return torch.bfloat16 if training.bf16 else torch.float32


@dataclass
class Task:
    """What a script trains.

    Attributes:
        model (`PreTrainedModel` or `PeftModel`): Frozen as the stage wants it.
        processor (`ProcessorMixin`): Its processor.
        images_kwargs (`dict`, *optional*): Settings of the image processor in this stage, such as `max_slices=1`.
        merge (`Callable`, *optional*): Makes the model to save of the trained weights, if it is another one. The model
            at hand may be sharded.
    """

    model: Any
    processor: Any
    images_kwargs: dict[str, Any] = field(default_factory=dict)
    merge: Callable[[dict[str, torch.Tensor]], Any] | None = None


def read_data(run: RunArguments, training: TrainingArguments) -> ConversationDataset:
    """Checks the folders and all of the data, before a large model is read.

    Raises:
        ValueError: if a folder or a sample is not as it must be.
    """
    is_main = training.process_index == 0
    if is_main:
        check_folders(run)
    training.output_dir = str(run_folder(run.output))
    dataset = ConversationDataset(run.data, run.image_folder, skip_bad_samples=run.skip_bad_samples)
    if is_main and dataset.bad_samples:
        write_bad_samples(run_folder(run.output), dataset)
    return dataset


def make_llava_trainer(
    task: Task, dataset: ConversationDataset, run: ConversationArguments, training: LlavaTrainingArguments
) -> LlavaTrainer:
    """The trainer of all scripts but TRL's."""
    return LlavaTrainer(
        model=task.model,
        args=training,
        train_dataset=dataset,
        data_collator=ConversationCollator(task.processor, run.template, run.max_length, task.images_kwargs),
        processing_class=task.processor,
    )


def wrap_present_layers(trainer: Trainer) -> None:
    """Lets FSDP split those layers that are there.

    It splits what a model names in `_no_split_modules`, and refuses what it cannot find: in-tree CLIP and SigLIP name
    parts of their text models (https://github.com/huggingface/peft/pull/3179).
    """
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        present = {type(module).__name__ for module in trainer.model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(present.intersection(trainer.model._no_split_modules))


def say_batch_size(dataset: ConversationDataset, training: TrainingArguments) -> None:
    """A recipe's learning rate belongs to one batch size, that of 8 GPUs."""
    devices, accumulated = training.world_size, training.gradient_accumulation_steps
    print(
        f"{len(dataset)} samples, in batches of {training.train_batch_size * accumulated * devices}: "
        f"{training.train_batch_size} on each of {devices} devices, accumulated {accumulated} times"
    )


def write_bad_samples(folder: Path, dataset: ConversationDataset) -> None:
    """Lists in `bad_samples.json` what was left out, and why."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = json.dumps([asdict(sample) for sample in dataset.bad_samples], indent=2)
    (folder / BAD_SAMPLES).write_text(samples + "\n", encoding="utf-8")


def save(trainer: Trainer, task: Task, run: RunArguments) -> None:
    """Writes weights, processor, losses, and the list of bad samples; all processes call it, for each has a shard."""
    output, accelerator = Path(run.output).resolve(), trainer.accelerator
    incomplete = output.with_name(f".{output.name}.incomplete")
    tensors = accelerator.get_state_dict(trainer.model_wrapped)
    if accelerator.is_main_process:
        shutil.rmtree(incomplete, ignore_errors=True)
        incomplete.mkdir(parents=True)
        write_model(task, tensors, load_dtype(trainer.args), incomplete)
        task.processor.save_pretrained(incomplete)
        trainer.state.save_to_json(str(incomplete / "trainer_state.json"))
        if (run_folder(output) / BAD_SAMPLES).is_file():
            shutil.copyfile(run_folder(output) / BAD_SAMPLES, incomplete / BAD_SAMPLES)
        move_to_output(incomplete, output)
        print(f"The trained checkpoint is in {output}.")
    accelerator.wait_for_everyone()


def write_model(task: Task, tensors: dict[str, torch.Tensor], dtype: torch.dtype, folder: Path) -> None:
    """Saves a model with its gathered weights, all in the dtype that they were read in."""
    model = task.model
    if task.merge is not None:
        model = task.merge(tensors)
        tensors = model.state_dict()
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    model.config.dtype = dtype
    # What was read from an original release would be written in the original's layout.
    model.save_pretrained(folder, state_dict=tensors, save_original_format=False)


def start(
    file: str,
    description: str | None,
    build: Callable[..., Task],
    dataclass_types: Sequence[type],
    smoke: SmokeTest,
    words: Sequence[str] | None = None,
    run_types: tuple[type, type] = (ConversationArguments, LlavaTrainingArguments),
    make_trainer: Callable[..., Any] = make_llava_trainer,
) -> None:
    """Runs a script.

    Args:
        file (`str`): The script's path.
        description (`str`): What it does.
        build (`Callable`): Makes a [`Task`] of a [`RunArguments`], a [`LlavaTrainingArguments`], and one instance of
            each of `dataclass_types`.
        dataclass_types (`list[type]`): The script's own settings.
        smoke (`SmokeTest`): Makes a tiny model and data, and checks what was trained.
        words (`list[str]`, *optional*): The command line; `sys.argv` if not given.
        run_types (`tuple[type, type]`, *optional*): What holds the settings of the run, and Trainer's.
        make_trainer (`Callable`, *optional*): Makes the trainer of the task, the data, and these settings.
    """
    parser = SettingsParser(
        [*run_types, *dataclass_types], prog=Path(file).stem, description=description, allow_abbrev=False
    )
    with input_errors(parser):
        run, training, *others = parse(parser, smoke.settings, sys.argv[1:] if words is None else words)
        if run.smoke:
            set_seed(training.seed)
            smoke.provide(run, others)
        dataset = read_data(run, training)
        if training.process_index == 0:
            say_batch_size(dataset, training)
        # Here, where all processes have as much behind them: FSDP splits what each of them initialises, and does not
        # compare.
        set_seed(training.seed)
        task = build(run, training, *others)
        if run.smoke:
            smoke.remember(task.model, others)
        for parameter in task.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        trainer = make_trainer(task, dataset, run, training)
        wrap_present_layers(trainer)
    checkpoint = last_checkpoint(run_folder(run.output)) if run.resume else None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    save(trainer, task, run)
    if run.smoke and trainer.is_world_process_zero():
        smoke.check(run, trainer.state.log_history)
