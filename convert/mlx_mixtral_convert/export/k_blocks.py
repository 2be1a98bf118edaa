"""GGUF's types whose scales are searched for, and their blocks byte by byte.

``weights`` values of a row lie in a block, little-endian, as ggml-common.h and the readers of ggml-quants.c in
ggml-org/llama.cpp have them:

    Q2_K   16 bytes of scale and minimum (4 bits each), q in 2 bits, d, dmin
    Q3_K   the high bits of q, its 2 low bits, 12 bytes of scales in 6 bits (plus 32), d
    Q4_K   d, dmin, 12 bytes of scales and minima in 6 bits, q in 4 bits
    Q5_K   d, dmin, the same 12 bytes, the high bits of q, its 4 low bits
    Q6_K   the 4 low bits of q (plus 32), its 2 high bits, 16 scales as signed bytes, d
    Q4_0, Q5_0, Q4_1, Q5_1   d, with a minimum m, the high bits of q, its 4 low bits
    Q8_0   d, q as signed bytes
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import numpy.typing as npt

from mlx_mixtral_convert.export.k_search import KType, SuperBlocks, search

__all__ = ["LARGEST", "SEARCHED", "search_blocks"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_Starts = tuple[tuple[float, float], ...]


def _grid(steps: tuple[float, ...], bottoms: tuple[float, ...]) -> _Starts:
    return tuple(product(steps, bottoms))


def _steps(*steps: float) -> _Starts:
    return tuple((step, step) for step in steps)


_BITS_4 = _grid((1.04, 1.0, 0.96, 0.92, 0.88), (1.0, 0.92))
_BITS_5 = _grid((1.02, 1.0, 0.98, 0.96), (1.0, 0.97))
# Few codes gain from cutting off more of a group's tail; many only from finding the right fraction of a step.
SEARCHED: dict[str, KType] = {
    "Q2_K": KType(16, 16, (0, 3), (0, 15), True, _grid((1.1, 1.0, 0.9, 0.8, 0.7), (1.0, 0.85, 0.7, 0.5)), (1.0, 1.0)),
    "Q3_K": KType(16, 16, (-4, 3), (-32, 31), False, _steps(1.1, 1.0, 0.9, 0.8, -1.3, -1.1, -0.9), (1.0, 2 / 3)),
    "Q4_K": KType(32, 8, (0, 15), (0, 63), True, _BITS_4),
    "Q5_K": KType(32, 8, (0, 31), (0, 63), True, _BITS_5),
    "Q6_K": KType(16, 16, (-32, 31), (-128, 127), False, _steps(1.02, 1.01, 1.0, 0.99, 0.98, -1.05, -1.03, -1.01)),
    "Q4_0": KType(32, 1, (-8, 7), None, False, _steps(1.05, 1.0, 0.95, 0.9, 0.85, -1.15, -1.05, -0.95)),
    "Q5_0": KType(32, 1, (-16, 15), None, False, _steps(1.03, 1.01, 1.0, 0.98, 0.95, -1.07, -1.03, -0.99)),
    "Q8_0": KType(32, 1, (-127, 127), None, False, _steps(1.0, 0.998, 0.996, 1.002, -1.0, -0.998)),
    "Q4_1": KType(32, 1, (0, 15), None, True, _BITS_4),
    "Q5_1": KType(32, 1, (0, 31), None, True, _BITS_5),
}
# The largest weight whose block has numbers that float16 holds.
LARGEST = {
    "Q2_K": 15 * 65504.0, "Q3_K": 124 * 65504.0, "Q4_K": 63 * 65504.0, "Q5_K": 63 * 65504.0, "Q6_K": 3968 * 65504.0,
    "Q8_0": 127 * 65504.0, "Q4_0": 8 * 65504.0, "Q5_0": 16 * 65504.0, "Q4_1": 65504.0, "Q5_1": 65504.0,
}  # fmt: skip


def search_blocks(weights: Floats, name: str, importance: Floats | None = None) -> Bytes:
    """Rows ``[rows, columns]`` as blocks of a type of ``SEARCHED``, ``[rows, row_bytes]``, with ``importance [columns]``."""
    blocks = _PACKERS[name](search(weights, SEARCHED[name], importance))
    return blocks.reshape(len(weights), -1)


def _half(values: Floats) -> Bytes:
    return values.astype("<f2").view(np.uint8).reshape(len(values), 2)


def _nibbles(codes: Bytes, apart: int) -> Bytes:
    """Two codes of 4 bits a byte, ``apart`` from each other: the first in the low half."""
    pairs = codes.reshape(len(codes), -1, 2, apart)
    joined: Bytes = pairs[:, :, 0] & np.uint8(15) | (pairs[:, :, 1] & np.uint8(15)) << np.uint8(4)
    return joined.reshape(len(codes), -1)


def _quarters(codes: Bytes, apart: int = 32) -> Bytes:
    """Four codes of 2 bits a byte, ``apart`` from each other: the first in the lowest bits."""
    parts = (codes & np.uint8(3)).reshape(len(codes), -1, 4, apart) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    joined: Bytes = np.bitwise_or.reduce(parts, axis=2)
    return joined.reshape(len(codes), -1)


def _columns_of_bits(bits: Bytes) -> Bytes:
    """Bytes ``[n, 32]`` of ``[n, 8, 32]`` zeros and ones: bit g of byte i is that of weight 32 g + i."""
    return np.packbits(bits, axis=1, bitorder="little").reshape(len(bits), 32)


def _words_of_bits(bits: Bytes) -> Bytes:
    """Bytes ``[n, 4]`` of ``[n, 32]`` zeros and ones."""
    return np.packbits(bits, axis=1, bitorder="little")


def _six_bits(scales: Bytes, minima: Bytes) -> Bytes:
    """Eight scales and eight minima in 12 bytes: the first four of each whole, above them the high bits of the others."""
    return np.concatenate(
        [
            scales[:, :4] | (scales[:, 4:] >> np.uint8(4)) << np.uint8(6),
            minima[:, :4] | (minima[:, 4:] >> np.uint8(4)) << np.uint8(6),
            scales[:, 4:] & np.uint8(15) | (minima[:, 4:] & np.uint8(15)) << np.uint8(4),
        ],
        axis=1,
    )


def _q2_k(found: SuperBlocks) -> Bytes:
    scales, minima = found.scales.view(np.uint8), found.minima.view(np.uint8)
    codes = _quarters(found.codes.view(np.uint8).reshape(len(scales), 256))
    return np.concatenate([scales | minima << np.uint8(4), codes, _half(found.d), _half(found.dmin)], axis=1)


def _q3_k(found: SuperBlocks) -> Bytes:
    codes = (found.codes + np.int8(4)).view(np.uint8).reshape(-1, 256)
    scales = (found.scales + np.int8(32)).view(np.uint8)
    packed = np.concatenate([_nibbles(scales, 8), _quarters(scales >> np.uint8(4), 4)], axis=1)
    top = _columns_of_bits((codes >> np.uint8(2)).reshape(-1, 8, 32))
    return np.concatenate([top, _quarters(codes), packed, _half(found.d)], axis=1)


def _q4_k(found: SuperBlocks) -> Bytes:
    packed = _six_bits(found.scales.view(np.uint8), found.minima.view(np.uint8))
    codes = found.codes.view(np.uint8).reshape(-1, 256)
    return np.concatenate([_half(found.d), _half(found.dmin), packed, _nibbles(codes, 32)], axis=1)


def _q5_k(found: SuperBlocks) -> Bytes:
    packed = _six_bits(found.scales.view(np.uint8), found.minima.view(np.uint8))
    codes = found.codes.view(np.uint8)
    top, low = _columns_of_bits(codes >> np.uint8(4)), _nibbles(codes.reshape(-1, 256), 32)
    return np.concatenate([_half(found.d), _half(found.dmin), packed, top, low], axis=1)


def _q6_k(found: SuperBlocks) -> Bytes:
    codes = (found.codes + np.int8(32)).view(np.uint8).reshape(-1, 256)
    scales = found.scales.view(np.uint8)
    return np.concatenate([_nibbles(codes, 64), _quarters(codes >> np.uint8(4)), scales, _half(found.d)], axis=1)


def _centred(zero: int) -> Callable[[SuperBlocks], Bytes]:
    """Q4_0 and Q5_0: ``zero`` is what is added to q."""

    def pack(found: SuperBlocks) -> Bytes:
        codes = (found.codes + np.int8(zero)).view(np.uint8).reshape(-1, 32)
        top = [_words_of_bits(codes >> np.uint8(4))] if zero == 16 else []
        return np.concatenate([_half(found.d), *top, _nibbles(codes, 16)], axis=1)

    return pack


def _with_minimum(bits: int) -> Callable[[SuperBlocks], Bytes]:
    """Q4_1 and Q5_1."""

    def pack(found: SuperBlocks) -> Bytes:
        codes = found.codes.view(np.uint8).reshape(-1, 32)
        top = [_words_of_bits(codes >> np.uint8(4))] if bits == 5 else []
        return np.concatenate([_half(found.d), _half(-found.dmin), *top, _nibbles(codes, 16)], axis=1)

    return pack


def _q8_0(found: SuperBlocks) -> Bytes:
    return np.concatenate([_half(found.d), found.codes.view(np.uint8).reshape(-1, 32)], axis=1)


_PACKERS: dict[str, Callable[[SuperBlocks], Bytes]] = {
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "Q8_0": _q8_0, "Q4_0": _centred(8), "Q5_0": _centred(16), "Q4_1": _with_minimum(4), "Q5_1": _with_minimum(5),
}  # fmt: skip
