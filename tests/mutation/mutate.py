"""Mutation testing of what results depend on most: `make mutate`.

cosmic-ray's operators change one place of a module; the tests that guard it have to notice. Of every place and kind of
change one mutant is drawn, with a seed. A mutant lives in memory alone: a fork of this process, which has imported
torch and transformers already, imports the mutated module and runs the tests.
"""

import argparse
import ast
import difflib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names


ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
SOURCE = ROOT / "src" / "llava_family"
LEAST_KILLED = 0.85
SEED = 0
MEMORY = 12 * 2**30
SURVIVED, KILLED = 0, 1


@dataclass(frozen=True)
class Target:
    """A module, its functions and classes that are mutated (all, if none are named), and the tests that guard them."""

    module: str
    tests: list[str]
    names: tuple[str, ...] = ()


ROUTING = (
    "gumbel_noise",
    "route_tokens",
    "expert_capacity",
    "_finds_place",
    "balance_loss",
    "MoeLlavaRouter",
    "_run_experts",
    "MoeLlavaSparseMoeBlock",
)
# Not `MoleExpertsParallel`, which several processes test
MOLE_LAYERS = (
    "TokenGroups",
    "route_tokens",
    "group_tokens",
    "balance_loss",
    "MoleRouter",
    "check_routers_learn",
    "MoleExperts",
    "MoleLinear",
    "MoleMLP",
)
ROI_ALIGN = (
    "pooling_size",
    "region_sampling_weights",
    "shares_beyond_map",
    "_axis_sampling_weights",
    "sample_regions",
)
# Of large files, the tests that have to do with a target; quick ones come first
SLICING_TESTS = [
    "test_every_golden_entry",
    "test_bad_arguments",
    "test_an_image_that_is_not_sliced_has_no_grid",
    "test_one_plan_serves_the_image_processor",
    "test_processor_follows_the_plan",
    "test_every_size[7]",
]
ROI_ALIGN_TESTS = ["test_region_sampling_is_roi_align", "test_resampler_is_multi_head_attention_of_the_queries"]
ROI_ALIGN_GOLDENS = ["test_box_corners_are_rounded_to_the_feature_dtype", "test_resampler_of_any_grid"]
LAYERS_TESTS = [
    "test_routing",
    "test_two_products_equal_a_loop_over_experts",
    "test_grouped_products_equal_a_loop_over_experts",
    "test_grouped_products_are_chosen_where_they_pay",
    "test_the_first_of_equal_experts_is_chosen",
    "test_what_the_router_learns_from_the_task",
    "test_experts_that_were_not_chosen_have_no_gradient",
    "test_zero_b_leaves_the_output_bit_equal",
    "test_one_expert_equals_peft_lora",
    "test_dropout_is_of_the_input_and_of_training_alone",
    "test_router_scores_in_float32",
    "test_routers_that_would_not_learn",
    "test_balance_loss",
    "test_balance_loss_of_balance_and_of_collapse",
    "test_balance_loss_of_a_row_of_padding_alone",
    "test_flops_beyond_plain_lora_have_a_closed_form",
]
BALANCE_TESTS = [
    "test_the_loss_contains_the_balance_loss_of_all_tokens_but_padding",
    "test_losses_of_all_models",
    "test_gradient_accumulation_weights_by_the_share_of_labels",
    "test_outputs_keep_their_form",
    "test_labels_may_be_given_by_position",
    "test_nothing_is_recorded_without_labels_or_after_an_error",
]
PLACEHOLDER_TESTS = [
    "test_every_image_is_encoded_as_if_alone",
    "test_padded_rows_have_the_positions_they_have_alone",
    "test_encoder_outputs_can_be_reused",
    "test_generate_from_merged_embeddings",
    "test_decoding_step_by_step_equals_one_pass",
    "test_wrong_number_of_placeholders",
    "test_bad_inputs",
    "test_images_cannot_be_found_in_embeddings",
    "test_placeholders_of_the_vocabulary_are_found_in_embeddings",
    "test_forgotten_images_are_an_error",
]


