"""Converts a LLaVA-MoLE checkpoint of the original code into a folder that `from_pretrained` loads.

    python conversion_scripts/convert_llava_mole_weights_to_hf.py --checkpoint llava_mole_r16_a32_e3.pt \\
        --vicuna lmsys/vicuna-7b-v1.5 --clip openai/clip-vit-large-patch14-336 --output llava-mole-7b-hf

The file may hold the trained tensors alone or the whole model: like in the original, whatever it holds is taken from
it, and the rest from the language model and the vision tower that the training began with.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlamaTokenizer
from transformers.core_model_loading import WeightRenaming, rename_source_key

from llava_family.conversion import (
    CheckpointReader,
    CheckpointTensors,
    ConversionPlan,
    TensorInfo,
    check_output_folder,
    merge_lora,
    plan_conversion,
    resolve_checkpoint,
    vision_tower_names,
)
from llava_family.conversion.scripting import (
    DTYPES,
    VISION_TOWER_PATTERNS,
    WEIGHT_PATTERNS,
    check_options,
    conversion_parser,
    read_original_config,
    run_conversion,
    write_checkpoint,
)
from llava_family.llava_mole.configuration_llava_mole import (
    ATTENTION_PROJECTIONS,
    LlavaMoleConfig,
    LlavaMoleTextConfig,
)
from llava_family.llava_mole.image_processing_pil_llava_mole import LlavaMoleImageProcessorPil
from llava_family.llava_mole.modeling_llava_mole import LlavaMoleForCausalLM
from llava_family.llava_mole.processing_llava_mole import LlavaMoleProcessor
from llava_family.llava_mole.weight_mapping_llava_mole import (
    LANGUAGE_MODEL,
    PROJECTIONS,
    UNUSED_ORIGINAL_WEIGHTS,
    VISION_TOWER,
    original_weight_mapping,
)


VICUNA_PATTERNS = [*WEIGHT_PATTERNS, "*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"]
ROUTINGS = ("dense", "top1")
# Where the original's training keeps the weights, beside anything else of its state
ENTRY = "state_dict"
# What the original runs in, whatever its files hold
ORIGINAL_DTYPE = "bfloat16"
# The original sets both, whatever the tokenizer's files and its caller say
MAX_LENGTH, MAX_NEW_TOKENS = 4096, 256
REPETITION_PENALTY = 10.0

EXPERT_NAME = re.compile(
    r"\.layers\.(?P<layer>\d+)\.mlp\.(?P<projection>moe_\w+)\.(?P<expert>\d+)\.lora_(?P<side>[AB])$"
)
ROUTER_NAME = re.compile(r"\.layers\.(?P<layer>\d+)\.mlp\.router\.weight$")
ADAPTER_NAME = re.compile(
    r"\.layers\.(?P<layer>\d+)\.self_attn\.(?P<projection>\w+)\.lora_(?P<side>[AB])\.default\.weight$"
)
TEXT_EMBED = "in_adaptor.text_embed.weight"
EMBED_TOKENS = f"{LANGUAGE_MODEL}model.embed_tokens.weight"


def convert_llava_mole_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    vicuna: str | os.PathLike,
    clip: str | os.PathLike,
    lora_alpha: float | None = None,
    routing: str = "dense",
    merge_attention_lora: bool = False,
    dtype: str | None = None,
    push_to_hub: str | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Converts `checkpoint` into the folder `output`, which appears only when it is complete.

    Args:
        checkpoint (`str` or `os.PathLike`): The original's file, such as `llava_mole_r16_a32_e3.pt`, or its tensors as
            safetensors.
        output (`str` or `os.PathLike`): New or empty folder.
        vicuna (`str` or `os.PathLike`): Folder or Hub repository of the language model that the training began with.
        clip (`str` or `os.PathLike`): Folder or Hub repository of the CLIP that the training began with.
        lora_alpha (`float`, *optional*): `lora_alpha` of the training, where the file's name does not have it.
        routing (`"dense"` or `"top1"`, *optional*, defaults to `"dense"`): What the experts were trained with; see
            [`LlavaMoleTextConfig`]. By default that of the original's released inference.
        merge_attention_lora (`bool`, *optional*, defaults to `False`): Whether to add the attention's adapters to the
            weights that they belong to. The experts stay: tokens differ in which they see.
        dtype (`str`, *optional*): `"float32"`, `"float16"` or `"bfloat16"`; by default bfloat16, in which the original
            runs, while its files hold several.
        push_to_hub (`str`, *optional*): Hub repository to upload the finished folder to.
        report (`Callable[[str], None]`, *optional*, defaults to `print`): Receives what was done, line by line.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: if `checkpoint` makes no complete LLaVA-MoLE model with `vicuna` and `clip`, if nothing tells its
            `lora_alpha`, or if `output` is not empty. Nothing is left behind.
        FileNotFoundError: if a file or a folder is missing.
    """
    check_options(dtype, push_to_hub)
    if routing not in ROUTINGS:
        raise ValueError(f"`routing` (`--routing`) must be one of {', '.join(ROUTINGS)}, but is {routing!r}.")
    output = check_output_folder(output)
    path = check_checkpoint_file(checkpoint)
    vicuna_folder = resolve_checkpoint(vicuna, VICUNA_PATTERNS)
    check_model_type(vicuna_folder, "`vicuna` (`--vicuna`)", "Llama", ("llama",))
    clip_folder = resolve_checkpoint(clip, VISION_TOWER_PATTERNS)
    check_model_type(clip_folder, "`clip` (`--clip`)", "CLIP", ("clip", "clip_vision_model"))
    llama_config = LlamaConfig.from_pretrained(vicuna_folder)
    target_dtype = DTYPES[dtype or ORIGINAL_DTYPE]

    with ExitStack() as stack:
        source = CheckpointTensors()
        # A link that the user names is trusted. One into the Hub's cache keeps its name, which tells its format.
        linked = path.resolve()
        file = path if linked.parent.name == "blobs" else linked
        trained = stack.enter_context(CheckpointReader(file.parent, file.name, ENTRY))
        source.add_checkpoint(trained, trained_names(path, trained, report))
        num_experts, rank = infer_experts(path, source.tensors, llama_config.num_hidden_layers)
        alpha = find_alpha(path, num_experts, rank, lora_alpha)
        report(f"Experts: {num_experts} per layer, of rank {rank}, with alpha {alpha:g} and {routing} routing.")
        add_untrained(source, stack.enter_context(CheckpointReader(vicuna_folder)), LANGUAGE_MODEL, report)
        add_untrained(source, stack.enter_context(CheckpointReader(clip_folder)), VISION_TOWER, report)
        check_text_embeddings(path, source)
        if merge_attention_lora:
            # In float32, to be rounded once, when it is written: Vicuna's float16 has not the output's digits.
            count = merge_lora(source, alpha, rank, torch.float32)
            report(f"Merged: {count} LoRA adapters of the attention.")
        if dtype is None:
            report(f"Dtype: {ORIGINAL_DTYPE}, in which the original runs. For its files' own values: --dtype float32.")

        processor = build_processor(vicuna_folder, clip_folder)
        config = LlavaMoleConfig(
            architectures=[LlavaMoleForCausalLM.__name__],
            vision_config=CLIPVisionConfig.from_pretrained(clip_folder),
            text_config=text_config(
                llama_config,
                num_experts=num_experts,
                r=rank,
                lora_alpha=alpha,
                routing=routing,
                attention_target_modules=[] if merge_attention_lora else ATTENTION_PROJECTIONS,
            ),
        )
        set_image_tokens(config, processor, vicuna_folder)
        for part in (config, config.text_config, config.vision_config):
            part.dtype = target_dtype
        plan = plan_llava_mole(config, source.tensors)
        parts = [config, processor, generation_config(config, processor)]
        write_checkpoint(output, plan, source.read, target_dtype, parts, push_to_hub, report)
    return output


