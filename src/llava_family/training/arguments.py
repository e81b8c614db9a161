"""Options of training beyond `TrainingArguments`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class LlavaTrainingArguments(TrainingArguments):
    """`TrainingArguments` for [`LlavaTrainer`].

    Source: `group_by_modality_length` and `mm_projector_lr` of LLaVA's training code; transformers'
    `TrainingArguments`.

    Args:
        group_by_modality_length (`bool`, *optional*, defaults to `False`):
            Puts into one optimizer step samples that all have images or all have none, and that are of similar length.
            The second and later stages of all three families use it.
        projector_learning_rate (`float`, *optional*):
            Learning rate of what lies between vision tower and text model. `learning_rate` if not given.
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            Must be False: the model's inputs are made by the collator.

    Raises:
        ValueError: if `remove_unused_columns` is set, which would take the messages from the collator, or
            `group_by_modality_length` together with a `train_sampling_strategy`.
    """

    group_by_modality_length: bool = field(
        default=False,
        metadata={"help": "Steps of samples that all have images or all have none, and are of similar length."},
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of projector or resampler, if not `learning_rate`."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be False: the model's inputs are made by the collator."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns` must be False: a conversation's columns are no inputs of the model, the "
                "collator makes these of them."
            )
        if self.group_by_modality_length and self.train_sampling_strategy != "random":
            raise ValueError(
                "`group_by_modality_length` orders the samples, so `train_sampling_strategy` must stay 'random', but "
                f"is {self.train_sampling_strategy!r}."
            )


__all__ = ["LlavaTrainingArguments"]
