"""The code of a Hub repository: the files that a checkpoint needs, and what the Auto classes find in them.

Source: the custom code of transformers' `trust_remote_code`, and its `auto_map`.
"""

from typing import Any

from transformers import PreTrainedConfig

from ..auto import FAMILIES, Family
from .flattening import flatten


PUBLIC_MODULES = ("configuration", "modeling", "processing", "image_processing", "image_processing_pil")

IN_TREE_AUTO_MODEL = "from transformers.models.auto.modeling_auto import AutoModel\n"
AUTO_MODEL_FILE = "auto_model.py"

# transformers copies the code of a local folder for every file that it starts from, so a configuration and the model
# that is built of it come from two copies. `AutoModel.register` compares classes; types are the same by name alone.
AUTO_MODEL_SOURCE = '''\
"""transformers' AutoModel, which knows a text model of this repository too."""

from transformers.models.auto import modeling_auto


class AutoModel(modeling_auto.AutoModel):
    @classmethod
    def from_config(cls, config, **kwargs):
        if config.model_type == "{model_type}":
            from .{module} import {model}  # which imports this file

            return {model}._from_config(config, **kwargs)
        return super().from_config(config, **kwargs)
'''

# Appended to configurations, the first files that are read. `import llava_family` does the same in auto.py.
REGISTRATION_SOURCE = '''

def _register() -> None:
    """Makes known to transformers what stands in a configuration by its name alone."""
    from transformers.models.auto import configuration_auto, image_processing_auto, modeling_auto

    for config_class in ({classes},):
        configuration_auto.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    # `transformers serve` knows by these what a model is.
    for table in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"):
        getattr(modeling_auto, table, {{}})["{model_type}"] = "{head}"
    # The PIL backend has the original's pixels, so it stays the default where torchvision is installed.
    pil_by_default = getattr(image_processing_auto, "DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS", [])
    if "{image_processor}" not in pil_by_default:
        pil_by_default.append("{image_processor}")


_register()
'''
TEXT_CONFIG_SOURCE = "\nfrom .{module} import {config}  # noqa: E402, F401 -- registers it, and imports this file\n"


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model.

    Args:
        config (`PreTrainedConfig`): Of the model.

    Returns:
        `Family`: The family.

    Raises:
        ValueError: if it is of none.
    """
    for family in FAMILIES:
        if family.model_type == config.model_type:
            return family
    raise ValueError(
        f"The model must be of type {', '.join(family.model_type for family in FAMILIES)}, but its configuration is "
        f"of {config.model_type!r}."
    )


def repository_code(config: PreTrainedConfig) -> dict[str, str]:
    """All that loads a checkpoint, in one flat folder.

    Args:
        config (`PreTrainedConfig`): Of the checkpoint.

    Returns:
        `dict[str, str]`: Source by file name.

    Raises:
        ValueError: if it is of no family, or the code cannot be flattened.
    """
    family = family_of(config)
    text_family, text_part = _text_part(config, family)
    modules = [_module_path(family, kind) for kind in PUBLIC_MODULES]
    if text_family:
        modules += [_module_path(text_family, kind) for kind in ("configuration", "modeling")]
    sources = flatten(modules)
    for other in FAMILIES:
        name = f"configuration_{other.model_type}.py"
        if name in sources:
            sources[name] += REGISTRATION_SOURCE.format(
                classes=", ".join(f"{other.prefix}{part}" for part in other.parts),
                image_processor=f"{other.prefix}ImageProcessor",
                model_type=other.model_type,
                head=f"{other.prefix}{other.head}",
            )
    if text_family:
        _add_text_model(sources, family, text_family, text_part)
    return sources


def auto_map(config: PreTrainedConfig) -> dict[str, Any]:
    """What every Auto class of transformers finds in the repository.

    Args:
        config (`PreTrainedConfig`): Of the checkpoint.

    Returns:
        `dict[str, Any]`: Class, or classes, by Auto class.
    """
    family = family_of(config)
    head = _reference(family, "modeling", family.head)
    heads = ["AutoModelForImageTextToText", "AutoModelForMultimodalLM"] + ["AutoModelForCausalLM"] * family.causal_lm
    return {
        "AutoConfig": _reference(family, "configuration", "Config"),
        "AutoModel": _reference(family, "modeling", "Model"),
        **dict.fromkeys(heads, head),
        "AutoProcessor": _reference(family, "processing", "Processor"),
        "AutoImageProcessor": {
            "pil": _reference(family, "image_processing_pil", "ImageProcessorPil"),
            "torchvision": _reference(family, "image_processing", "ImageProcessor"),
        },
    }


def _module_path(family: Family, kind: str) -> str:
    return f"{family.model_type}.{kind}_{family.model_type}"


def _reference(family: Family, kind: str, name: str) -> str:
    return f"{kind}_{family.model_type}.{family.prefix}{name}"


def _text_part(config: PreTrainedConfig, family: Family) -> tuple[Family | None, str]:
    """The other family that the text model is of, and the name of its configuration; None if there is no other."""
    for other in FAMILIES:
        for part in other.parts:
            if other != family and other.load("configuration", part).model_type == config.text_config.model_type:
                return other, part
    return None, ""


def _add_text_model(sources: dict[str, str], family: Family, text_family: Family, part: str) -> None:
    """Makes the text model of another family known to the files of `family`."""
    text_config = f"{text_family.prefix}{part}"
    module = f"configuration_{text_family.model_type}"
    sources[f"configuration_{family.model_type}.py"] += TEXT_CONFIG_SOURCE.format(module=module, config=text_config)
    sources[AUTO_MODEL_FILE] = AUTO_MODEL_SOURCE.format(
        model_type=text_family.load("configuration", part).model_type,
        module=f"modeling_{text_family.model_type}",
        model=f"{text_family.prefix}{text_family.parts[part]}",
    )
    name = f"modeling_{family.model_type}.py"
    if sources[name].count(IN_TREE_AUTO_MODEL) != 1:
        raise ValueError(
            f"{name} must have the line {IN_TREE_AUTO_MODEL!r} once, for the exported one to stand there."
        )
    replacement = f"from .{AUTO_MODEL_FILE.removesuffix('.py')} import AutoModel\n"
    sources[name] = sources[name].replace(IN_TREE_AUTO_MODEL, replacement)