def check_checkpoint_file(checkpoint: str | os.PathLike) -> Path:
    """The path of the original's file; an error that says what there is instead."""
    path = Path(checkpoint)
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.pt"))
        raise ValueError(
            f"The checkpoint must be a file of the original's training, such as llava_mole_r16_a32_e3.pt, but {path} "
            f"is a folder. Pass a file in it: it has {', '.join(files) or 'none that ends in .pt'}."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"The checkpoint must be a file of the original's training, such as llava_mole_r16_a32_e3.pt, but {path} "
            "is missing."
        )
    return path


def check_model_type(folder: Path, option: str, kind: str, expected: tuple[str, ...]) -> None:
    """ValueError unless the folder's `config.json` says that its model is one of `expected`."""
    model_type = read_original_config(folder, kind).get("model_type")
    if model_type not in expected:
        raise ValueError(
            f"{option} must be a model of type {' or '.join(expected)}, but {folder / 'config.json'} has the "
            f"`model_type` {model_type!r}. Pass the one that the training began with."
        )


def trained_names(path: Path, reader: CheckpointReader, report: Callable[[str], None]) -> dict[str, str]:
    """The tensors' names without what a distributed training puts before all of them.

    The original ignores names that it does not know, and would run without any expert.
    """
    names = {name: name for name in reader.tensors}
    if all(name.startswith("module.") for name in names):
        names = {name: name.removeprefix("module.") for name in names}
        report("Names: without the `module.` that all of them begin with.")
    if not any(name.startswith(LANGUAGE_MODEL) and EXPERT_NAME.search(name) for name in names.values()):
        raise ValueError(
            f"{path} must hold LLaVA-MoLE's experts, {LANGUAGE_MODEL}model.layers.0.mlp.moe_gate.0.lora_A and so on, "
            f"but has none in its {len(names)} tensors ({', '.join(list(names)[:3])}, ...). Check that it is the file "
            "of a LLaVA-MoLE training, and that its names are the original's."
        )
    return names


