"""Times the families on a GPU at the sizes of 7B and 13B models, against in-tree models of the same text model.

    python benchmarks/gpu.py [--rounds 10] [--size 7B] [--quick] [--json]

Weights are random, bfloat16, made on the device one model after the other. Prefill is an image of 672x1088 pixels with
32 tokens of text; decoding is 64 tokens more, one at a time. `--quick` runs tiny models on any device, to see that it
runs. Exits with 1 where a claim fails.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from prefill import IMAGE, TEXT_TOKENS, image_inputs, num_placeholders
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from llava_family import (
    LlavaMoleConfig,
    LlavaMoleForCausalLM,
    LlavaMoleTextConfig,
    LlavaUhdConfig,
    LlavaUhdForConditionalGeneration,
    LlavaUhdVisionConfig,
    MoeLlavaConfig,
    MoeLlavaForCausalLM,
    MoeLlavaLlamaConfig,
)
from llava_family.llava_uhd.modeling_llava_uhd import preferred_flash_attention
from llava_family.training import freeze_for_mole_tuning


NEW_TOKENS = 64
CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
TEXTS = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40},
    # As wide as MoE-LLaVA's smaller releases, for what needs experts or gradients
    "1.6B": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_hidden_layers": 24},
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
RANK, ALPHA = 32, 64


def text_sizes(sizes: dict[str, int]) -> dict[str, int]:
    return {**sizes, "num_key_value_heads": sizes["num_attention_heads"], "vocab_size": IMAGE + 1}


def vision_sizes(sizes: dict[str, int]) -> dict[str, int]:
    return {**sizes, "image_size": 336, "patch_size": 14}


def prompt_of(config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if isinstance(config, LlavaUhdConfig | LlavaNextConfig):
        inputs, placeholders = image_inputs(config), num_placeholders(config)
    else:  # one square; LLaVA-MoLE has an embedding before and one behind it
        generator = torch.Generator().manual_seed(1)
        inputs = {"pixel_values": torch.randn(1, 3, 336, 336, generator=generator)}
        placeholders = 576 + 2 * isinstance(config, LlavaMoleConfig)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    text = torch.randint(1, IMAGE, (TEXT_TOKENS,), generator=torch.Generator().manual_seed(2))
    inputs["input_ids"] = torch.cat([torch.full((placeholders,), IMAGE), text])[None]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return {name: tensor.to(device) for name, tensor in inputs.items()}


class Benchmark:
    """Makes models one after the other, times them, and keeps medians, quartiles and the peak of memory."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rounds: int):
        self.device, self.dtype, self.rounds = device, dtype, rounds
        self.records: list[dict[str, Any]] = []

    def build(self, model_class: type, config: Any, attention: str | None = "sdpa") -> Any:
        torch.manual_seed(0)
        with self.device:
            return model_class._from_config(config, dtype=self.dtype, attn_implementation=attention).eval()

    def time(self, what: str, name: str, function: Callable[[], Any], per: int = 1) -> None:
        """Adds a record of `function`, whose time is divided by `per`."""
        for _ in range(2):
            function()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(self.rounds):
            self.wait()
            start = time.perf_counter()
            function()
            self.wait()
            seconds.append((time.perf_counter() - start) / per)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        record = {"what": what, "model": name, "seconds": median, "quartiles": [low, high], "peak_bytes": peak}
        self.records.append(record)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def serving_configs(sizes: dict[str, int], vision: dict[str, int]) -> Iterator[tuple[str, type, Any]]:
    """What is served, by name: models of equal text model."""
    text, vision = text_sizes(sizes), vision_sizes(vision)
    for queries, kind in ((64, "perceiver"), (144, "spatial")):
        config = LlavaUhdConfig(
            text_config=LlamaConfig(**text),
            vision_config=LlavaUhdVisionConfig(**vision),
            resampler_type=kind,
            num_queries=queries,
            resampler_num_attention_heads=text["num_attention_heads"],
            image_token_id=IMAGE,
        )
        yield f"LLaVA-UHD, {queries} queries", LlavaUhdForConditionalGeneration, config
    parts = {"text_config": LlamaConfig(**text), "vision_config": CLIPVisionConfig(**vision), "image_token_id": IMAGE}
    yield "LLaVA-1.5 in tree", LlavaForConditionalGeneration, LlavaConfig(**parts)
    yield "LLaVA-NeXT in tree", LlavaNextForConditionalGeneration, LlavaNextConfig(**parts)


@torch.no_grad()
def time_serving(bench: Benchmark, sizes: dict[str, int], vision: dict[str, int], new_tokens: int) -> None:
    """Prefill and decoding, under sdpa and, where it is installed, flash attention."""
    for attention in filter(None, ("sdpa", preferred_flash_attention(bench.dtype))):
        for name, model_class, config in serving_configs(sizes, vision):
            model = bench.build(model_class, config, attention)
            prompt = prompt_of(config, bench.device, bench.dtype)
            label = f"{name}, {attention}"
            bench.time("prefill", label, lambda model=model, prompt=prompt: model(**prompt, logits_to_keep=1))

            def decode(model: Any = model, prompt: dict = prompt) -> None:
                model.generate(**prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)

            bench.time("prefill and decoding, per token", label, decode, per=new_tokens)
            del model, decode
            bench.free()


