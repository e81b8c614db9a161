"""The model card of an exported repository: that of the release that the weights are of, or a generic one.

Source: the Hub's model cards, and `ModelCard` of huggingface_hub.
"""

import re
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

from transformers import PreTrainedConfig

from .checkpoint import Checkpoint


# An installed package has them beside this file, see setup.py; a repository at its top.
HERE = Path(__file__).parent
REPOSITORY = Path(__file__).parents[3]

# Release cards by name: type of the text model, its width and layers, pixels along a side of the vision tower's images
ARCHITECTURES = {
    "llava-uhd-144-13b": ("llama", 5120, 40, 336),
    "moe-llava-phi2-2.7b-4e": ("moe_llava_phi_text", 2560, 32, 336),
    "moe-llava-phi2-2.7b-4e-384": ("moe_llava_phi_text", 2560, 32, 384),
    "moe-llava-qwen-1.8b-4e": ("moe_llava_qwen2_text", 2048, 24, 336),
    "moe-llava-stablelm-1.6b-4e": ("moe_llava_stablelm_text", 2048, 24, 336),
    "moe-llava-stablelm-1.6b-4e-384": ("moe_llava_stablelm_text", 2048, 24, 384),
}

# Name, title of the paper and its number on arXiv
PAPERS = {
    "llava_uhd": (
        "LLaVA-UHD",
        "LLaVA-UHD: an LMM Perceiving Any Aspect Ratio and High-Resolution Images",
        "2403.11703",
    ),
    "moe_llava": ("MoE-LLaVA", "MoE-LLaVA: Mixture of Experts for Large Vision-Language Models", "2401.15947"),
    "llava_mole": (
        "LLaVA-MoLE",
        "LLaVA-MoLE: Sparse Mixture of LoRA Experts for Mitigating Data Conflicts in Instruction Finetuning MLLMs",
        "2401.16160",
    ),
}

PACKAGE_USAGE = "The model type is not part of transformers. Install `llava-family` and import it first."
USAGE = (
    "The model type is not part of transformers. Its code is in this repository: `trust_remote_code=True` runs it, so "
    "read it before, and pin a `revision`. Nothing but transformers 5.23, torch and pillow is needed."
)
CODE_LICENSE = "The code in this repository is that of `llava-family`, under Apache 2.0 (`LICENSE-CODE`)."
CONVERTED = (
    "They are in the layout of transformers, as a conversion script of `llava-family` or a training wrote them."
)
ORIGINAL = (
    "They are the files of the original checkpoint, unchanged. The code here maps their names and layout to those of "
    "transformers while they are loaded."
)


def package_file(name: str) -> Path:
    """Finds a file or folder of the repository's top, from wherever this package runs.

    Args:
        name (`str`): Its name.

    Returns:
        `Path`: Inside of the installed package, or of the checked out repository.
    """
    packaged = HERE / name
    return packaged if packaged.exists() else REPOSITORY / name


def architecture(config: PreTrainedConfig) -> tuple[str, int, int, int | None]:
    """What tells releases apart, see `ARCHITECTURES`.

    Args:
        config (`PreTrainedConfig`): Of the model.

    Returns:
        `tuple[str, int, int, int | None]`: Model type, width and layers of the text model, and the vision tower's
        image size in pixels.
    """
    text = config.text_config
    image_size = getattr(config.vision_config, "image_size", None)  # which not every vision tower has
    return text.model_type, text.hidden_size, text.num_hidden_layers, image_size


def model_card(card: str | None, name: str, model: str, checkpoint: Checkpoint, report: Callable[[str], None]) -> str:
    """The text of the card.

    A release's card says that the weights are the authors' own, so its sizes alone do not claim it: the checkpoint
    must have its name too, unless `card` asks for it.

    Args:
        card (`str`, *optional*): Name of a release's card, or a Markdown file, which is taken as it is.
        name (`str`): Of the repository, for the card's code.
        model (`str`): Folder or Hub repository of the checkpoint.
        checkpoint (`Checkpoint`): What is exported.
        report (`Callable[[str], None]`): Receives which card was chosen, and why.

    Returns:
        `str`: In Markdown.

    Raises:
        ValueError: if there is no card of that name, or it is of a model of other sizes.
    """
    found = architecture(checkpoint.config)
    if card is not None and card.endswith(".md"):
        if not Path(card).is_file():
            raise ValueError(f"`card` (`--card`) must be a file or a release's card, but there is no file {card!r}.")
        return Path(card).read_text(encoding="utf-8")
    if card is not None and ARCHITECTURES.get(card) != found:
        releases = "; ".join(f"{release}: {sizes}" for release, sizes in ARCHITECTURES.items())
        raise ValueError(
            f"`card` (`--card`) must be a Markdown file, with a name that ends in .md, or the card of a release whose "
            f"text model, width, layers and image size are this model's, {found}, but is {card!r}. Releases are "
            f"{releases}."
        )
    stem = card or Path(model).resolve().name.lower().removesuffix("-hf")
    if ARCHITECTURES.get(stem) == found:
        if card is None:
            report(f"Card: that of the release {stem}, by the checkpoint's name and sizes.")
        return release_card(stem, name, checkpoint.is_original)
    alike = [release for release, sizes in ARCHITECTURES.items() if sizes == found]
    hint = f" If the weights are the release's own, choose its card by `--card {alike[0]}`." if alike else ""
    report(f"Card: a generic one. Complete it, and export again with it as `--card FILE.md`.{hint}")
    return generic_card(name, checkpoint)


