"""Planning conversions: the plan does what transformers' loader does, and is strict where the loader is not."""

import pytest
import torch
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from llava_family.conversion import TensorInfo, plan_conversion


def info_of(tensors):
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def convert(tensors, transforms, expected, ignored=None):
    """All targets by name, and the plan. Checks that they are as planned."""
    plan = plan_conversion(info_of(tensors), transforms, expected, ignored)
    converted = {}
    for step in plan.steps:
        outputs = step.convert(tensors.__getitem__)
        assert info_of(outputs) == dict(step.outputs)
        converted |= outputs
    assert converted.keys() == expected.keys()
    return converted, plan


def counting(*shape, dtype=torch.float32):
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).reshape(shape)


def test_renamings_chain_and_the_first_converter_claims():
    tensors = {"old.x.weight": counting(2, 3)}
    transforms = [
        WeightConverter("y.weight", "y.weight", [Transpose(0, 1)]),
        WeightConverter("new", "never", [Transpose(0, 1)]),
        WeightRenaming("^old", "new"),
        WeightRenaming(r"new\.x", "new.y"),
    ]
    converted, _ = convert(tensors, transforms, {"new.y.weight": (3, 2)})
    assert torch.equal(converted["new.y.weight"], tensors["old.x.weight"].T)


def test_one_to_many():
    tensors = {f"{i}.in_proj_weight": counting(6, 2) + i for i in range(2)}
    transforms = [WeightConverter("in_proj_weight", ["q.weight", "k.weight", "v.weight"], [Chunk(dim=0)])]
    converted, plan = convert(tensors, transforms, {f"{i}.{n}.weight": (2, 2) for i in range(2) for n in "qkv"})
    assert len(plan.steps) == 2
    assert torch.equal(converted["1.k.weight"], tensors["1.in_proj_weight"][2:4])


def expert_transform():
    return WeightConverter(
        ["experts.*.gate.weight", "experts.*.up.weight"],
        "experts.gate_up",
        [MergeModulelist(dim=0), Concatenate(dim=1)],
    )


def experts(count=11):
    names = [f"layers.0.experts.{i}.{kind}.weight" for i in range(count) for kind in ("up", "gate")]
    return {name: torch.full((2, 3), float(index), dtype=torch.float16) for index, name in enumerate(sorted(names))}


def test_many_to_one_in_natural_order():
    tensors = experts()
    converted, plan = convert(tensors, [expert_transform()], {"layers.0.experts.gate_up": (11, 4, 3)})
    assert len(plan.steps) == 1
    packed = converted["layers.0.experts.gate_up"]
    for i in range(11):
        assert torch.equal(packed[i, :2], tensors[f"layers.0.experts.{i}.gate.weight"])
        assert torch.equal(packed[i, 2:], tensors[f"layers.0.experts.{i}.up.weight"])


def test_absent_expert():
    tensors = experts()
    del tensors["layers.0.experts.4.up.weight"]
    with pytest.raises(ValueError, match=r"(?s)1 failed conversions:.*gate_up from 21 tensors"):
        convert(tensors, [expert_transform()], {"layers.0.experts.gate_up": (11, 4, 3)})
    del tensors["layers.0.experts.4.gate.weight"]
    with pytest.raises(ValueError, match=r"gate_up from 20 tensors .* has shape \(10, 4, 3\), expected \(11, 4, 3\)"):
        convert(tensors, [expert_transform()], {"layers.0.experts.gate_up": (11, 4, 3)})


def test_native_names_pass_although_a_transform_matches():
    tensors = {"proj": counting(2, 3)}
    converted, _ = convert(tensors, [WeightRenaming("proj", "out_proj")], {"proj": (2, 3)})
    assert torch.equal(converted["proj"], tensors["proj"])


def test_names_of_both_layouts_can_be_swapped():
    tensors = {"a": counting(2), "z": counting(2) + 5}
    transforms = [WeightRenaming("^a$", "b"), WeightRenaming("^z$", "a")]
    converted, _ = convert(tensors, transforms, {"a": (2,), "b": (2,)})
    assert torch.equal(converted["b"], tensors["a"]) and torch.equal(converted["a"], tensors["z"])


