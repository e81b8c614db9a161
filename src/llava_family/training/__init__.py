"""Training: data, the originals' prompts and labels, what each stage trains, and a `Trainer` for all of it."""

from .arguments import LlavaTrainingArguments
from .balance_loss import BalanceLossCallback
from .collator import ConversationCollator
from .conversations import BadSample, ConversationDataset
from .freezing import freeze_for_finetuning, freeze_for_moe_tuning, freeze_for_mole_tuning, freeze_for_pretraining
from .trainer import LlavaTrainer
from .upcycling import upcycle


__all__ = [
    "BadSample",
    "BalanceLossCallback",
    "ConversationCollator",
    "ConversationDataset",
    "LlavaTrainer",
    "LlavaTrainingArguments",
    "freeze_for_finetuning",
    "freeze_for_moe_tuning",
    "freeze_for_mole_tuning",
    "freeze_for_pretraining",
    "upcycle",
]