def in_file(file: str, tests: list[str]) -> list[str]:
    return [f"{file}::{test}" for test in tests]


AREAS = {
    "slicing": [
        Target("llava_uhd/slicing_llava_uhd", in_file("llava_uhd/test_slicing_llava_uhd.py", SLICING_TESTS)),
    ],
    "routing": [
        Target("moe_llava/modeling_moe_llava", ["moe_llava/test_routing_moe_llava.py"], ROUTING),
        Target(
            "llava_mole/layers_llava_mole", in_file("llava_mole/test_layers_llava_mole.py", LAYERS_TESTS), MOLE_LAYERS
        ),
        Target("mole/balance", in_file("mole/test_training.py", BALANCE_TESTS)),
    ],
    "roi_align": [
        Target(
            "llava_uhd/modeling_llava_uhd",
            [
                *in_file("llava_uhd/test_modeling_llava_uhd.py", ROI_ALIGN_TESTS),
                *in_file("llava_uhd/test_goldens_llava_uhd.py", ROI_ALIGN_GOLDENS),
            ],
            ROI_ALIGN,
        ),
    ],
    "masking": [
        Target(
            "llava_uhd/modeling_llava_uhd",
            in_file("llava_uhd/test_modeling_llava_uhd.py", PLACEHOLDER_TESTS),
            ("ImagePlaceholderMixin",),
        ),
        Target(
            "llava_uhd/shared_llava_uhd",
            ["moe_llava/test_routing_moe_llava.py", "llava_mole/test_modeling_llava_mole.py"],
            ("counted_tokens", "add_balance_loss"),
        ),
    ],
    "conversion": [
        Target("conversion/mapping", ["conversion/test_mapping.py"]),
        Target("conversion/checking", ["conversion/test_hostile_inputs.py", "conversion/test_reading.py"]),
        Target(
            "conversion/shards",
            [
                "conversion/test_writing.py",
                "conversion/test_reading.py",
                "conversion/test_hostile_inputs.py::test_reading_refuses",
            ],
        ),
    ],
}


