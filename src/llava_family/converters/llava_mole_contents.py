"""What a file of LLaVA-MoLE's training tells about its experts: number and rank by its tensors, alpha by its name.

Source: the original code's names of tensors and files.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ..conversion import CheckpointReader, TensorInfo
from ..llava_mole.configuration_llava_mole import ATTENTION_PROJECTIONS
from ..llava_mole.weight_mapping_llava_mole import LANGUAGE_MODEL, PROJECTIONS


EXPERT_NAME = re.compile(
    r"\.layers\.(?P<layer>\d+)\.mlp\.(?P<projection>moe_\w+)\.(?P<expert>\d+)\.lora_(?P<side>[AB])$"
)
ROUTER_NAME = re.compile(r"\.layers\.(?P<layer>\d+)\.mlp\.router\.weight$")
ADAPTER_NAME = re.compile(
    r"\.layers\.(?P<layer>\d+)\.self_attn\.(?P<projection>\w+)\.lora_(?P<side>[AB])\.default\.weight$"
)


def trained_names(path: Path, reader: CheckpointReader, report: Callable[[str], None]) -> dict[str, str]:
    """The tensors' names without what a distributed training puts before all of them.

    The original ignores names that it does not know, and would run without any expert.

    Args:
        path (`Path`): The file, for the message.
        reader (`CheckpointReader`): Its tensors.
        report (`Callable[[str], None]`): Receives what was taken away.

    Returns:
        `dict[str, str]`: New name by the file's name.

    Raises:
        ValueError: if there is no expert.
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
    """Reads number and rank of the experts off the tensors.

    Args:
        path (`Path`): The file, for the message.
        tensors (`Mapping[str, TensorInfo]`): Its tensors.
        num_layers (`int`): Layers of the language model.

    Returns:
        `tuple[int, int]`: Number of experts, and their rank.

    Raises:
        ValueError: if layers differ, or are not `num_layers`.
    """
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
    by_layer: list[tuple[str, Iterable[int]]] = [*experts.items(), ("router", routers), *adapters.items()]
    for part, layers in by_layer:
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

    Args:
        path (`Path`): The file.
        num_experts (`int`): By its tensors.
        rank (`int`): By its tensors.
        lora_alpha (`float`, *optional*): By the caller.

    Returns:
        `float` or `int`: The alpha.

    Raises:
        ValueError: if nothing tells it, name and caller differ, or the name does not fit the tensors.
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
