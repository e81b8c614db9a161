"""Times the conversion of a full-size MoE-LLaVA-StableLM-1.6B-4e against `cp` of the same files, and its memory.

    python benchmarks/conversion.py [--rounds 3] [--folder /tmp] [--quick] [--json]

The checkpoint, in the layout of the original's release, is made on the fly of random weights: 6.4 GB. Every round
copies it and converts it, in turns, each from the disk and back onto it. Exits with 1 where a claim fails.
"""

import argparse
import base64
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import chain, product
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from llava_family.conversion.writing import MAX_SHARD_BYTES


FIXTURE = Path(__file__).parents[1] / "tests" / "fixtures" / "moe_llava" / "stablelm_clip336"
TOWER = "openai/clip-vit-tiny-patch14-56"
# As in the release; the third is that of the tower.
FULL_SIZE = {"text": (2048, 5632, 24), "tower": (1024, 4096, 24), "image": 336, "ranks": 100256, "rows": 100352}
QUICK_SIZE = {"text": (256, 512, 4), "tower": (64, 128, 2), "image": 56, "ranks": 346, "rows": 416}
MIN_SPEED = 0.6
MAX_EXTRA_BYTES = 400_000_000
NUM_EXPERTS = 4


def text_shapes(size: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the language model with the projector, in the original's layout."""
    width, inner, layers = size["text"]
    shapes = {"model.embed_tokens.weight": (size["rows"], width), "lm_head.weight": (size["rows"], width)}
    for index in range(layers):
        layer = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{layer}.{norm}.weight": (width,), f"{layer}.{norm}.bias": (width,)}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.bias": (width,) for name in "qkv"}
        networks = [f"{layer}.mlp"]
        if index % 2 == 0:
            moe = f"{layer}.mlp.deepspeed_moe"
            shapes[f"{moe}.gate.wg.weight"] = (NUM_EXPERTS, width)
            networks = [f"{moe}.experts.deepspeed_experts.{expert}" for expert in range(NUM_EXPERTS)]
        for network in networks:
            shapes |= {f"{network}.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
            shapes[f"{network}.down_proj.weight"] = (width, inner)
    shapes |= {"model.norm.weight": (width,), "model.norm.bias": (width,)}
    projector = "model.mm_projector.image_spatial_proj"
    shapes |= {f"{projector}.0.weight": (width, size["tower"][0]), f"{projector}.2.weight": (width, width)}
    return shapes | {f"{projector}.0.bias": (width,), f"{projector}.2.bias": (width,)}


def tower_shapes(size: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the vision tower, as the releases hold it."""
    width, inner, layers = size["tower"]
    prefix = "model.image_tower.image_tower.vision_model"
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.embeddings.class_embedding": (width,)}
    shapes[f"{prefix}.embeddings.patch_embedding.weight"] = (width, 3, 14, 14)
    shapes[f"{prefix}.embeddings.position_embedding.weight"] = ((size["image"] // 14) ** 2 + 1, width)
    norms = [f"{prefix}.pre_layrnorm", f"{prefix}.post_layernorm"]
    for index in range(layers):
        layer = f"{prefix}.encoder.layers.{index}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        linears = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
        for name, shape in linears.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    return shapes | {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}


def make_checkpoint(folder: Path, size: dict, shard_bytes: int) -> None:
    """Writes a checkpoint of random weights; settings are those of the fixture, but for their sizes."""
    shutil.copytree(FIXTURE / "original_checkpoint", folder, ignore=shutil.ignore_patterns("model*"))
    shutil.copytree(FIXTURE / "openai", folder / "openai", ignore=shutil.ignore_patterns("model*"))
    width, inner, layers = size["text"]
    changes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    changes |= {"vocab_size": size["rows"], "num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    config = json.loads((folder / "config.json").read_text())
    config["moe"] |= {"moe_layers_idx": list(range(0, layers, 2)), "num_experts": [NUM_EXPERTS] * (layers // 2)}
    (folder / "config.json").write_text(json.dumps(config | changes | {"mm_hidden_size": size["tower"][0]}))
    tower_width, tower_inner, tower_layers = size["tower"]
    sizes = {"hidden_size": tower_width, "intermediate_size": tower_inner, "num_hidden_layers": tower_layers}
    sizes |= {"num_attention_heads": tower_width // 64, "image_size": size["image"], "patch_size": 14}
    path = folder / TOWER / "config.json"
    tower = json.loads(path.read_text())
    path.write_text(json.dumps({**tower, **sizes, "vision_config": {**tower.get("vision_config", {}), **sizes}}))
    tokens = chain.from_iterable(product(range(256), repeat=length) for length in (1, 2, 3))
    lines = [
        f"{base64.b64encode(bytes(token)).decode()} {rank}"
        for rank, token in zip(range(size["ranks"]), tokens, strict=False)
    ]
    (folder / "arcade100k.tiktoken").write_text("\n".join(lines) + "\n")
    write_weights(folder, text_shapes(size) | tower_shapes(size), shard_bytes)


def write_weights(folder: Path, shapes: dict[str, tuple[int, ...]], shard_bytes: int) -> None:
    """Random weights in bfloat16, in shards with an index."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        num_bytes = 2 * torch.Size(shape).numel()
        if filled + num_bytes > shard_bytes:
            shards, filled = [*shards, []], 0
        shards[-1].append(name)
        filled += num_bytes
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_() for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def forget(folder: Path) -> None:
    """Makes the system drop the files from memory, so that whoever reads them next does so from the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def copy(source: Path, target: Path) -> float:
    """Seconds that `cp` takes until all is on the disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True)
    for path in target.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def convert(source: Path, target: Path) -> dict:
    """Seconds of a conversion in a process of its own, without its imports, and its memory."""
    command = [sys.executable, __file__, "--worker", str(source), str(target)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def work(source: str, target: str) -> None:
    """The process that converts."""
    from llava_family.converters.moe_llava import convert_moe_llava_checkpoint

    peak, done = [anonymous_bytes()], threading.Event()
    start_bytes = peak[0]

    def sample() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    start = time.perf_counter()
    convert_moe_llava_checkpoint(source, target, report=lambda line: None)
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    print(json.dumps({"seconds": seconds, "anonymous_bytes": peak[0], "imported_bytes": start_bytes}))


def anonymous_bytes() -> int:
    """RssAnon of this process: memory that is no file's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def measure(parent: Path, size: dict, rounds: int, shard_bytes: int) -> dict:
    """Times of all rounds, and the largest memory of any."""
    source = parent / "original"
    make_checkpoint(source, size, shard_bytes)
    records: dict[str, list] = {"copy_seconds": [], "convert_seconds": [], "anonymous_bytes": []}
    for number in range(rounds):
        for turn in ("copy", "convert") if number % 2 == 0 else ("convert", "copy"):
            target = parent / turn
            forget(source)
            if turn == "copy":
                records["copy_seconds"].append(copy(source, target))
            else:
                result = convert(source, target)
                records["convert_seconds"].append(result["seconds"])
                records["anonymous_bytes"].append(result["anonymous_bytes"])
                written = sum(path.stat().st_size for path in target.iterdir())
            shutil.rmtree(target)
    speeds = [cp / ours for cp, ours in zip(records["copy_seconds"], records["convert_seconds"], strict=True)]
    read = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    limit = MAX_SHARD_BYTES + MAX_EXTRA_BYTES
    peak = max(records["anonymous_bytes"])
    return {
        **records,
        "read_bytes": read,
        "written_bytes": written,
        "speed": statistics.median(speeds),
        "speeds": speeds,
        "speed_holds": statistics.median(speeds) >= MIN_SPEED,
        "peak_bytes": peak,
        "limit_bytes": limit,
        "memory_holds": peak <= limit,
    }


def to_table(record: dict, quick: bool) -> Table:
    table = Table(title="Conversion of MoE-LLaVA-StableLM-1.6B-4e", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("", "measured", "compared with", "ratio", "claim", ""):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    gigabytes = record["read_bytes"] / 1e9
    ours, cp = (statistics.median(record[name]) for name in ("convert_seconds", "copy_seconds"))

    def verdict(holds: bool) -> str:
        return "" if quick else "pass" if holds else "FAIL"

    table.add_row(
        "speed",
        f"{ours:.1f} s, {gigabytes / ours:.2f} GB/s",
        f"cp: {cp:.1f} s, {gigabytes / cp:.2f} GB/s",
        f"{record['speed']:.2f} ({min(record['speeds']):.2f}..{max(record['speeds']):.2f})",
        f">= {MIN_SPEED}",
        verdict(record["speed_holds"]),
    )
    table.add_row(
        "RssAnon, peak",
        f"{record['peak_bytes'] / 1e6:,.0f} MB",
        f"a shard + 400 MB: {record['limit_bytes'] / 1e6:,.0f} MB",
        f"{record['peak_bytes'] / record['limit_bytes']:.2f}",
        "<= 1",
        verdict(record["memory_holds"]),
    )
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often it is copied and converted")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure; 20 GB are needed")
    parser.add_argument("--quick", action="store_true", help="a tiny checkpoint, to see that it runs: no claims")
    parser.add_argument("--json", action="store_true", help="print a record, in seconds and bytes, instead of a table")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be positive")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.worker:
        work(*arguments.worker)
        return 0
    size, shard_bytes = (QUICK_SIZE, 4_000_000) if arguments.quick else (FULL_SIZE, 4_990_000_000)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as parent:
        record = measure(Path(parent), size, arguments.rounds, shard_bytes)
    if arguments.json:
        print(json.dumps(record, indent=2))
    else:
        # A pipe has no width to fit the table into.
        console = Console(width=None if sys.stdout.isatty() else 119, highlight=False)
        console.print(to_table(record, arguments.quick))
        console.print(
            f"{record['read_bytes'] / 1e6:,.0f} MB read, {record['written_bytes'] / 1e6:,.0f} MB written, "
            f"{arguments.rounds} rounds, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, "
            f"load {os.getloadavg()[0]:.1f}" + (". Too small to check claims." if arguments.quick else "")
        )
    return int(not arguments.quick and not (record["speed_holds"] and record["memory_holds"]))


if __name__ == "__main__":
    sys.exit(main())
