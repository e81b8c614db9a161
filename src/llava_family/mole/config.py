"""Configuration of the mixture of LoRA experts as a PEFT method.

Source: LLaVA-MoLE's section 3; PEFT's `LoraConfig` and `PeftType`.
"""

import enum
from dataclasses import dataclass, field

from peft import PeftConfig

from ..llava_mole.layers_llava_mole import BalanceLoss, Routing


class MolePeftType(str, enum.Enum):
    """What `PeftType` is for PEFT's own methods: equal to its string, as a key too, and with a `value`."""

    MOLE = "MOLE"


@dataclass
class MoleConfig(PeftConfig):
    """
    Configuration of a mixture of LoRA experts, see [`get_mole_model`].

    Args:
        task_type (`str`, *optional*, defaults to `"CAUSAL_LM"`): Which class of PEFT wraps the model.
        r (`int`): Rank of every expert, and of the attention's adapters.
        lora_alpha (`float`): What an expert adds is scaled by `lora_alpha / r`.
        num_experts (`int`): Experts of every feed-forward network. With 1 this is plain LoRA, without a router.
        routing (`"top1"` or `"dense"`): `"top1"`, the paper's, sends a token to its most probable expert; `"dense"`,
            that of the released inference code, to all experts, weighted by their probabilities.
        scale_by_gate (`bool`): Whether `"top1"` weights the chosen expert by its probability. Without, as in the
            original, the router learns from the balance loss alone; with it, from the task too.
        lora_dropout (`float`): Dropout of the experts' input in training.
        target_modules (`list[str]`, *optional*): Linear layers of the feed-forward networks that get experts; all by
            default: `gate_proj`, `up_proj` and `down_proj`, or Phi's `fc1` and `fc2`.
        attention_target_modules (`list[str]`, *optional*): Attention projections that get an ordinary LoRA adapter
            each; all by default, none if empty.
        balance_loss_coef (`float`): Weight of the balance loss.
        balance_loss (`"pooled"` or `"per_layer"`): `"pooled"` is the released code's, over all layers of a sample;
            `"per_layer"` balances every layer by itself.
        modules_to_save (`list[str]`, *optional*): Further modules that are trained whole and saved with the adapter,
            such as `["multi_modal_projector"]`.

    Raises:
        ValueError: if a value lies outside of what is described.
    """

    task_type: str | None = "CAUSAL_LM"
    r: int = 16
    lora_alpha: float = 32
    num_experts: int = 3
    routing: Routing = "top1"
    scale_by_gate: bool = False
    lora_dropout: float = 0.05
    target_modules: list[str] | None = None
    attention_target_modules: list[str] | None = None
    balance_loss_coef: float = 0.01
    balance_loss: BalanceLoss = "pooled"
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = MolePeftType.MOLE
        for name in ("r", "num_experts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, but is {value!r}.")
        if not self.lora_alpha > 0:
            raise ValueError(f"`lora_alpha` must be positive, but is {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must lie in [0, 1), but is {self.lora_dropout}.")
        if not self.balance_loss_coef >= 0:
            raise ValueError(f"`balance_loss_coef` must not be negative, but is {self.balance_loss_coef}.")
        choices = {"routing": ("top1", "dense"), "balance_loss": ("pooled", "per_layer")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {list(allowed)}, but is {getattr(self, name)!r}.")
        for name in ("target_modules", "attention_target_modules"):
            self._check_names(name)
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("`target_modules` must name a linear layer; None stands for all, but it is empty.")

    def _check_names(self, field_name: str) -> None:
        names = getattr(self, field_name)
        if names is None:
            return
        if isinstance(names, str) or not all(isinstance(name, str) and "." not in name for name in names):
            raise ValueError(
                f"`{field_name}` must be a list of a layer's names for its linear layers, such as ['up_proj'], but is "
                f"{names!r}."
            )
        setattr(self, field_name, list(names))


__all__ = ["MoleConfig", "MolePeftType"]
