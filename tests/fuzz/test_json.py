"""5,000 broken configurations, processors and tokenizers: loading and using them raises `ValueError` or `OSError`.

Every tenth unless `make fuzz` runs all.
"""

import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import llava_family
from llava_family import (
    LlavaMoleConfig,
    LlavaMoleForCausalLM,
    LlavaMoleProcessor,
    LlavaUhdConfig,
    LlavaUhdForConditionalGeneration,
    LlavaUhdProcessor,
    MoeLlavaConfig,
    MoeLlavaForCausalLM,
    MoeLlavaProcessor,
)

from .checkpoints import make_checkpoints
from .json_mutations import mutate_json
from .watching import run_cases


CASES, PIECES = 5_000, 10
AUTO_CLASSES = (AutoConfig, AutoModelForImageTextToText, AutoProcessor)
CLASSES = {
    "LlavaUhd": (LlavaUhdConfig, LlavaUhdForConditionalGeneration, LlavaUhdProcessor),
    "MoeLlava": (MoeLlavaConfig, MoeLlavaForCausalLM, MoeLlavaProcessor),
    "LlavaMole": (LlavaMoleConfig, LlavaMoleForCausalLM, LlavaMoleProcessor),
}
IMAGE = Image.fromarray(np.arange(60 * 90 * 3, dtype=np.uint8).reshape(60, 90, 3))

# transformers' Auto classes read files before they know that a checkpoint is ours, and stumble over what is no object
# or no string there. (function, error): what it expects
UPSTREAM = {
    ("AutoConfig.from_pretrained", TypeError): "a string as `model_type`, and as `AutoConfig` of `auto_map`",
    ("PreTrainedConfig._get_config_dict", TypeError): "an object in config.json",
    ("PreTrainedConfig._dict_from_json_file", RecursionError): "shallow JSON",
    ("AutoProcessor.from_pretrained", AttributeError): "an object in tokenizer_config.json and processor_config.json",
    ("AutoProcessor.from_pretrained", RecursionError): "shallow JSON",
    ("AutoProcessor.from_pretrained", TypeError): "an object as `auto_map` of tokenizer_config.json",
    ("processor_class_from_name", TypeError): "a string as `processor_class`",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def is_upstream(error):
    """Whether transformers raised it before any code of ours ran."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [frame.f_code.co_qualname for frame in frames if "transformers" in Path(frame.f_code.co_filename).parts]
    ours = Path(llava_family.__file__).parent
    entered = any(Path(frame.f_code.co_filename).is_relative_to(ours) for frame in frames)
    return not entered and any((name, type(error)) in UPSTREAM for name in names[-2:])


def readers(path, config, model, processor):
    """The classes that read a file."""
    if path.name == "config.json":
        return config, model, processor
    if path.name.startswith(("generation_config", "model", "pytorch_model")):
        return (model,)
    return (processor,)


def use(loaded):
    """A short call of a processor or a model."""
    if isinstance(loaded, transformers.ProcessorMixin):
        loaded(images=[IMAGE], text=["a <image> b"], return_tensors="pt")
    elif isinstance(loaded, transformers.PreTrainedModel):
        loaded(input_ids=torch.tensor([[1, 2, 3]]))


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(PIECES))
def test_json(checkpoints, piece):
    texts = {path: path.read_bytes() for checkpoint in checkpoints for path in checkpoint.texts()}

    def run_case(rng):
        checkpoint = rng.choice(checkpoints)
        path = rng.choice(checkpoint.texts())
        classes = readers(path, *(AUTO_CLASSES if rng.random() < 0.5 else CLASSES[checkpoint.family]))
        path.write_bytes(mutate_json(rng, texts[path].decode()))
        try:
            for reader in classes:
                use(reader.from_pretrained(**checkpoint.arguments))
        finally:
            path.write_bytes(texts[path])
        return "loaded"

    run_cases("json", piece, PIECES, CASES, run_case, is_upstream)
