"""How each paper's code asks and decodes, by family and benchmark, with the source of every entry.

Source: the released evaluation code of each family, named in `GenerationSettings.source`; the papers do not tell.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..generating import NO_SAMPLING


# LLaVA-1.5's prompts (arXiv 2310.03744, appendix), which all three families' scripts or data take over. LLaVA's
# question files of TextVQA, POPE and GQA have theirs already; those of ScienceQA and MMBench get it from the script.
WORD_PROMPT = "\nAnswer the question using a single word or phrase."
LETTER_PROMPT = "\nAnswer with the option's letter from the given choices directly."
# Before every question, spelled as in the released code
MOLE_PROMPT = "Analyze the image and provide brief and accurate answer to the question in Engligh. "


@dataclass(frozen=True)
class GenerationSettings:
    """How one family is asked the questions of one benchmark.

    Args:
        source (`str`): Where the values come from.
        prefix (`str`): Text before the question.
        suffix (`str`): Text behind the question, where the benchmark's file does not have it.
        num_beams (`int`): Beams of the search; 1 is greedy. Nothing is sampled.
        max_new_tokens (`int`): Longest answer, in tokens.
        repetition_penalty (`float`): Divides positive logits of tokens that the answer has, multiplies negative.
        image_settings (`Mapping[str, Any]`): Arguments of the image processor.
    """

    source: str
    prefix: str = ""
    suffix: str = ""
    num_beams: int = 1
    max_new_tokens: int = 128
    repetition_penalty: float = 1.0
    image_settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def prompt(self, question: str) -> str:
        """
        The user's message: the question with the text around it.

        Args:
            question (`str`): As the benchmark's file has it.

        Returns:
            `str`: what to ask the model.
        """
        return self.prefix + question + self.suffix

    def generate_arguments(self) -> dict[str, Any]:
        """
        Arguments of `generate`; a checkpoint's own settings, some of which sample, do not count.

        Returns:
            `dict[str, Any]`: these settings, without sampling.
        """
        return {
            **NO_SAMPLING,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
        }


def _uhd(script: str, pre_resize: bool, **values: Any) -> GenerationSettings:
    image_settings = MappingProxyType({"pre_resize_longest_edge": 1024} if pre_resize else {})
    source = f"branch LLaVA-UHD-v1 of thunlp/LLaVA-UHD: evaluation scripts and {script}; not in the paper"
    return GenerationSettings(source, image_settings=image_settings, **values)


def _moe(script: str, **values: Any) -> GenerationSettings:
    return GenerationSettings(
        f"PKU-YuanGroup/MoE-LLaVA: moellava/eval/{script}, temperature 0; not in the paper", **values
    )


def _mole(suffix: str = "") -> GenerationSettings:
    return GenerationSettings(
        "forwchen/LLaVA-MoLE: TestLLaVAMoLE.generate, for any question; the paper has none of these benchmarks",
        prefix=MOLE_PROMPT,
        suffix=suffix,
        max_new_tokens=256,
        repetition_penalty=10.0,
    )


# By `model_type`, then by benchmark
SETTINGS: Mapping[str, Mapping[str, GenerationSettings]] = {
    "llava_uhd": {
        "textvqa": _uhd("model_vqa_loader.py", True, num_beams=3),
        "pope": _uhd("model_vqa_loader.py", True),
        "scienceqa": _uhd("model_vqa_science.py", True, num_beams=3, max_new_tokens=1024, suffix=LETTER_PROMPT),
        "mmbench": _uhd("model_vqa_mmbench.py", False, max_new_tokens=1024, suffix=LETTER_PROMPT),
        "gqa": _uhd("model_vqa_loader.py", True, num_beams=3),
        "vqav2": _uhd("model_vqa_loader.py", True, num_beams=3),
        "vizwiz": _uhd("model_vqa_loader.py", True, num_beams=3),
        "mme": _uhd("model_vqa_loader.py", True, num_beams=5),
    },
    "moe_llava": {
        "textvqa": _moe("model_vqa_loader.py"),
        "pope": _moe("model_vqa_loader.py"),
        # The vision tower's own processor, which crops an image's centre
        "scienceqa": _moe(
            "model_vqa_science.py",
            max_new_tokens=1024,
            suffix=LETTER_PROMPT,
            image_settings=MappingProxyType({"do_pad": False}),
        ),
        "mmbench": _moe("model_vqa_mmbench.py", max_new_tokens=1024, suffix=LETTER_PROMPT),
        "gqa": _moe("model_vqa_loader.py"),
        "vqav2": _moe("model_vqa_loader.py"),
        "vizwiz": _moe("model_vqa_loader.py"),
        "mme": _moe("model_vqa_loader.py"),
    },
    "llava_mole": {
        "textvqa": _mole(),
        "pope": _mole(),
        "scienceqa": _mole(LETTER_PROMPT),
        "mmbench": _mole(LETTER_PROMPT),
        "gqa": _mole(),
        "vqav2": _mole(),
        "vizwiz": _mole(),
        "mme": _mole(),
    },
}


def settings_for(family: str, benchmark: str) -> GenerationSettings:
    """
    The settings of a family's released evaluation code for a benchmark.

    Args:
        family (`str`): `model_type` of the checkpoint, a key of `SETTINGS`.
        benchmark (`str`): One of the keys of `SETTINGS[family]`.

    Returns:
        `GenerationSettings`: with their source.

    Raises:
        ValueError: if there are none for this family or benchmark.
    """
    if family not in SETTINGS:
        raise ValueError(
            f"The model must be of one of the types {', '.join(SETTINGS)}, but is of the type {family!r}."
        )
    if benchmark not in SETTINGS[family]:
        raise ValueError(f"`benchmark` must be one of {', '.join(SETTINGS[family])}, but is {benchmark!r}.")
    return SETTINGS[family][benchmark]
