"""The tables of docs/conformance.md: what of transformers' own tests passes, and why the rest is skipped.

A whole run compares the document with what it saw. With `--write-tables`, it writes them: `make conformance`.
"""

import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers.utils import is_torchvision_available


HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parents[1] / "docs" / "conformance.md"
FAMILIES = ("llava_uhd", "moe_llava", "llava_mole")

# What transformers says, and why it does so here
TASKS = "a pipeline of another task; or, for further text models and routings, one that the family has run already"
TORCHVISION = "torchvision is optional here, and CI is without it"
OTHER_MODALITIES = "the families know neither sound nor videos"
GPU = "needs a GPU; ours are in tests/gpu"
ABSENT = "the model does not have it"
REASONS = {
    "is not in `self.pipeline_model_mapping`": TASKS,
    "`run_pipeline_test` is currently not implemented": "transformers skips it for all models",
    "test requires (Timm|PyTesseract|av)$": TASKS,
    "torchvision": TORCHVISION,
    "less than 2 backends": TORCHVISION,
    "(feature_extractor|audio_processor|video_processor) attribute not present": OTHER_MODALITIES,
    "Processor (has no|doesn't accept)": OTHER_MODALITIES,
    "test requires (librosa|Torchcodec)": OTHER_MODALITIES,
    "test requires (Flash Attention|the kernels library|MPS|accelerator|multiple accelerators)": GPU,
    "test requires deepspeed": "not a dependency; docs/training.md has what trains on several GPUs",
    "test is slow": "`make test-all` runs them, but for compilation, which needs a GPU or torchvision",
    "Runs a process that imports transformers alone": "which cannot know our classes",
    "does not support grouped_mm|has no sparse experts|has no `output_router_logits`": "LLaVA-UHD has no experts, and "
    "those of LLaVA-MoLE are adapters",
    "has no _keep_in_fp32_modules": "nothing is kept in float32",
    "Chat template does not support tools": "the originals' prompts know no tools",
    "Only PrefixChange conversions found": "LLaVA-MoLE's file is converted by a script, never while a model is loaded",
    "Saved natively, always": "the class says why; tests/conversion has the way back",
    "Refused, since no balance loss": "the model refuses it with an error, which tests/llava_mole has",
    "No validation found for `preprocess`": "transformers finds the PIL backend's method by its signature",
    "does not have dict size or list image_mean": "the test changes `size`, which these image processors do not have",
    "not an encoder-decoder|not have position embeddings|sliding window|axial RoPE|partial rope": ABSENT,
    "does not support SDPA": "the test is for models of one part; its counterpart for composite ones passes",
}


def why(reason: str) -> str | None:
    """The explanation of a skip, if there is one."""
    return next((text for pattern, text in REASONS.items() if re.search(pattern, reason)), None)


def plain(reason: str) -> str:
    """`reason` without the names of tests, classes and tasks."""
    reason = re.sub(r"^Skipped: |\w+::test_\w+ is skipped: ", "", reason)
    reason = re.sub(r"<class '[\w.]+'>|\b(LlavaUhd|MoeLlava|LlavaMole)\w+", "model", reason)
    return re.sub(r"`[a-z-]+` is not in", "task is not in", reason).replace(" for `model`", "").rstrip(".")


def mixin_of(item: pytest.Item) -> str:
    """The class of transformers that a test comes from; a test of ours that calls another stands for that one."""
    defining = [cls.__name__ for cls in item.cls.__mro__ if item.originalname in vars(cls)]
    return "ConfigTester" if item.name == "test_config" else defining[-1]


class Tables:
    """Counts the outcomes of a run."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.outcomes: Counter = Counter()
        self.skips: Counter = Counter()

    @staticmethod
    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        for item in items:
            family = next(family for family in FAMILIES if item.path.stem.endswith(family))
            item.user_properties += [("family", family), ("mixin", mixin_of(item))]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        mixin, family = properties["mixin"], properties["family"]
        if report.skipped:
            self.skips[plain(report.longrepr[2]), family] += 1
        is_subtest = hasattr(report, "context")  # which fails its test if it fails, but may be skipped by itself
        if not is_subtest and (report.when == "call" or not report.passed):
            self.outcomes[mixin, family, report.outcome] += 1

    def mixins_table(self) -> str:
        lines = [f"| mixin | {' | '.join(FAMILIES)} |", "|---|" + "---|" * len(FAMILIES)]
        names = sorted({mixin for mixin, _, _ in self.outcomes})
        for name in [*names, "all"]:
            cells = []
            for family in FAMILIES:
                counted = dict.fromkeys(("passed", "skipped", "failed"), 0)
                for (mixin, its_family, outcome), count in self.outcomes.items():
                    counted[outcome] += count * (its_family == family and name in (mixin, "all"))
                cells.append(" / ".join(map(str, counted.values())) if any(counted.values()) else "–")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def skips_table(self) -> str:
        lines = [f"| transformers says | {' | '.join(FAMILIES)} | why |", "|---|" + "---|" * (len(FAMILIES) + 1)]
        explained = {reason: why(reason) for reason, _ in self.skips}
        for reason, text in sorted(explained.items(), key=lambda item: (str(item[1]), item[0])):
            counts = (str(self.skips[reason, family] or "–") for family in FAMILIES)
            lines.append(f"| {reason} | {' | '.join(counts)} | {text} |")
        return "\n".join(lines)

    def is_whole(self, session: pytest.Session) -> bool:
        """Whether the run is one that the document describes."""
        files = {f"{HERE.name}/{path.name}" for path in HERE.glob("test_*.py")}
        chosen = {file for argument in self.config.args for file in files if argument == str(HERE) or file in argument}
        filtered = self.config.option.keyword or self.config.option.markexpr
        other_machine = is_torchvision_available() or torch.cuda.is_available()
        slow = os.environ.get("RUN_SLOW")
        return chosen == files and not (filtered or other_machine or slow or session.shouldstop)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        problems = [
            f"no explanation in table.py of the skip {reason!r}" for reason, _ in self.skips if not why(reason)
        ]
        if self.is_whole(session):
            text = DOCUMENT.read_text("utf-8")
            filled = fill(fill(text, "mixins", self.mixins_table()), "skips", self.skips_table())
            if self.config.option.write_tables:
                DOCUMENT.write_text(filled, encoding="utf-8")
            elif filled != text:
                problems.append("docs/conformance.md does not say what this run saw: run `make conformance`")
        if problems:
            print("\n" + "\n".join(problems))
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def fill(text: str, name: str, table: str) -> str:
    start, end = f"<!-- conformance: {name} -->", "<!-- end -->"
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{table}\n{end}{rest.partition(end)[2]}"
