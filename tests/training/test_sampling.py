"""Orders of samples: every one once, and with lengths grouped, steps of one kind and of similar length."""

import itertools
import random

import pytest

from llava_family.training.sampling import ModalityLengthSampler, ShuffledSampler


def lengths(num_images, num_texts, seed=0):
    generator = random.Random(seed)
    values = [generator.randint(1, 2000) for _ in range(num_images)]
    values += [-generator.randint(1, 2000) for _ in range(num_texts)]
    generator.shuffle(values)
    return values


def steps_of(sampler):
    order = list(sampler)
    assert sorted(order) == list(range(len(sampler)))
    return [order[start : start + sampler.step_size] for start in range(0, len(order), sampler.step_size)]


@pytest.mark.parametrize(("num_images", "num_texts"), [(100, 60), (103, 61), (7, 3), (16, 0), (0, 13), (1, 0), (3, 3)])
@pytest.mark.parametrize("step_size", [1, 4, 8])
def test_steps_are_of_one_kind(num_images, num_texts, step_size):
    values = lengths(num_images, num_texts)
    mixed = 0
    steps = steps_of(ModalityLengthSampler(values, step_size, seed=0))
    for step in steps:
        kinds = {values[index] > 0 for index in step}
        mixed += len(kinds) > 1
    # Only what is left over of both kinds shares a step, or two.
    rest = num_images % step_size + num_texts % step_size
    assert mixed <= (rest + step_size - 1) // step_size
    for step in steps[: len(steps) - (rest + step_size - 1) // step_size]:
        assert len(step) == step_size and len({values[index] > 0 for index in step}) == 1


def test_lengths_of_a_step_are_similar():
    values = lengths(4000, 4000)
    steps = steps_of(ModalityLengthSampler(values, 8, seed=0))
    spread = [max(abs(values[index]) for index in step) - min(abs(values[index]) for index in step) for step in steps]
    assert sum(spread) / len(spread) < 2000 / 25  # by chance, it were about 1550
    # Steps come in no order of length or kind.
    first = [abs(values[step[0]]) for step in steps]
    assert 0.4 < sum(a < b for a, b in itertools.pairwise(first)) / len(steps) < 0.6
    kinds = [values[step[0]] > 0 for step in steps]
    assert 0.4 < sum(a != b for a, b in itertools.pairwise(kinds)) / len(steps) < 0.6


@pytest.mark.parametrize(
    "make", [lambda seed: ModalityLengthSampler(lengths(50, 30), 4, seed), lambda seed: ShuffledSampler(80, seed)]
)
def test_order_follows_from_seed_and_epoch(make):
    sampler, same, other = make(0), make(0), make(1)
    first = list(sampler)
    assert list(sampler) == first == list(same) != list(other)
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first and sorted(second) == sorted(first) == list(range(80))
    sampler.set_epoch(0)
    assert list(sampler) == first