def infer_experts(path: Path, tensors: Mapping[str, TensorInfo], num_layers: int) -> tuple[int, int]:
    """Reads number and rank of the experts off the tensors; ValueError if layers differ, or are not `num_layers`."""
    experts: dict[str, dict[int, set[int]]] = {projection: {} for projection in PROJECTIONS}
    adapters: dict[str, set[int]] = {projection: set() for projection in ATTENTION_PROJECTIONS}
    routers: dict[int, int] = {}
    ranks: dict[int, str] = {}
    for name, info in tensors.items():
        expert, adapter, router = (regex.search(name) for regex in (EXPERT_NAME, ADAPTER_NAME, ROUTER_NAME))
        match = expert or adapter or router
        if match is None:
            continue
        if len(info.shape) != 2:
            raise ValueError(f"{name} of {path} must be a matrix, but has shape {info.shape}.")
        layer = int(match["layer"])
        if router:
            routers[layer] = info.shape[0]
            continue
        ranks.setdefault(info.shape[match["side"] == "B"], name)
        if expert:
            experts.setdefault(expert["projection"], {}).setdefault(layer, set()).add(int(expert["expert"]))
        else:
            adapters.setdefault(match["projection"], set()).add(layer)

    if len(ranks) > 1:
        stated = ", ".join(f"{rank} ({name})" for rank, name in sorted(ranks.items()))
        raise ValueError(f"All LoRA factors of {path} must have one rank, but it has several: {stated}.")
    for part, layers in [*experts.items(), ("router", routers), *adapters.items()]:
        if set(layers) != set(range(num_layers)):
            raise ValueError(
                f"{path} must have {part} of all layers of the language model, 0 to {num_layers - 1}, but has that of "
                f"{_some(layers)}. Check that it is complete, and that `vicuna` (`--vicuna`) is the language model of "
                "its training."
            )
    num_experts = routers[0]
    for layer, rows in routers.items():
        if rows != num_experts:
            raise ValueError(
                f"All layers of {path} must have equally many experts, but the router of layer 0 chooses of "
                f"{num_experts} and that of layer {layer} of {rows}."
            )
    for projection, found in experts.items():
        for layer, numbers in found.items():
            if numbers != set(range(num_experts)):
                raise ValueError(
                    f"Layer {layer} of {path} must have experts 0 to {num_experts - 1} of {projection}, as many as "
                    f"its router chooses of, but has {_some(numbers)}. Check that the file is complete."
                )
    return num_experts, next(iter(ranks))