def release_card(stem: str, name: str, is_original: bool) -> str:
    """The card of a release, made to fit a repository.

    Args:
        stem (`str`): Name of the card.
        name (`str`): Of the repository.
        is_original (`bool`): Whether its weights are in the original's layout.

    Returns:
        `str`: In Markdown.

    Raises:
        ValueError: if the card is not like those of all releases.
    """
    path = package_file("model_cards") / f"{stem}.md"
    text = path.read_text(encoding="utf-8")
    text = _replace(text, path, r"\ntags:\n((?:- .+\n)+)", r"\ntags:\n\1- custom_code\n")
    text = _replace(text, path, re.escape(PACKAGE_USAGE), USAGE)
    text = _replace(text, path, r"import llava_family .*\n", "")
    call = rf'from_pretrained("{name}"\1, trust_remote_code=True)'
    text = _replace(text, path, rf'from_pretrained\("path/to/{stem}"(.*)\)', call)
    text = _replace(text, path, r"\n## Licence\n", rf"\n## Licence\n\n{CODE_LICENSE}\n")
    if is_original:
        text = _replace(text, path, r"converted for transformers 5\.23 with", "with code for transformers 5.23 of")
        lead = rf"\n## Weights\n\n{ORIGINAL}\n"
        text = _replace(text, path, r"\n## Conversion\n\nThis folder was written by:\n\n```bash\n(?:.+\n)+```\n", lead)
        # What options of the conversion script do
        text = re.sub(r"\n.*`--.*", "", text)
    else:
        text = _replace(text, path, "This folder was written by:", "The weights were written by:")
    return text


def _replace(text: str, path: Path, pattern: str, replacement: str) -> str:
    replaced, count = re.subn(pattern, replacement, text)
    if not count:
        raise ValueError(f"{path} must be a card like those of all releases, but has nothing like {pattern!r}.")
    return replaced


def generic_card(name: str, checkpoint: Checkpoint) -> str:
    """A card that tells what is known of a checkpoint from its files alone.

    Args:
        name (`str`): Of the repository.
        checkpoint (`Checkpoint`): What is exported.

    Returns:
        `str`: In Markdown.
    """
    short, paper, arxiv = PAPERS[checkpoint.family.model_type]
    content = [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]
    messages = [{"role": "user", "content": content}]
    return Template((HERE / "generic_card.md").read_text(encoding="utf-8")).substitute(
        tag=checkpoint.family.model_type.replace("_", "-"),
        title=name.rpartition("/")[2],
        family=short,
        paper=paper,
        arxiv=arxiv,
        facts="\n".join(f"| {fact} | {value} |" for fact, value in _facts(checkpoint).items()),
        usage=USAGE,
        name=name,
        weights=ORIGINAL if checkpoint.is_original else CONVERTED,
        prompt=checkpoint.processor.apply_chat_template(messages, add_generation_prompt=True),
        license=CODE_LICENSE,
    )


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    text, vision = config.text_config, config.vision_config
    facts = {
        "parameters in the files": f"{checkpoint.num_parameters:,}",
        "dtype": str(config.dtype).removeprefix("torch."),
        "text model": f"`{text.model_type}`, {text.num_hidden_layers} layers of width {text.hidden_size}",
        "vision tower": f"`{vision.model_type}`",
    }
    if getattr(vision, "image_size", None) and getattr(vision, "patch_size", None):
        facts["vision tower"] += f", trained on images of {vision.image_size} pixels, patches of {vision.patch_size}"
    if getattr(text, "num_experts", None):
        facts["experts"] = text.num_experts
    if getattr(config, "vision_encoding", "slices") == "slices":
        facts["an image is"] = f"cut into slices, {config.num_queries} tokens per view"
    else:
        facts["an image is"] = "one square view"
    return facts
