"""Breaks JSON files: their values, their keys, their structure, and their text."""

import copy
import json

from .mutations import flip_bits, insert_block, remove_block, repeat_block, truncate


VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    7,
    2**15,
    10**6,
    10**9,
    2**63,
    10**30,
    0.5,
    -0.5,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "0",
    "abc",
    "<image>",
    "\u2581",
    "x" * 10_000,
    [],
    [[]],
    [1],
    [1, 2, 3, 4, 5],
    [None],
    ["a", "b"],
    {},
    {"": None},
    {"content": 1},
    {"type": "abc"},
)
TEXT_MUTATIONS = (flip_bits, truncate, remove_block, repeat_block, insert_block)


def mutate_json(rng, text):
    """The bytes of a JSON file, or of another text, after one to three mutations; most of them still JSON."""
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if content is None or rng.random() < 0.1:
        return bytes(rng.choice(TEXT_MUTATIONS)(rng, text.encode(), ()))
    if rng.random() < 0.02:
        return json.dumps(rng.choice(VALUES)).encode()
    if rng.random() < 0.01:
        depth = rng.choice((100, 5000, 100_000))
        return b'{"model_type":' + b"[" * depth + b"]" * depth + b"}"
    for _ in range(rng.choice((1, 1, 2, 3))):
        _change_one(rng, content)
    return json.dumps(content).encode()


def _change_one(rng, content):
    """Changes something at a random place, all depths being as likely."""
    parent, key = None, None
    node = content
    while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.7):
        parent = node
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        node = parent[key]
    if parent is None:
        return
    change = rng.choice(("value", "value", "value", "scale", "drop", "rename", "copy", "wrap", "swap"))
    if change == "scale" and isinstance(node, int | float) and not isinstance(node, bool):
        parent[key] = rng.choice((-node, node * 2, node // 2, node + 1, float(node), str(node), node * 10**6))
    elif change == "drop":
        del parent[key]
    elif change == "rename" and isinstance(parent, dict):
        parent[rng.choice((f"{key}_", "", key.upper(), "model_type", "size"))] = parent.pop(key)
    elif change == "copy":
        other = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        parent[other] = copy.deepcopy(node)
    elif change == "wrap":
        parent[key] = rng.choice(([node], {"value": node}, [node, node], str(node)))
    elif change == "swap" and isinstance(parent, list):
        rng.shuffle(parent)
    else:
        parent[key] = copy.deepcopy(rng.choice(VALUES))