def _some(numbers: Iterable[int], limit: int = 8) -> str:
    shown = sorted(numbers)
    return ", ".join(map(str, shown[:limit])) + (", ..." if len(shown) > limit else "") or "none"


def find_alpha(path: Path, num_experts: int, rank: int, lora_alpha: float | None) -> float | int:
    """`lora_alpha` of the training, which no tensor tells: the file's name does, or the caller.

    A wrong one scales what all experts add, and nothing else would notice.
    """
    in_name: dict[str, set[float]] = {"r": set(), "a": set(), "e": set()}
    for letter, digits in re.findall(r"(?<![^_.-])([rae])(\d+(?:\.\d+)?)(?![^_.-])", path.stem):
        in_name[letter].add(float(digits))
    for letter, title, number in (("r", "rank", rank), ("e", "number of experts", num_experts)):
        if in_name[letter] - {number}:
            stated = ", ".join(f"{letter}{found:g}" for found in sorted(in_name[letter]))
            raise ValueError(
                f"The name of {path} says {stated}, but its tensors have the {title} {number}. If it was renamed, and "
                "so its alpha may be another's, name it otherwise and pass `lora_alpha` (`--lora-alpha`)."
            )
    alphas = in_name["a"] | ({float(lora_alpha)} if lora_alpha is not None else set())
    if not alphas:
        raise ValueError(
            f"Nothing in {path} tells `lora_alpha`, and its name has none, as the a32 of llava_mole_r16_a32_e3.pt. "
            "Pass that of the training by `lora_alpha` (`--lora-alpha`)."
        )
    if len(alphas) > 1:
        given = "" if lora_alpha is None else f", `lora_alpha` (`--lora-alpha`) is {lora_alpha:g}"
        stated = ", ".join(f"a{found:g}" for found in sorted(in_name["a"]))
        raise ValueError(
            f"There must be one `lora_alpha`, but the name of {path} says {stated}{given}. Rename the file if its "
            "name is wrong."
        )
    alpha = alphas.pop()
    if not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(f"`lora_alpha` must be positive and finite, but is {alpha:g}.")
    return int(alpha) if alpha.is_integer() else alpha


def add_untrained(
    source: CheckpointTensors, reader: CheckpointReader, prefix: str, report: Callable[[str], None]
) -> None:
    """Adds what the trained checkpoint does not have, by whatever name, of the model that the training began with."""
    if prefix == VISION_TOWER:
        names = vision_tower_names(reader, prefix)
    else:
        names = {name: prefix + name for name in reader.tensors}
    renamings = [transform for transform in original_weight_mapping() if isinstance(transform, WeightRenaming)]
    trained = {rename_source_key(name, renamings, [])[0] for name in source.tensors}
    names = {
        original: name for original, name in names.items() if rename_source_key(name, renamings, [])[0] not in trained
    }
    if names:
        source.add_checkpoint(reader, names)
    report(f"Taken: {len(names)} tensors from {reader.folder}, which the checkpoint does not have.")


def check_text_embeddings(path: Path, source: CheckpointTensors) -> None:
    """ValueError if the original's second name of the text model's embeddings stands for others."""
    if not {TEXT_EMBED, EMBED_TOKENS} <= source.tensors.keys():
        return
    # The dtype that the original holds both in: Vicuna's own embeddings have more digits.
    second, first = (source.read(name).to(DTYPES[ORIGINAL_DTYPE]) for name in (TEXT_EMBED, EMBED_TOKENS))
    if not torch.equal(first, second):
        raise ValueError(
            f"{TEXT_EMBED} of {path} must be the text model's embeddings, {EMBED_TOKENS}, but has other values or "
            "another shape. Pass the language model that the training began with by `vicuna` (`--vicuna`)."
        )


