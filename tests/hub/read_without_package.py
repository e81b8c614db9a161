"""Loads exported repositories as someone without llava_family does, and notes what comes out.

Called with two files: jobs to read, and results to write.
"""

import json
import sys

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers.models.auto import image_processing_auto


REMOTE = {"trust_remote_code": True}
QUESTION = "What is this?"


def messages_about(image):
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


def inputs_for(processor, image):
    return processor.apply_chat_template(
        messages_about(image), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def answer(model, inputs):
    """Logits and greedily generated ids."""
    logits = model(**inputs).logits
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=5)
    return {"logits": logits, "generated": generated}


def classes_of(repository, heads):
    """Names of the classes that the Auto classes find; every one of them is loaded."""
    loaded = {}
    for name in ("AutoImageProcessor", "AutoProcessor", "AutoTokenizer", "AutoConfig"):
        loaded[name] = getattr(transformers, name).from_pretrained(repository, **REMOTE)
    for name in ("AutoModel", *heads):
        loaded[name] = getattr(transformers, name).from_pretrained(repository, dtype=torch.float32, **REMOTE)
    classes = {name: f"{type(part).__module__}.{type(part).__name__}" for name, part in loaded.items()}
    return classes, loaded[heads[0]].eval(), loaded["AutoProcessor"]


def default_image_processors(repository):
    """What `AutoImageProcessor` chooses where torchvision is installed, by default and on demand."""
    available, image_processing_auto.is_torchvision_available = (
        image_processing_auto.is_torchvision_available,
        lambda: True,
    )
    try:
        by_default = transformers.AutoImageProcessor.from_pretrained(repository, **REMOTE)
    finally:
        image_processing_auto.is_torchvision_available = available
    on_demand = transformers.AutoImageProcessor.from_pretrained(repository, backend="torchvision", **REMOTE)
    return type(by_default).__name__, type(on_demand).__name__


def generated_text(image, **arguments):
    """The answer of a pipeline that is made with `arguments`."""
    ask = transformers.pipeline("image-text-to-text", dtype=torch.float32, **arguments)
    arguments = {"return_full_text": False, "generate_kwargs": {"do_sample": False, "max_new_tokens": 5}}
    return ask(text=messages_about(image), **arguments)[0]["generated_text"]


@torch.no_grad()
def read(job):
    image = Image.open(job["image"]).convert("RGB")
    image_processors = default_image_processors(job["repository"])
    classes, model, processor = classes_of(job["repository"], job["heads"])
    inputs = inputs_for(processor, image)
    save_file({**inputs, **answer(model, inputs)}, job["tensors"])
    try:
        processor.explain(image)
    except ImportError as error:
        explain_error = str(error)
    return {
        "classes": classes,
        "explain_error": explain_error,
        "image_processors": image_processors,
        "text": generated_text(image, model=job["repository"], **REMOTE),
    }


def main(jobs_file, results_file):
    with open(jobs_file, encoding="utf-8") as file:
        jobs = json.load(file)
    results = {name: read(job) for name, job in jobs.items()}
    assert not any(name.split(".")[0] == "llava_family" for name in sys.modules)
    with open(results_file, "w", encoding="utf-8") as file:
        json.dump(results, file)
