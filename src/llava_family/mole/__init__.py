"""Mixture of LoRA experts as a PEFT method. Importing this package makes PEFT know it."""

from importlib.util import find_spec


if find_spec("peft") is None:
    raise ImportError(
        "A mixture of LoRA experts is a method of PEFT, which is missing: `pip install 'llava-family[train]'`."
    )

from .config import MoleConfig
from .lora_import import mole_from_lora_adapters
from .model import MoleModel, get_mole_model, register_with_peft


register_with_peft()

__all__ = ["MoleConfig", "MoleModel", "get_mole_model", "mole_from_lora_adapters"]