@dataclass(frozen=True)
class Mutant:
    target: Target
    line: int
    name: str
    code: str

    def __str__(self) -> str:
        before = path_of(self.target).read_text("utf-8").splitlines()
        difference = difflib.unified_diff(before, self.code.splitlines(), lineterm="", n=0)
        changed = [line for line in difference if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        return f"{self.target.module}.py:{self.line} {self.name}: " + "  ".join(" ".join(c.split()) for c in changed)


def path_of(target: Target) -> Path:
    return SOURCE / f"{target.module}.py"


def mutants_of(target: Target) -> list[Mutant]:
    """One of every place and kind of change, in an order that is drawn."""
    code = path_of(target).read_text("utf-8")
    places: dict[tuple, list[tuple[str, int]]] = {}
    nodes = list(ast_nodes(get_ast(code)))
    for operator in operator_names():
        operator_class = get_operator(operator)
        # `|` stands in annotations alone, where a mutant dies when it is imported and says nothing of the tests.
        if operator_class.arguments() or "BinaryOperator_BitOr" in operator:
            continue
        positions = (start for node in nodes for start, _ in operator_class().mutation_positions(node))
        kind = operator.rpartition("/")[2].partition("_")[0]
        for occurrence, start in enumerate(positions):
            places.setdefault((start, kind), []).append((operator, occurrence))
    names = names_of_lines(code)
    draw = random.Random(f"{SEED} {target.module} {target.names}")
    mutants = []
    for (start, _), choices in sorted(places.items()):
        name = names.get(start[0], "")
        if target.names and name.partition(".")[0] not in target.names:
            continue
        operator, occurrence = draw.choice(choices)
        mutated = mutate_code(code, get_operator(operator)(), occurrence)
        if mutated is not None and mutated != code:
            mutants.append(Mutant(target, start[0], name, mutated))
    draw.shuffle(mutants)
    return mutants


def names_of_lines(code: str) -> dict[int, str]:
    """`Class.function` by line."""
    names: dict[int, str] = {}

    def visit(node: ast.AST, outer: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = outer
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{outer}.{child.name}".lstrip(".")
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                names.update(dict.fromkeys(range(first, child.end_lineno + 1), name))
            visit(child, name)

    visit(ast.parse(code), "")
    return names


class MutantFinder(importlib.abc.MetaPathFinder):
    """Imports `code` where `path` would be imported."""

    def __init__(self, path: Path, code: str):
        self.path, self.code = path, code

    def find_spec(self, fullname, path=None, target=None):
        if fullname.rpartition(".")[2] != self.path.stem or not fullname.startswith("llava_family."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and Path(spec.origin) == self.path:
            spec.loader.get_code = lambda name: compile(self.code, str(self.path), "exec")
            return spec
        return None


def run_tests(target: Target, code: str | None, timeout: float) -> int:
    """Whether the tests, in a fork, let `code` pass. A test that hangs has noticed it too."""
    child = os.fork()
    if child == 0:
        output = os.open(os.devnull, os.O_WRONLY) if code else 2
        os.dup2(output, 1)
        os.dup2(output, 2)
        # Of files that claim to be large, a mutant may believe it.
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        if code:
            sys.meta_path.insert(0, MutantFinder(path_of(target), code))
        files = [str(TESTS / test) for test in target.tests]
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", "--hypothesis-seed=0"]
        status = pytest.main([*options, *files])
        os._exit(SURVIVED if status == pytest.ExitCode.OK else KILLED)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return KILLED


def import_dependencies() -> None:
    """Imports what the package and its tests import, but not the package."""
    code = "import llava_family.auto, sys; llava_family.auto.register(); print(*sys.modules, sep='\\n')"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in [*listed.split(), "hypothesis", "_hypothesis_pytestplugin", "safetensors.torch", "torch.nn"]:
        if name.partition(".")[0] != "llava_family":
            with suppress(Exception):
                importlib.import_module(name)


def test_area(area: str, first: int, last: int) -> tuple[int, int]:
    """The numbers of mutants, and of those that survived."""
    num_mutants = num_survivors = 0
    for target in AREAS[area]:
        start = time.monotonic()
        if run_tests(target, None, 600) != SURVIVED:
            raise SystemExit(f"The tests of {target.module} fail without any mutant.")
        timeout = 10 + 3 * (time.monotonic() - start)
        mutants = mutants_of(target)
        for mutant in mutants[first:last]:
            survived = run_tests(target, mutant.code, timeout) == SURVIVED
            num_mutants, num_survivors = num_mutants + 1, num_survivors + survived
            print(f"{'survived' if survived else 'killed'}: {mutant}", flush=True)
        seconds = time.monotonic() - start
        print(f"{target.module}: {len(mutants[first:last])} of {len(mutants)} mutants, {seconds:.0f} s", flush=True)
    return num_mutants, num_survivors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--area", action="append", choices=AREAS, help="one of them, instead of all")
    parser.add_argument("--first", type=int, default=0, help="of every module, the first mutant to test")
    parser.add_argument("--last", type=int, default=60, help="of every module, the mutant to stop before")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    import_dependencies()
    failed = []
    for area in arguments.area or AREAS:
        num_mutants, num_survivors = test_area(area, arguments.first, arguments.last)
        killed = 1 - num_survivors / num_mutants
        print(f"{area}: {killed:.1%} of {num_mutants} mutants killed", flush=True)
        if killed < LEAST_KILLED:
            failed.append(area)
    if failed:
        raise SystemExit(f"Fewer than {LEAST_KILLED:.0%} of the mutants were killed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
