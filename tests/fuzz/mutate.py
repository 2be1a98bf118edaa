"""A seeded mutator: the same format and number give the same files on every machine.

Bytes are bent anywhere, most often in the head of a file where its structure lies. Half of the cases know the structure and
write the file around what they changed, so that a lie gets past checksums and lengths to the code behind them.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from tests.fuzz.mutate_config import bend_config
from tests.fuzz.mutate_gguf import bend_gguf
from tests.fuzz.mutate_json import bend_json
from tests.fuzz.mutate_torch import bend_torch
from tests.fuzz.places import KINDS, Special
from tests.fuzz.seeds import Files, Seed

__all__ = ["mutate"]

NUMBERS = (0, 1, 2, 7, 31, 32, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63,
           2**64 - 1, 2**64 - 32)  # fmt: skip
HEAD_BYTES = 1024
# Files of ours by names that do not say so.
SAFETENSORS = ("saved.prompt", "calibration", "routing.trace", "reference")


def mutate(seeds: list[Seed], fmt: str, number: int) -> tuple[Seed, Files, bool]:
    """The seed, the files of case ``number`` and whether to convert them with ``exact``."""
    rng = random.Random(f"{fmt}:{number}")
    seed = rng.choice(seeds)
    files = dict(seed.files)
    target = rng.choice(seed.targets)
    if fmt in ("companion", "own") and rng.random() < 0.3:
        files[target] = Special(rng.choice(sorted(KINDS)).encode())
        return seed, files, False
    if fmt == "config":
        files[target] = bend_config(rng, files[target])
        return seed, files, False
    if rng.random() < 0.02:
        del files[rng.choice(sorted(files))]
    elif rng.random() < 0.05:
        target = rng.choice(sorted(files))
    if target in files:
        files[target] = _bent(rng, seed, target, files[target], rng.choice(seeds))
    return seed, files, seed.quantised and rng.random() < 0.4


def _bent(rng: random.Random, seed: Seed, target: str, data: bytes, other: Seed) -> bytes:
    if rng.random() < 0.6:
        if seed.gguf is not None:
            return bend_gguf(rng, seed.gguf)
        if target.endswith((".bin", ".pth")):
            return bend_torch(rng, data)
        if target.endswith(".json"):
            return bend_json(rng, data)
        if target.endswith(".safetensors") or target in SAFETENSORS:
            return _bend_header(rng, data)
    for _ in range(_times(rng)):
        data = rng.choice(BENDS)(rng, data)
    if rng.random() < 0.1:
        data = _splice(rng, data, other.files[rng.choice(other.targets)])
    return data


def _times(rng: random.Random) -> int:
    times = 1
    while times < 16 and rng.random() < 0.4:
        times += 1
    return times


def _bend_header(rng: random.Random, data: bytes) -> bytes:
    """The JSON header of a safetensors file, its length made to fit unless that is what is bent."""
    length = int.from_bytes(data[:8], "little")
    raw, rest = bend_json(rng, data[8 : 8 + length]), data[8 + length :]
    said = rng.choice(NUMBERS) if rng.random() < 0.05 else len(raw)
    return struct.pack("<Q", said) + raw + rest


def _place(rng: random.Random, data: bytes) -> int:
    """Anywhere, but the first kilobyte and the last are where a byte counts."""
    size, where = len(data), rng.random()
    if where < 0.5:
        return rng.randrange(min(size, HEAD_BYTES) or 1)
    if where < 0.65:
        return max(0, size - 1 - rng.randrange(HEAD_BYTES))
    return rng.randrange(size or 1)


def _flip(rng: random.Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :]


def _byte(rng: random.Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.choice((b"\0", b"\x01", b"\x7f", b"\x80", b"\xff", b'"', b"{", b"/", b"R")) + data[at + 1 :]


def _number(rng: random.Random, data: bytes) -> bytes:
    at, size = _place(rng, data), rng.choice((2, 4, 8))
    return data[:at] + _low_bytes(rng.choice(NUMBERS), size) + data[at + size :]


def _add(rng: random.Random, data: bytes) -> bytes:
    """A field a little off: what checks of one bound miss."""
    at, size = _place(rng, data), rng.choice((1, 4, 8))
    value = int.from_bytes(data[at : at + size], "little") + rng.choice((-32, -8, -1, 1, 8, 32))
    return data[:at] + _low_bytes(value, size) + data[at + size :]


def _low_bytes(value: int, size: int) -> bytes:
    return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: _place(rng, data)]


def _extend(rng: random.Random, data: bytes) -> bytes:
    return data + rng.randbytes(rng.choice((1, 8, 32, 4096)))


def _remove(rng: random.Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + data[at + rng.choice((1, 4, 8, 32, 1024)) :]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    at, size = _place(rng, data), rng.choice((1, 8, 64, 1024))
    return data[: at + size] + data[at : at + size] * rng.choice((1, 2, 64)) + data[at + size :]


def _swap(rng: random.Random, data: bytes) -> bytes:
    first, second = sorted((_place(rng, data), _place(rng, data)))
    size = min(rng.choice((4, 8, 64)), second - first)
    one, two = data[first : first + size], data[second : second + size]
    return data[:first] + two + data[first + size : second] + one + data[second + size :]


def _not_finite(rng: random.Random, data: bytes) -> bytes:
    """NaN or infinity of a float type, among the weights."""
    value = rng.choice((b"\xc0\x7f", b"\x80\x7f", b"\x00\x7c", b"\x00\x7e", b"\x00\x00\xc0\x7f"))
    at = rng.randrange(len(data) or 1) & ~3
    return data[:at] + value + data[at + len(value) :]


def _splice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: _place(rng, data)] + other[_place(rng, other) :]


BENDS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _flip, _flip, _byte, _number, _number, _add, _truncate, _extend, _remove, _repeat, _swap, _not_finite,
)  # fmt: skip
