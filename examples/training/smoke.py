"""`--smoke`: a tiny random model and a few drawn pictures, which train in seconds, and a check of what came out.

Nothing is downloaded. It shows that a script runs from its data to a checkpoint that loads and answers, and that it
trains what it shall train and nothing else; not that the model learns to see.
"""

import json
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from composing import PartsArguments
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


SETTINGS = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 4,
    "dataloader_num_workers": 0,
    # The recipes' are for GPUs.
    "use_cpu": not torch.accelerator.is_available(),
    "bf16": False,
    "tf32": False,
    "report_to": "none",
    "disable_tqdm": True,
}
COLOURS = ("red", "green", "blue", "yellow")
SIZES = ((56, 56), (112, 56), (60, 150), (40, 30))
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


class SmokeTest:
    """The smoke test of a script.

    Args:
        compose (`Callable`): Makes a model and a processor of a language model and a vision tower.
        trained (`str` or `dict[str, str]`): Regular expression for the names of the weights that training changes; all
            others it must not. One for each `method` of a script that has several.
        settings (*optional*): Settings of the script beside those of all smoke tests.
    """

    def __init__(self, compose: Callable[..., tuple[Any, Any]], trained: str | dict[str, str], **settings: Any):
        self.compose = compose
        self.trained = trained
        self.settings = {**SETTINGS, **settings}
        self.before: dict[str, torch.Tensor] = {}

    def provide(self, run: Any, arguments: Sequence[Any]) -> None:
        """Fills in the data, the model or its parts, and the output, unless they are given.

        One process writes them, for all of those on this machine.
        """
        is_distributed = torch.distributed.is_initialized()
        if not is_distributed or torch.distributed.get_rank() == 0:
            self._temporary = tempfile.TemporaryDirectory(prefix="llava-family-smoke-")
            self._fill_in(Path(self._temporary.name), run, arguments)
        filled = [vars(run), *(vars(each) for each in arguments)]
        if is_distributed:
            torch.distributed.broadcast_object_list(filled)
        for each, values in zip([run, *arguments], filled, strict=True):
            vars(each).update(values)

    def _fill_in(self, folder: Path, run: Any, arguments: Sequence[Any]) -> None:
        run.output = run.output or str(folder / "trained")
        if run.data is None:
            captions_only = getattr(run, "template", "chat") == "plain"
            draw_conversations(folder / "images", folder / "conversations.json", captions_only)
            run.data, run.image_folder = str(folder / "conversations.json"), str(folder / "images")
        for each in arguments:
            if getattr(each, "language_model", "") is None:
                each.language_model, each.vision_tower = save_parts(folder)
            if getattr(each, "model", "") is None:
                each.model = self._save_model(folder)

    def _save_model(self, folder: Path) -> str:
        for part in self.compose(PartsArguments(*save_parts(folder))):
            part.save_pretrained(folder / "model")
        return str(folder / "model")

    def remember(self, model: Any, arguments: Sequence[Any]) -> None:
        """Keeps the weights that training begins with, under the names that they have without adapters."""
        for method in (each.method for each in arguments if hasattr(each, "method")):
            self.trained = self.trained[method]
        for name, tensor in model.state_dict().items():
            if not re.search(r"\.lora_|\.modules_to_save\.", name):
                name = re.sub(r"^base_model\.model\.|\.base_layer|\.original_module", "", name)
                self.before[name] = tensor.detach().clone()

    def check(self, run: Any, log: list[dict[str, float]]) -> None:
        """
        Raises:
            RuntimeError: if losses are not finite or did not fall, if the wrong weights changed, or if the written
                checkpoint has others than were trained.
        """
        losses = [entry["loss"] for entry in log if "loss" in entry]
        if not all(math.isfinite(loss) for loss in losses) or losses[-1] >= losses[0]:
            raise RuntimeError(f"The losses must be finite and fall, but are {losses}.")
        model = AutoModelForImageTextToText.from_pretrained(run.output, dtype="auto").eval()
        after = model.state_dict()
        if set(after) != set(self.before):
            raise RuntimeError(f"The checkpoint has other weights: {sorted(set(after) ^ set(self.before))[:10]}.")
        changed = [name for name in after if not torch.equal(after[name], self.before[name].to(after[name].dtype))]
        wrong = sorted(set(changed) ^ {name for name in after if re.search(self.trained, name)})
        if wrong:
            raise RuntimeError(f"What is trained must change, and nothing else. It is otherwise for {wrong[:10]}.")
        answer = ask(model, AutoProcessor.from_pretrained(run.output))
        print(
            f"smoke test passed: loss {losses[0]:.3f} to {losses[-1]:.3f}, {len(changed)} of {len(after)} weights "
            f"trained and the others bit-equal; the checkpoint loads and answers {answer!r}"
        )


def ask(model: Any, processor: Any) -> str:
    """A few tokens of an answer about a picture."""
    content = [{"type": "image", "image": draw("red", SIZES[1])}, {"type": "text", "text": "What colour is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(dtype=model.dtype)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def draw(colour: str, size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4), fill=colour)
    return image


def draw_conversations(folder: Path, data: Path, captions_only: bool) -> None:
    """Pictures of all colours and shapes, and LLaVA's conversations about one, two or none of them."""
    folder.mkdir()
    samples = []
    for colour in COLOURS:
        for number, size in enumerate(SIZES):
            name = f"{colour}-{number}.png"
            draw(colour, size).save(folder / name)
            question = {"from": "human", "value": "<image>\nWhat colour is it?"}
            answer = {"from": "gpt", "value": f"It is {colour}."}
            samples.append({"id": name, "image": name, "conversations": [question, answer]})
    if not captions_only:
        two, none = samples[0], samples[-1]
        two["image"] = ["red-0.png", "red-1.png"]
        two["conversations"][0]["value"] = "<image>\n<image>\nWhat colour are they?"
        del none["image"]
        none["conversations"][0]["value"] = "What is your favourite colour?"
    data.write_text(json.dumps(samples), encoding="utf-8")


def save_parts(folder: Path) -> tuple[str, str]:
    """Folders of a language model with its tokenizer, and of CLIP."""
    language_model, vision_tower = folder / "language-model", folder / "clip"
    if not vision_tower.exists():
        tokenizer = tiny_tokenizer()
        text_config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            # So that 8 steps show something
            initializer_range=0.1,
            **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
        )
        vision_config = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        )
        tokenizer.save_pretrained(language_model)
        LlamaForCausalLM(text_config).save_pretrained(language_model)
        CLIPVisionModel(vision_config).save_pretrained(vision_tower)
    return str(language_model), str(vision_tower)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without a merge: every byte is a token, so a comma and a newline are."""
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


__all__ = ["SmokeTest"]
