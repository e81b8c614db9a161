"""A pipeline that answers thousands of times, and threads that share one: memory stays flat, and so do the answers."""

import ctypes
import functools
import gc
import importlib
import io
import os
import pkgutil
import random
import resource
import sys
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import pipeline

import llava_family
from llava_family import LlavaUhdImageProcessorPil

from .families import FAMILIES, steady_model
from .training.tiny import WORDS, tiny_processor


# `LLAVA_WHOLE=1` asks for the whole number of calls. What an answer leaves behind shows in fewer.
WHOLE = os.environ.get("LLAVA_WHOLE") == "1"
NUM_CALLS, WARM_UP, EVERY = (2000, 500, 25) if WHOLE else (400, 150, 10)
NUM_TRACED = 200 if WHOLE else 120
NUM_THREADS = 8
KILOBYTE = 1024


@pytest.fixture(scope="module", params=FAMILIES)
def ask(request):
    return pipeline("image-text-to-text", model=steady_model(request.param), processor=tiny_processor(request.param))


def question(rng):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))


def conversation(rng, text=None):
    """A question about images of any shape."""
    content = [{"type": "text", "text": text or question(rng)}]
    for _ in range(rng.randint(0, 2)):
        size = [int(200 ** rng.random()) for _ in range(2)]
        content.insert(0, {"type": "image", "image": Image.new("RGB", size, tuple(rng.choices(range(256), k=3)))})
    return [{"role": "user", "content": content}]


def answer(ask, messages, max_new_tokens=1):
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens}
    (output,) = ask(text=messages, return_full_text=False, generate_kwargs=settings)
    return output["generated_text"]


def resident_bytes():
    """What this process holds of the memory, once the C library has given back what is free."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda padding: None)(0)  # glibc's
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def num_tensors():
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def median_slope(xs, ys):
    """Of all pairs of points (Theil-Sen): a step of the allocator, of a megabyte once, does not tilt it."""
    slopes = sorted((ys[b] - ys[a]) / (xs[b] - xs[a]) for a, b in combinations(range(len(xs)), 2))
    return slopes[len(slopes) // 2]


@functools.cache
def package_caches():
    """Every `lru_cache` of the package by its name."""
    found = {}
    for module in pkgutil.walk_packages(llava_family.__path__, "llava_family."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, functools._lru_cache_wrapper) and value.__module__ == module.name:
                found[name] = value
    return found


def clear_caches():
    for cache in package_caches().values():
        cache.cache_clear()


@pytest.mark.slow
def test_caches_are_bounded():
    caches = package_caches()
    by_grid, by_model_and_size = {"region_sampling_weights", "shares_beyond_map"}, {"_count_sliced", "_count_square"}
    by_model_and_size.add("_count_in_tree")  # counts of FLOPs, a few numbers each
    assert set(caches) == by_grid | by_model_and_size
    assert all(caches[name].cache_parameters()["maxsize"] == 256 for name in by_model_and_size)
    for cache in map(caches.get, by_grid):
        size = cache.cache_parameters()["maxsize"]
        for columns in range(1, size + 50):
            cache((1, columns), 2, torch.float32)
        assert cache.cache_info().currsize == size


@pytest.fixture
def few_objects():
    """Only what is made from here on is looked through for garbage, which takes milliseconds instead of a second."""
    clear_caches()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def mixed_conversations(num):
    """Images of any shape, and questions of which there are few.

    `tokenizers` keeps the tokens of up to 10,000 texts: it grows by 2.2 kB for each new one, to 23 MB, and then no
    further.
    """
    rng = random.Random(0)
    questions = [question(rng) for _ in range(20)]
    return (conversation(rng, rng.choice(questions)) for _ in range(num))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(1800)  # of all calls
def test_memory_is_flat(ask, few_objects):
    calls, resident, tensors = [], [], []
    for number, messages in enumerate(mixed_conversations(NUM_CALLS), start=1):
        answer(ask, messages)
        if number >= WARM_UP and number % EVERY == 0:
            calls.append(number)
            resident.append(resident_bytes())
            clear_caches()
            tensors.append(num_tensors())
    print(f"{median_slope(calls, resident):.0f} bytes per call, {resident[-1] - resident[0]} in all")
    assert median_slope(calls, resident) < KILOBYTE
    assert len(set(tensors)) == 1


@pytest.mark.slow
def test_python_objects_stay_as_many(ask, few_objects):
    """The allocator may hide a small leak, but not from `tracemalloc`, which makes calls slow."""
    calls, traced = [], []
    tracemalloc.start()
    for number, messages in enumerate(mixed_conversations(NUM_TRACED), start=1):
        answer(ask, messages)
        if number >= NUM_TRACED // 2:
            gc.collect()
            calls.append(number)
            traced.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    print(f"{median_slope(calls, traced):.0f} bytes per call, {traced[-1] - traced[0]} in all")
    assert median_slope(calls, traced) < KILOBYTE


@pytest.fixture
def busy_threads():
    """A pool whose threads take turns a thousand times as often as they do by default."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 1000)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        yield pool
    sys.setswitchinterval(interval)


@pytest.mark.slow
def test_threads_give_the_answers_of_one(ask, busy_threads):
    rng = random.Random(1)
    questions = [conversation(rng) for _ in range(5 * NUM_THREADS)]
    expected = [answer(ask, question, max_new_tokens=4) for question in questions]
    assert len(set(expected)) > len(questions) // 2
    # The first calls of all threads at once are those that install hooks and fill caches.
    fresh = pipeline("image-text-to-text", model=steady_model(ask.model.config.model_type), processor=ask.processor)
    clear_caches()
    assert list(busy_threads.map(lambda question: answer(fresh, question, max_new_tokens=4), questions)) == expected


@pytest.mark.slow
def test_threads_that_pad_batches_give_the_answers_of_one(ask, busy_threads):
    rng = random.Random(2)
    batches = [[conversation(rng) for _ in range(rng.randint(2, 3))] for _ in range(3 * NUM_THREADS)]

    def answer_batch(batch):
        arguments = {"padding": True, "return_tensors": "pt"}
        inputs = ask.processor.apply_chat_template(
            batch, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs=arguments
        )
        return ask.model.generate(**inputs, do_sample=False, max_new_tokens=3).tolist()

    expected = [answer_batch(batch) for batch in batches]
    assert list(busy_threads.map(answer_batch, batches)) == expected


def test_threads_that_route_record_their_own(busy_threads):
    """Logits of the routers, and hidden states, are collected by hooks."""
    model, processor, rng = steady_model("moe_llava"), tiny_processor("moe_llava"), random.Random(3)
    prompts = [
        processor(text=" ".join(rng.choices(WORDS, k=4 + n)), return_tensors="pt") for n in range(3 * NUM_THREADS)
    ]

    @torch.no_grad()
    def run(prompt):
        outputs = model(**prompt, output_router_logits=True, output_hidden_states=True)
        return [*outputs.router_logits, *outputs.hidden_states]

    found = list(busy_threads.map(run, prompts))
    for one, prompt in zip(found, prompts, strict=True):
        for tensor, expected in zip(one, run(prompt), strict=True):
            torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=0)


def test_threads_keep_the_filters_of_warnings(busy_threads):
    processor, file = LlavaUhdImageProcessorPil(base_size=28), io.BytesIO()
    Image.new("RGB", (28, 14)).save(file, "JPEG")
    before = list(warnings.filters)
    list(busy_threads.map(lambda _: processor(images=[file.getvalue()], return_tensors="np"), range(100)))
    assert warnings.filters == before
