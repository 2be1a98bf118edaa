"""JSON bent as a tree: keys removed, doubled and renamed, values of other types and sizes, names that lead elsewhere."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

__all__ = ["TRAVERSALS", "bend_json"]

# "outside" and its kin exist: the campaign puts valid weights there, and reading them is a failure.
TRAVERSALS = (
    "../outside.safetensors", "../outside.bin", "/etc/passwd", "..", ".", "", "a/../../outside.safetensors", "\0",
    "x" * 300, "x" * 10_000, "model.safetensors\0.txt", "..\\outside.safetensors", "./model.safetensors",
    "../source/model.safetensors", "~/.bashrc", "/dev/zero", "\ud800", "config.json",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 63, 65, 128, 1000, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.0, -0.0,
    0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, "", "0", "64", "bfloat16", "mixtral", "llama", [], {}, [[]], {"": {}})
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "U32", "U8", "I8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "f32")

Slot = tuple[Any, Any]


def bend_json(rng: random.Random, data: bytes) -> bytes:
    """``data`` with one to four changes; what is no JSON stays as it is."""
    try:
        tree = json.loads(data)
    except ValueError:
        return data
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        slots = list(_slots(tree))
        if not slots:
            break
        _bend(rng, slots)
    text = json.dumps(tree)
    where = rng.random()
    if where < 0.06:
        text = _double_key(rng, text)
    elif where < 0.08:
        depth = rng.choice((10, 900, 5000, 100_000))
        text = text.replace(": ", ": " + "[" * depth + "]" * depth + ', "x": ', 1)
    elif where < 0.09:
        text = text.replace("1", "1" * rng.choice((30, 400, 5000)), 1)
    return text.encode("utf-8", "surrogatepass")


def _slots(tree: Any) -> Iterator[Slot]:
    """Every (container, key) of the tree."""
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _slots(tree[key])


def _bend(rng: random.Random, slots: list[Slot]) -> None:
    container, key = rng.choice(slots)
    kind = rng.random()
    if kind < 0.15:
        del container[key]
    elif kind < 0.25 and isinstance(container, dict):
        container[rng.choice((key + "x", "", "__metadata__", "weight_map", key.upper(), *TRAVERSALS))] = container.pop(
            key
        )
    elif kind < 0.4:
        other, at = rng.choice(slots)
        # A copy: a tree that holds itself cannot be written.
        if (isinstance(other, dict) and at in other) or (isinstance(other, list) and at < len(other)):
            container[key] = json.loads(json.dumps(other[at]))
    elif isinstance(container[key], str) and kind < 0.8:
        container[key] = rng.choice(rng.choice((TRAVERSALS, DTYPES)))
    elif isinstance(container[key], int | float) and kind < 0.85:
        nearby = container[key] + rng.choice((-64, -2, -1, 1, 2, 64))
        container[key] = rng.choice((nearby, container[key] * 2, -container[key], rng.choice(NUMBERS)))
    else:
        container[key] = rng.choice((rng.choice(NUMBERS), rng.choice(OTHERS), rng.choice(TRAVERSALS), _deep(rng)))


def _deep(rng: random.Random) -> Any:
    value: Any = rng.choice(NUMBERS)
    for _ in range(rng.choice((1, 33, 400))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def _double_key(rng: random.Random, text: str) -> str:
    """A key twice, with another value: what a dictionary cannot hold and a file can."""
    places = [
        at
        for at, letter in enumerate(text)
        if letter == '"' and (text[at - 1 : at] == "{" or text[at - 2 : at] == ", ")
    ]
    if not places:
        return text
    at = rng.choice(places)
    name = text[at : text.index('"', at + 1) + 1]
    return f"{text[:at]}{name}: {json.dumps(rng.choice(NUMBERS))}, {text[at:]}"