@torch.no_grad()
def time_experts(bench: Benchmark, sizes: dict[str, int], vision: dict[str, int]) -> None:
    """MoE-LLaVA, two of four experts in every second layer, and the dense model that it is made of."""
    text, clip = text_sizes(sizes), CLIPVisionConfig(**vision_sizes(vision))
    for name, text_config in (
        ("dense", LlamaConfig(**text)),
        ("MoE, 2 of 4 experts", MoeLlavaLlamaConfig(**text, num_experts=4, num_experts_per_tok=2)),
    ):
        config = MoeLlavaConfig(text_config=text_config, vision_config=clip, image_token_id=IMAGE)
        model = bench.build(MoeLlavaForCausalLM, config)
        prompt = prompt_of(config, bench.device, bench.dtype)
        bench.time("prefill", f"MoE-LLaVA, {name}", lambda model=model, prompt=prompt: model(**prompt))
        del model
        bench.free()


def time_adapters(bench: Benchmark, sizes: dict[str, int], vision: dict[str, int]) -> None:
    """A training step with LoRA, and with a mixture of three LoRA experts of the same rank."""
    text, clip = text_sizes(sizes), CLIPVisionConfig(**vision_sizes(vision))
    for name in ("LoRA", "MoLE, 3 experts"):
        mixture = {"num_experts": 3, "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0} if name != "LoRA" else {}
        text_config = LlavaMoleTextConfig(**text, **mixture) if mixture else LlamaConfig(**text)
        config = LlavaMoleConfig(text_config=text_config, vision_config=clip, image_token_id=IMAGE)
        model = bench.build(LlavaMoleForCausalLM, config)
        prompt = prompt_of(config, bench.device, bench.dtype)
        if mixture:
            freeze_for_mole_tuning(model)
        else:
            targets = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
            model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-8)
        labels = prompt["input_ids"].masked_fill(prompt["input_ids"] == IMAGE, -100)

        def step(model: Any = model, prompt: dict = prompt, labels: Any = labels, optimizer: Any = optimizer) -> None:
            model(**prompt, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        bench.time("training step", f"LLaVA-MoLE, {name}", step)
        del model, optimizer, trained, step
        bench.free()


# What is compared, with what, and by how much the second must be slower, at least
CLAIMS = (
    ("prefill", "LLaVA-UHD, 64 queries, sdpa", "LLaVA-NeXT in tree, sdpa", 2.5),
    ("prefill", "MoE-LLaVA, dense", "MoE-LLaVA, MoE, 2 of 4 experts", None),
    ("training step", "LLaVA-MoLE, LoRA", "LLaVA-MoLE, MoLE, 3 experts", None),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="how often everything is timed, at least 2")
    parser.add_argument("--size", choices=["7B", "13B"], default="7B", help="text model of what is served")
    parser.add_argument("--quick", action="store_true", help="tiny models on any device: no claim is checked")
    parser.add_argument("--json", action="store_true", help="print records instead of a table")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2")
    if not arguments.quick and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --quick runs tiny models on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Without a GPU, bfloat16 takes ten times as long.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bench = Benchmark(device, dtype, arguments.rounds)
    served, small, vision = (TINY, TINY, TINY) if arguments.quick else (TEXTS[arguments.size], TEXTS["1.6B"], CLIP)
    time_serving(bench, served, vision, 4 if arguments.quick else NEW_TOKENS)
    time_experts(bench, small, vision)
    time_adapters(bench, small, vision)
    seconds = {(record["what"], record["model"]): record["seconds"] for record in bench.records}
    claims = []
    for what, one, other, limit in CLAIMS:
        ratio = seconds[what, other] / seconds[what, one]
        claims.append({"what": what, "model": one, "compared with": other, "ratio": ratio, "at least": limit})
    if arguments.json:
        print(json.dumps({"records": bench.records, "claims": claims}, indent=2))
    else:
        card = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
        console = Console(width=None if sys.stdout.isatty() else 119, highlight=False)
        size = "tiny" if arguments.quick else arguments.size
        console.print(to_table(bench.records, f"{size}, {str(dtype).removeprefix('torch.')}, {card}"))
        for claim in claims:
            slower = f"takes {claim['ratio']:.2f} times as long as {claim['model']}"
            limit = f", claimed >= {claim['at least']}" if claim["at least"] else ""
            console.print(f"{claim['what']}: {claim['compared with']} {slower}{limit}")
    failed = any(claim["at least"] and claim["ratio"] < claim["at least"] for claim in claims)
    return int(not arguments.quick and failed)


def to_table(records: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE)
    for heading in ("what", "model", "ms", "quartiles", "peak GB"):
        table.add_column(heading, justify="left" if heading in ("what", "model") else "right", no_wrap=True)
    for record in records:
        low, high = (1e3 * each for each in record["quartiles"])
        peak = "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 1e9:.1f}"
        times = (f"{1e3 * record['seconds']:.2f}", f"{low:.2f}..{high:.2f}")
        table.add_row(record["what"], record["model"], *times, peak)
    return table


if __name__ == "__main__":
    sys.exit(main())
