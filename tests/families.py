"""A small model of every family that says the same each time, for tests that are the same for all of them."""

from .llava_mole.tiny import give_experts_weight
from .training.tiny import tiny_model, without_randomness


FAMILIES = ("llava_uhd", "moe_llava", "llava_mole")


def steady_model(family, seed=0):
    """In evaluation, without dropout or sampled experts; adapters add values of order 1."""
    model = without_randomness(tiny_model(family, seed)).eval()
    return give_experts_weight(model, seed) if family == "llava_mole" else model
