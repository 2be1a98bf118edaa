"""Conversions between the float types of checkpoints, in numpy: numpy has no bfloat16, so it is carried as uint16.

Rounding is to nearest, ties to even, as MLX and torch do it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.errors import CheckpointError

__all__ = ["FLOATS", "MLX_DTYPES", "NUMPY_DTYPES", "as_numpy", "bytes_of", "convert", "is_finite"]

FLOATS = ("F32", "F16", "BF16")
NUMPY_DTYPES: dict[str, npt.DTypeLike] = {
    "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip
MLX_DTYPES: dict[str, mx.Dtype] = {
    "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "U16": mx.uint16, "U8": mx.uint8,
}  # fmt: skip

Array = npt.NDArray[Any]


def as_numpy(raw: npt.NDArray[np.uint8], dtype: str) -> Array:
    """Bytes ``[rows, row_bytes]`` seen as ``[rows, columns]`` of a safetensors dtype; bfloat16 as uint16."""
    return raw.view(NUMPY_DTYPES[dtype])


def convert(values: Array, source: str, target: str) -> Array:
    """Values of safetensors float type ``source`` as ``target``; a view where they are the same.

    Raises:
        CheckpointError: a pair that is not F32, F16 or BF16.
    """
    if source == target:
        return values
    if source not in FLOATS or target not in FLOATS:
        raise CheckpointError(f"weights of dtype {source} cannot be used as {target}; the float types are {FLOATS}")
    if source == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    if target == "F32":
        return values.astype(np.float32, copy=False)
    if target == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    return _to_bfloat16(values.astype(np.float32, copy=False))


def is_finite(values: Array, dtype: str) -> bool:
    """Whether no value is NaN or infinite."""
    if dtype == "BF16":
        return not bool(np.any((values & 0x7F80) == 0x7F80))
    if dtype == "F16":
        return not bool(np.any((values.view(np.uint16) & 0x7C00) == 0x7C00))
    return bool(np.isfinite(values).all())


def bytes_of(array: mx.array) -> npt.NDArray[np.uint8]:
    """The memory of an evaluated array as writable bytes.

    Unified memory makes this the array itself: bytes read from disk into it are what the GPU sees. Only write while no
    work in flight reads the array.
    """
    return np.frombuffer(array, dtype=np.uint8)  # type: ignore[call-overload,no-any-return]


def _to_bfloat16(values: npt.NDArray[np.float32]) -> Array:
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Adding to a NaN's mantissa could carry into infinity: keep it quiet instead.
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)
