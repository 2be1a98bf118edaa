"""GGUF bent field by field: counts, types, shapes, offsets, and keys of other values and types."""

from __future__ import annotations

import copy
import random
from typing import Any

from tests.fuzz.gguf_file import ARRAY, SCALARS, STRING, GgufFile, Key

__all__ = ["bend_gguf"]

NUMBERS = (
    0,
    1,
    2,
    3,
    31,
    32,
    64,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -1,
)
FLOATS = (0.0, -1.0, 1e-300, 1e300, float("inf"), float("nan"))
TEXTS = (
    "",
    "llama",
    "gpt2",
    "mixtral",
    "\0",
    "../x",
    "x" * 70_000,
    "{% for x in range(10**9) %}",
    "\u2581",
    "yarn",
    "linear",
)
NAMES = (
    "llama.expert_count", "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.attention.key_length", "split.count",
    "llama.attention.sliding_window", "split.no", "split.tensors.count", "general.type", "llama.attention.scale",
    "llama.vocab_size", "tokenizer.ggml.pre", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.precompiled_charsmap",
    "x" * 60_000, "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.padding_token_id", "llama.expert_feed_forward_length", "",
)  # fmt: skip


def bend_gguf(rng: random.Random, seed: GgufFile) -> bytes:
    file = copy.deepcopy(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        where = rng.random()
        if where < 0.08:
            _counts(rng, file)
        elif where < 0.6:
            _key(rng, file)
        else:
            _tensor(rng, file)
    return file.write()


def _counts(rng: random.Random, file: GgufFile) -> None:
    field = rng.choice(("version", "tensor_count", "key_count"))
    near = {"version": file.version, "tensor_count": len(file.tensors), "key_count": len(file.keys)}[field]
    setattr(file, field, rng.choice((near + rng.choice((-1, 1)), rng.choice(NUMBERS))))


def _key(rng: random.Random, file: GgufFile) -> None:
    if not file.keys:
        return
    at = rng.randrange(len(file.keys))
    key, what = file.keys[at], rng.randrange(8)
    if what == 0:
        del file.keys[at]
    elif what == 1:
        file.keys.insert(rng.randrange(len(file.keys)), copy.deepcopy(key))
    elif what == 2:
        key.name = rng.choice((rng.choice(NAMES), key.name + "x", rng.choice(file.keys).name))
    elif what == 3:
        file.keys.append(_new_key(rng, rng.choice(NAMES)))
    elif what == 4:
        file.keys[at] = _new_key(rng, key.name)
    elif key.kind == ARRAY:
        _array(rng, key)
    else:
        key.value = _value(rng, key.kind, key.value)


def _new_key(rng: random.Random, name: str) -> Key:
    kind = rng.choice((*SCALARS, STRING, ARRAY, 13, 255))
    if kind != ARRAY:
        return Key(name, kind, _value(rng, kind, 1))
    item = rng.choice((*SCALARS, STRING, ARRAY, 99))
    return Key(name, kind, [_value(rng, item, 1)] * rng.choice((0, 1, 2, 32)), item)


def _value(rng: random.Random, kind: int, near: Any) -> Any:
    if kind == STRING:
        return rng.choice(TEXTS)
    if kind in (6, 12):
        return rng.choice(FLOATS)
    if isinstance(near, int):
        return rng.choice((near - 1, near + 1, near * 2, rng.choice(NUMBERS)))
    return rng.choice(NUMBERS)


def _array(rng: random.Random, key: Key) -> None:
    what = rng.randrange(5)
    values: list[Any] = key.value
    if what == 0:
        key.count = rng.choice((*NUMBERS, len(values) - 1, len(values) + 1))
    elif what == 1:
        key.item = rng.choice((*SCALARS, STRING, ARRAY))
        if key.item != STRING:
            key.value = [v if isinstance(v, int | float) else 1 for v in values]
    elif what == 2 and values:
        values[rng.randrange(len(values))] = _value(rng, key.item, 1)
    elif what == 3 and values:
        del values[rng.randrange(len(values))]
    else:
        values.extend([_value(rng, key.item, 1)] * rng.choice((1, 100)))


def _tensor(rng: random.Random, file: GgufFile) -> None:
    if not file.tensors:
        return
    at = rng.randrange(len(file.tensors))
    tensor, what = file.tensors[at], rng.randrange(9)
    if what == 0:
        del file.tensors[at]
    elif what == 1:
        file.tensors.append(copy.deepcopy(tensor))
    elif what == 2:
        tensor.name = rng.choice(
            ("", "x", "x" * 60_000, "rope_freqs.weight", tensor.name + "x", rng.choice(file.tensors).name)
        )
    elif what == 3:
        tensor.kind = rng.choice((0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19, 20, 21, 22, 23, 29, 30, 34, 35, 39,
                                  40, 41, 2**31))  # fmt: skip
        if rng.random() < 0.5:
            tensor.data = (tensor.data * 8)[: rng.choice((1, 2, 4, 8)) * len(tensor.data)]
    elif what == 4:
        tensor.offset = rng.choice((*NUMBERS, 32, 64, 4096))
    elif what == 5:
        tensor.data = rng.randbytes(len(tensor.data))
    elif what == 6:
        tensor.data = tensor.data[: rng.randrange(len(tensor.data) or 1)]
    elif what == 7 and tensor.axes:
        index = rng.randrange(len(tensor.axes))
        tensor.axes[index] = rng.choice((tensor.axes[index] * 2, tensor.axes[index] // 2, rng.choice(NUMBERS)))
    else:
        tensor.axes = rng.choice(([], tensor.axes[::-1], [*tensor.axes, 1], [1] * 5, [2**32] * 4, [*tensor.axes, 0]))
