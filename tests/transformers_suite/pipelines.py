"""What transformers' `PipelineTesterMixin` asks of a task's own tests, which its source distribution lacks.

The models are the trained miniatures of examples/miniature, so that an answer is right or wrong.
"""

import json
import unittest
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, pipeline
from transformers.utils import is_torchvision_available


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CHECKPOINTS = EXAMPLES / "miniature" / "checkpoints"
PICTURES = EXAMPLES / "images" / "miniature"
# `<model type>/<class>`, where the mixin looks for a model, and its questions in questions.json
MINIATURES = {
    "llava_uhd/LlavaUhdForConditionalGeneration": ("llava-uhd-miniature", "uhd"),
    "moe_llava/MoeLlavaForCausalLM": ("moe-llava-miniature", "moe"),
    "llava_mole/LlavaMoleForCausalLM": ("llava-mole-miniature", "mole"),
}
# The mixin looks classes up in transformers itself, so the processor is loaded below.
PARTS = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}


def write_tiny_models(folder: Path) -> None:
    """The folder that `TRANSFORMERS_TINY_MODEL_PATH` names: a list of models, and the models."""
    summary = folder / "reports" / "tiny_model_summary.json"
    summary.parent.mkdir(parents=True, exist_ok=True)
    summary.write_text(json.dumps({Path(name).name: PARTS for name in MINIATURES}), encoding="utf-8")
    for name, (checkpoint, _) in MINIATURES.items():
        link = folder / name
        link.parent.mkdir(exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(CHECKPOINTS / checkpoint, target_is_directory=True)


def ask_about(model, processor) -> list[dict]:
    """Questions as prompts with images, and their answers."""
    questions = MINIATURES[f"{model.config.model_type}/{type(model).__name__}"][1]
    examples = []
    for item in json.loads((PICTURES / "questions.json").read_text("utf-8"))[questions]:
        content = [{"type": "image"}, {"type": "text", "text": item["question"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        image = Image.open(PICTURES / item["image"]).convert("RGB")
        examples.append({"images": image, "text": prompt, "answer": item["answer"]})
    return examples


class ImageTextToTextPipelineTests:
    task = "image-text-to-text"

    def get_test_pipeline(self, model, tokenizer, dtype, **processors):
        processor = AutoProcessor.from_pretrained(model.name_or_path)
        model = model.to(dtype=getattr(torch, dtype))
        settings = {"do_sample": False, "max_new_tokens": 8}
        pipe = pipeline(self.task, model=model, processor=processor, generate_kwargs=settings)
        examples = ask_about(model, processor)
        self.answers = [example.pop("answer") for example in examples]
        return pipe, examples

    def run_pipeline_test(self, pipe, examples):
        for batch_size in (1, len(examples)):
            outputs = pipe((example for example in examples), batch_size=batch_size, return_full_text=False)
            given = [output["generated_text"].strip() for (output,) in outputs]
            assert given == self.answers, f"batch size {batch_size}: {given}, but {self.answers} are right"


class AnyToAnyPipelineTests(ImageTextToTextPipelineTests):
    task = "any-to-any"

    def get_test_pipeline(self, *args, **kwargs):
        if not is_torchvision_available():
            raise unittest.SkipTest("The any-to-any pipeline requires torchvision, which is optional here")
        return super().get_test_pipeline(*args, **kwargs)


class TextGenerationPipelineTests:
    def get_test_pipeline(self, model, tokenizer, dtype, **processors):
        tokenizer = AutoProcessor.from_pretrained(model.name_or_path).tokenizer
        pipe = pipeline("text-generation", model=model.to(dtype=getattr(torch, dtype)), tokenizer=tokenizer)
        return pipe, ["What number is", "Which shape"]

    def run_pipeline_test(self, pipe, examples):
        settings = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4, "return_full_text": False}
        one_by_one = [pipe(example, **settings) for example in examples]
        assert all(output["generated_text"] for (output,) in one_by_one)
        assert pipe(examples, batch_size=2, **settings) == one_by_one