@pytest.mark.parametrize(
    ("found", "wanted", "message"),
    [
        (torch.int32, torch.float32, "a for a has dtype torch.int32, expected torch.float64 or torch.float32"),
        (torch.float8_e4m3fn, torch.float32, "a for a has dtype torch.float8_e4m3fn, expected torch.float64"),
        (torch.int32, torch.int64, "a for a has dtype torch.int32, expected torch.int64$"),
    ],
)
def test_kinds_of_dtypes(found, wanted, message):
    with pytest.raises(ValueError, match="1 source tensors of another kind of dtype") as error:
        plan_conversion({"a": TensorInfo((2,), found)}, [], {"a": TensorInfo((2,), wanted)})
    assert error.match(message)
    plan_conversion({"a": TensorInfo((2,), torch.bfloat16)}, [], {"a": TensorInfo((2,), torch.float32)})


def test_every_failed_conversion_is_told():
    infos = {f"{i}.x": TensorInfo((4,), torch.float32) for i in range(2)}
    with pytest.raises(ValueError, match=r"(?s)2 failed conversions:\n  0\.a from 0\.x: .*\n  1\.a from 1\.x: "):
        plan_conversion(infos, [WeightConverter("x", "a", [Transpose(0, 1)])], {"0.a": (4,), "1.a": (4,)})


def test_steps_come_in_the_order_of_the_sources():
    tensors = {name: counting(2) for name in ("c", "a", "b")}
    _, plan = convert(tensors, [], dict.fromkeys("abc", (2,)))
    assert [step.target for step in plan.steps] == ["c", "a", "b"]


def test_ignored_sources_are_told_with_their_reason():
    tensors = {"a": counting(2), "layers.3.b": counting(2)}
    _, plan = convert(tensors, [], {"a": (2,)}, {r"^a$": "is needed nevertheless", r"layers\.3\.": "not built"})
    assert plan.ignored == {"layers.3.b": "not built"}


@pytest.mark.parametrize(
    ("tensors", "transforms", "expected", "message"),
    [
        ({"a": (2,)}, [], {"a": (2,), "b": (2,)}, "1 target tensors without a source:\n  b$"),
        ({"a": (2,), "b": (2,)}, [], {"a": (2,)}, "1 source tensors without a target:\n  b$"),
        ({"a": (2,)}, [], {"a": (3,)}, r"a from a has shape \(2,\), expected \(3,\)"),
        ({"a": (2,), "b": (2,)}, [WeightRenaming("b", "a")], {"a": (2,)}, "b for a, made of a"),
        (
            {"x": (2, 3), "a": (3, 2)},
            [WeightConverter("x", "a", [Transpose(0, 1)])],
            {"a": (3, 2)},
            "x for a, made of a",
        ),
        (
            {"1.x": (2, 3), "2.x": (2, 3)},
            [WeightRenaming(r"\d.", ""), WeightConverter("x", "a", [Transpose(0, 1)])],
            {"a": (3, 2)},
            "2.x for a, made of 1.x",
        ),
        (
            {"x": (4,), "b": (2,)},
            [WeightConverter("x", ["a", "b"], [Chunk(0)])],
            {"a": (2,), "b": (2,)},
            "b from .* as well as from",
        ),
        ({"x": (4,)}, [WeightConverter("x", ["a", "b"], [Chunk(0)])], {"a": (2,)}, "b from x is no target"),
        (
            {"x": (4,)},
            [WeightConverter("x", "a", [Transpose(0, 1)])],
            {"a": (4,)},
            "1 failed conversions:\n  a from x: ",
        ),
    ],
    ids=["missing", "left over", "shape", "twice", "both", "converted twice", "made twice", "no target", "failed"],
)
def test_misfits(tensors, transforms, expected, message):
    infos = {name: TensorInfo(shape, torch.float32) for name, shape in tensors.items()}
    with pytest.raises(ValueError, match="does not fit the model") as error:
        plan_conversion(infos, transforms, expected)
    assert error.match(message)


def test_errors_list_ten_and_count_all():
    infos = {f"source.{i}": TensorInfo((1,), torch.float32) for i in range(12)}
    with pytest.raises(ValueError, match="does not fit") as error:
        plan_conversion(infos, [], {f"target.{i}": (1,) for i in range(11)})
    lines = str(error.value).splitlines()
    assert "12 source tensors without a target:" in lines and "11 target tensors without a source:" in lines
    assert "  ... and 2 more" in lines and "  ... and 1 more" in lines
    assert len(lines) == 1 + 2 * 12
