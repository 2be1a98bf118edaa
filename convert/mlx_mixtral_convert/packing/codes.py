"""Quantised codes as MLX stores them: a row is one little-endian stream of ``bits``-wide integers, cut into uint32 words."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

__all__ = ["pack", "pack_rows"]

WORD = 32


def pack(codes: mx.array, bits: int) -> mx.array:
    """Words ``[rows, columns * bits / 32]`` of codes ``[rows, columns]`` (any integer or whole float type, below 2^bits).

    32 codes fill ``bits`` words exactly; where 32 is no multiple of ``bits`` a code may straddle two of them.
    """
    rows = codes.shape[0]
    grouped = codes.astype(mx.uint32).reshape(rows, -1, WORD)
    words = [mx.zeros(grouped.shape[:-1], mx.uint32)] * bits
    for index in range(WORD):
        word, shift = divmod(index * bits, WORD)
        words[word] = words[word] | (grouped[..., index] << shift)
        if shift + bits > WORD:
            words[word + 1] = words[word + 1] | (grouped[..., index] >> (WORD - shift))
    return mx.stack(words, axis=-1).reshape(rows, -1)


def pack_rows(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint32]:
    """The same on any thread, of rows of a multiple of 32 codes."""
    stream = np.unpackbits(codes[..., None], axis=2, count=bits, bitorder="little").reshape(len(codes), -1)
    return np.packbits(stream, axis=1, bitorder="little").view(np.uint32)
