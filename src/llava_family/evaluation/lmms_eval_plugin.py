"""Tells lmms-eval, through its entry point `lmms_eval.models`, of this package's model class."""

from typing import Any

from .settings import SETTINGS


def model_manifests() -> list[Any]:
    """
    What lmms-eval registers: the three families, all run by one class.

    Returns:
        `list[ModelManifest]`: with the model ids `llava_uhd`, `moe_llava` and `llava_mole`, as chat models.

    Source: `load_entrypoint_manifests` of lmms-eval 0.7.3, which calls this.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    path = "llava_family.evaluation.lmms_eval_model.LlavaFamilyChat"
    return [ModelManifest(model_id=family, chat_class_path=path) for family in SETTINGS]