def text_config(llama_config: LlamaConfig, **settings) -> LlavaMoleTextConfig:
    """The language model's configuration, with that of the experts."""
    unlike = ("model_type", "architectures", "transformers_version", "_name_or_path")
    shared = {key: value for key, value in llama_config.to_dict().items() if key not in unlike}
    return LlavaMoleTextConfig(**shared, **settings)


def build_processor(vicuna_folder: Path, clip_folder: Path) -> LlavaMoleProcessor:
    """The processor of the language model's tokenizer and CLIP's preprocessing."""
    if not any((vicuna_folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        # transformers would make one that knows no words.
        raise ValueError(
            f"`vicuna` (`--vicuna`) must have a tokenizer, but {vicuna_folder} has neither tokenizer.model nor "
            "tokenizer.json. Download it again, completely."
        )
    tokenizer = LlamaTokenizer.from_pretrained(vicuna_folder, model_max_length=MAX_LENGTH, padding_side="left")
    image_processor = LlavaMoleImageProcessorPil.from_pretrained(clip_folder)
    return LlavaMoleProcessor(image_processor, tokenizer, prompt_style="original")


def set_image_tokens(config: LlavaMoleConfig, processor: LlavaMoleProcessor, vicuna_folder: Path) -> None:
    """Makes placeholder and number of features the same in both; ValueError if other tokens have no embeddings."""
    vision_config, vocabulary_size = config.vision_config, config.text_config.vocab_size
    # Those of all patches, between the start and the end embedding
    processor.num_image_tokens = (vision_config.image_size // vision_config.patch_size) ** 2 + 2
    if processor.image_token_id > vocabulary_size:
        raise ValueError(
            f"The tokenizer in {vicuna_folder} has {processor.image_token_id} tokens, but config.json there says "
            f"{vocabulary_size}. Take both from the same release."
        )
    config.image_token_id = processor.image_token_id


def generation_config(config: LlavaMoleConfig, processor: LlavaMoleProcessor) -> GenerationConfig:
    """How the original generates. Vicuna's own settings are for sampling, which the original does not."""
    ids = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token_id = getattr(config.text_config, name)
        ids[name] = getattr(processor.tokenizer, name) if token_id is None else token_id
    return GenerationConfig(
        do_sample=False, repetition_penalty=REPETITION_PENALTY, max_new_tokens=MAX_NEW_TOKENS, **ids
    )


def plan_llava_mole(config: LlavaMoleConfig, tensors: Mapping[str, TensorInfo]) -> ConversionPlan:
    """How `tensors` become the model of `config`; ValueError unless they are exactly its own."""
    with torch.device("meta"):
        model = LlavaMoleForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return plan_conversion(tensors, original_weight_mapping(), expected, UNUSED_ORIGINAL_WEIGHTS, model)


def main(arguments: list[str] | None = None):
    parser = conversion_parser(
        __doc__,
        checkpoint="file of the original's training, such as llava_mole_r16_a32_e3.pt",
        default_dtype="bfloat16, in which the original runs,",
    )
    parser.add_argument(
        "--vicuna",
        required=True,
        help="folder or Hub repository of the language model that the training began with, lmsys/vicuna-7b-v1.5",
    )
    parser.add_argument(
        "--clip",
        required=True,
        help="folder or Hub repository of the CLIP that the training began with, openai/clip-vit-large-patch14-336",
    )
    parser.add_argument("--lora-alpha", type=float, help="of the training, where the file's name does not have it")
    parser.add_argument(
        "--routing",
        choices=ROUTINGS,
        default="dense",
        help="what the experts were trained with: dense (the default) as in the original's released inference, top1 "
        "as in the paper",
    )
    parser.add_argument(
        "--merge-attention-lora",
        action="store_true",
        help="add the attention's adapters to the weights that they belong to: faster, but no longer to be trained",
    )
    run_conversion(parser, convert_llava_mole_checkpoint, arguments)


if __name__ == "__main__":
    main()
