"""Weights as GGUF stores them: blocks along a row, searched for, or taken over from MLX's integers.

A block of 32 weights is a float16 scale d (and in Q4_1 a minimum m) before its integers (ggml-common.h in ggml-org/llama.cpp):

    Q4_0   d (q - 8)     q in 4 bits; the first 16 of a block in low halves of bytes, the last 16 in high ones
    Q4_1   d q + m       q in 4 bits, likewise
    Q8_0   d q           q a signed byte

MLX's affine ``w = scale q + bias`` is Q4_1 wherever q has 4 bits or less: a group of 64 or 128 becomes blocks with the same
d and m. It is Q4_0 or Q8_0 where the bias is a whole multiple of the scale that moves q into their range.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import DtypeRangeError, NonFiniteWeightsError
from mlx_mixtral.weights.dtypes import convert, is_finite
from mlx_mixtral_convert.export.k_blocks import LARGEST, SEARCHED, search_blocks
from mlx_mixtral_convert.packing.measure import decode, row_blocks
from mlx_mixtral_convert.packing.values import Values
from mlx_mixtral_convert.sources.gguf.types import TYPES_BY_NAME

__all__ = ["BLOCK", "encode", "repack", "repackable"]

Bytes = npt.NDArray[np.uint8]

BLOCK = 32
# The largest weight whose block has a scale that float16 holds.
_LARGEST = {"F16": 65504.0, **LARGEST}
# (what is taken from q, lowest, highest) of what is left.
_SYMMETRIC = {"Q4_0": (-8, 7), "Q8_0": (-128, 127)}


def encode(
    values: Values, kind: str, place: str, pool: Executor, importance: npt.NDArray[np.float32] | None = None
) -> Bytes:
    """Rows of ``values`` as GGUF type ``kind``, uint8 ``[rows, row_bytes]``; ``pool`` works on cache-sized blocks of rows.

    ``importance [columns]`` weighs the error of each input, where scales are searched for.

    Raises:
        NonFiniteWeightsError: NaN or infinity in the tensor at ``place``.
        DtypeRangeError: a weight whose scale float16 cannot hold.
    """
    rows, columns = values.array.shape
    out = np.empty((rows, TYPES_BY_NAME[kind].row_bytes(columns)), np.uint8)

    def block(at: slice) -> None:
        if not is_finite(values.array[at], values.dtype):
            raise NonFiniteWeightsError(f"{place} holds NaN or infinity; the checkpoint is damaged")
        if kind == values.dtype:
            out[at] = values.array[at].view(np.uint8)
            return
        floats = convert(values.array[at], values.dtype, "F32")
        if (limit := _LARGEST.get(kind)) is not None and (largest := float(np.abs(floats).max())) > limit:
            raise DtypeRangeError(f"{place} holds {largest:.3g}, beyond the {limit:g} of {kind}; use BF16")
        out[at] = (
            search_blocks(floats, kind, importance) if kind in SEARCHED else convert(floats, "F32", kind).view(np.uint8)
        )

    for _ in pool.map(block, row_blocks(rows, columns)):
        pass
    return out


def repackable(spec: QuantizationSpec, kind: str) -> bool:
    """Whether integers of an MLX packing may fit ``kind``; the biases decide in the end."""
    return spec.has_biases and (kind == "Q8_0" or (kind in ("Q4_0", "Q4_1") and spec.bits <= 4))


def repack(packed: Mapping[str, npt.NDArray[Any]], spec: QuantizationSpec, kind: str) -> Bytes | None:
    """MLX's words, scales and biases (float16) as blocks of ``kind`` that mean the same weights; None where none do.

    Exact in the numbers' own arithmetic: ``d (q - k)`` is ``scale q + bias`` when ``bias = -k scale``.
    """
    rows, repeat = len(packed["weight"]), spec.group_size // BLOCK
    ones = np.ones(packed["scales"].shape, np.float32)
    blocks: list[Bytes] = []
    for at in row_blocks(rows, packed["weight"].shape[1] * 32 // spec.bits):
        unit = {"weight": packed["weight"][at], "scales": ones[at], "biases": 0 * ones[at]}
        codes = decode(unit, spec).reshape(-1, BLOCK)
        scales, biases = (np.repeat(packed[field][at], repeat, axis=1).reshape(-1, 1) for field in ("scales", "biases"))
        if kind == "Q4_1":
            blocks.append(np.concatenate([_bytes(scales), _bytes(biases), _halves(codes)], axis=1))
            continue
        lowest, highest = _SYMMETRIC[kind]
        with np.errstate(divide="ignore", invalid="ignore"):
            zero = np.rint(-biases.astype(np.float64) / scales.astype(np.float64))
        zero[~np.isfinite(zero)] = 0
        moved = np.where(scales == 0, 0, codes - zero)
        if (-zero * scales.astype(np.float64) != biases).any() or moved.min() < lowest or moved.max() > highest:
            return None
        signed = moved.astype(np.int8).view(np.uint8) if kind == "Q8_0" else _halves(moved + 8)
        blocks.append(np.concatenate([_bytes(scales), signed], axis=1))
    joined: Bytes = np.concatenate(blocks)
    return joined.reshape(rows, -1)


def _bytes(values: npt.NDArray[np.float16]) -> Bytes:
    return np.ascontiguousarray(values).view(np.uint8)


def _halves(codes: npt.NDArray[Any]) -> Bytes:
    small = codes.astype(np.uint8)
    halves: Bytes = small[:, : BLOCK // 2] | small[:, BLOCK // 2 :] << np.uint8(4)
    return halves
