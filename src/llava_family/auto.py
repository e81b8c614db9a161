"""Registers the model families with transformers' Auto classes, without importing torch before it is needed.

`.register` wants classes, and importing them costs seconds. So `import llava_family` only puts a note into the Auto
mappings: the first time that one of them is read, all families are imported and registered. transformers itself has no
plugin discovery.

Source: `register` of transformers' Auto classes.
"""

import importlib.abc
import importlib.machinery
import sys
import threading
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


# Auto module -> its mappings that our classes are registered with
AUTO_MAPPINGS = {
    "transformers.models.auto.configuration_auto": ("CONFIG_MAPPING",),
    "transformers.models.auto.modeling_auto": (
        "MODEL_MAPPING",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
        "MODEL_FOR_MULTIMODAL_LM_MAPPING",
        "MODEL_FOR_CAUSAL_LM_MAPPING",
    ),
    "transformers.models.auto.processing_auto": ("PROCESSOR_MAPPING",),
    "transformers.models.auto.image_processing_auto": ("IMAGE_PROCESSOR_MAPPING",),
}


@dataclass(frozen=True)
class Family:
    """Names of the classes of one family, without the prefix that all of them have.

    Attributes:
        model_type (`str`): `model_type` of the configuration, and the family's folder.
        prefix (`str`): What the names of its classes begin with.
        head (`str`): Name of the model with a language modeling head.
        parts (`dict[str, str]`): Configurations of parts, and the models that they build.
        causal_lm (`bool`, *optional*, defaults to `False`): Whether `AutoModelForCausalLM` finds the head too.
    """

    model_type: str
    prefix: str
    head: str
    # Configurations of parts -> the models that they build
    parts: dict[str, str]
    causal_lm: bool = False

    def load(self, module: str, name: str):
        """Imports an attribute of `<module>_<family>.py`.

        Args:
            module (`str`): Such as `"modeling"`.
            name (`str`): Of a function, or of a class without the family's prefix.

        Returns:
            `Any`: The attribute.
        """
        loaded = import_module(f".{self.model_type}.{module}_{self.model_type}", __package__)
        return getattr(loaded, name if name.islower() else f"{self.prefix}{name}")


FAMILIES = (
    Family("llava_uhd", "LlavaUhd", "ForConditionalGeneration", {"VisionConfig": "VisionModel"}),
    Family(
        "moe_llava",
        "MoeLlava",
        "ForCausalLM",
        {f"{backbone}Config": f"{backbone}Model" for backbone in ("Phi", "StableLm", "Qwen2", "Llama", "Mistral")},
        causal_lm=True,
    ),
    Family("llava_mole", "LlavaMole", "ForCausalLM", {"TextConfig": "TextModel"}, causal_lm=True),
)


def register() -> None:
    """Registers the classes of all families with transformers' Auto classes. Calling it again changes nothing."""
    import transformers

    for family in FAMILIES:
        config = family.load("configuration", "Config")
        parts = {
            family.load("configuration", part): family.load("modeling", model) for part, model in family.parts.items()
        }
        for config_class in (config, *parts, *family.load("configuration", "original_configs")()):
            transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)

        for config_class, model in {config: family.load("modeling", "Model"), **parts}.items():
            transformers.AutoModel.register(config_class, model, exist_ok=True)
        heads = [transformers.AutoModelForImageTextToText, transformers.AutoModelForMultimodalLM]
        for auto_class in heads + [transformers.AutoModelForCausalLM] * family.causal_lm:
            auto_class.register(config, family.load("modeling", family.head), exist_ok=True)
        transformers.AutoProcessor.register(config, family.load("processing", "Processor"), exist_ok=True)
        image_processors = {
            "torchvision": family.load("image_processing", "ImageProcessor"),
            "pil": family.load("image_processing_pil", "ImageProcessorPil"),
        }
        transformers.AutoImageProcessor.register(config, image_processor_classes=image_processors, exist_ok=True)


def register_on_first_use() -> None:
    """Arranges that `register` runs before transformers' Auto mappings are first read, whenever that is."""
    for name in AUTO_MAPPINGS:
        if name in sys.modules:
            _watch_mappings(sys.modules[name])
    if not any(isinstance(finder, _AutoModuleFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoModuleFinder())


def _fill_name_tables(module: ModuleType) -> None:
    """Enters class names where transformers looks names up in a table that `.register` does not fill."""
    for family in FAMILIES:
        # `transformers serve` knows by these what a model is.
        for table in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"):
            getattr(module, table, {})[family.model_type] = f"{family.prefix}{family.head}"
        # The PIL backend has the original's pixels, so it stays the default where torchvision is installed.
        pil_by_default = getattr(module, "DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS", [])
        if f"{family.prefix}ImageProcessor" not in pil_by_default:
            pil_by_default.append(f"{family.prefix}ImageProcessor")


def _watch_mappings(module: ModuleType) -> None:
    _fill_name_tables(module)
    for name in AUTO_MAPPINGS[module.__name__]:
        mapping = getattr(module, name)
        if not isinstance(mapping._extra_content, _WatchedRegistrations):
            mapping._extra_content = _WatchedRegistrations(mapping)


_lock = threading.RLock()
_registered = False


def _register_once() -> None:
    global _registered
    with _lock:
        if not _registered:
            _registered = True  # before the fact: registering reads the mappings itself
            try:
                register()
            except BaseException:
                _registered = False
                raise


class _WatchedRegistrations(dict):
    """The registered classes of an Auto mapping; whoever looks for what transformers does not have, finds ours.

    Look-ups of transformers' own classes pass: they happen while modules are being imported, ours among them.
    """

    def __init__(self, mapping):
        super().__init__(mapping._extra_content)
        self._in_tree_names = getattr(mapping, "_mapping", ())

    def _register_for(self, key) -> None:
        # A `model_type` may be anything that a file says.
        module = str(getattr(key, "__module__", ""))
        in_tree = key in self._in_tree_names if isinstance(key, str) else module.startswith("transformers.")
        if not in_tree:
            _register_once()

    def __contains__(self, key):
        self._register_for(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self._register_for(key)
        return super().__getitem__(key)

    def __iter__(self):
        _register_once()
        return super().__iter__()

    def __len__(self):
        _register_once()
        return super().__len__()

    def keys(self):
        _register_once()
        return super().keys()

    def values(self):
        _register_once()
        return super().values()

    def items(self):
        _register_once()
        return super().items()


class _AutoModuleFinder(importlib.abc.MetaPathFinder):
    """Watches the mappings of an Auto module as soon as it is imported, which Python's own loader does."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in AUTO_MAPPINGS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_watch(module: ModuleType) -> None:
            execute(module)
            _watch_mappings(module)

        spec.loader.exec_module = execute_and_watch
        return spec
