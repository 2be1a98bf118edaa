"""One expert's matrix from its source's floats to MLX's packed form."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_mixtral.config.layout import fields_of
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import ConversionError, DtypeRangeError, NonFiniteWeightsError
from mlx_mixtral.weights.dtypes import MLX_DTYPES, NUMPY_DTYPES, bytes_of, convert, is_finite
from mlx_mixtral_convert.packing.measure import row_blocks
from mlx_mixtral_convert.packing.values import Values

__all__ = ["cast", "quantize"]


def cast(values: Values, dtype: str, place: str) -> Values:
    """Values in the conversion's float type, checked; blocks at a time, so that only the result takes memory.

    Args:
        dtype: safetensors name of the target type.
        place: file and name of the tensor, as messages begin.

    Raises:
        NonFiniteWeightsError: NaN or infinity in the source.
        DtypeRangeError: a value beyond float16's range.
    """
    source = values.array
    same = values.dtype == dtype
    target = source if same else np.empty(source.shape, NUMPY_DTYPES[dtype])
    for rows in row_blocks(*source.shape):
        if not is_finite(source[rows], values.dtype):
            raise NonFiniteWeightsError(f"{place} holds NaN or infinity; the checkpoint is damaged")
        if same:
            continue
        target[rows] = convert(source[rows], values.dtype, dtype)
        if not is_finite(target[rows], dtype):
            largest = float(np.abs(convert(source[rows], values.dtype, "F32")).max())
            limit = "float16's 65504; use --dtype bfloat16" if dtype == "F16" else f"the range of {dtype}"
            raise DtypeRangeError(f"{place} holds {largest:.3g}, beyond {limit}")
    return values if same else Values(target, dtype)


def quantize(
    values: Values,
    spec: QuantizationSpec,
    place: str,
    scratch: mx.array | None = None,
    rounding: Callable[[mx.array], dict[str, mx.array]] | None = None,
) -> dict[str, mx.array]:
    """Pack ``values`` ``[rows, columns]``: evaluated ``weight`` (uint32), ``scales`` and for affine ``biases``.

    The result is, bit for bit, what ``mx.quantize`` gives for the values in their own type: the rounding mlx-lm uses.
    ``place`` is the tensor's file and name, as messages begin.
    ``scratch`` is MLX memory (uint8) that ``values`` may lie at the start of; then they are not copied. ``rounding`` packs
    affine matrices another way: evaluated fields of the same names, shapes and types.

    Raises:
        ConversionError: the scales are not finite, because the weights span more than their type can hold.
    """
    dtype = MLX_DTYPES[values.dtype]
    if scratch is not None and np.may_share_memory(values.array, bytes_of(scratch)):
        weights = scratch[: values.nbytes].view(dtype).reshape(values.array.shape)
    else:
        weights = mx.array(values.array).view(dtype)
    named: dict[str, mx.array]
    if rounding is not None and spec.has_biases:
        named = rounding(weights)
    else:
        packed = mx.quantize(weights, group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
        named = dict(zip(fields_of(spec), packed, strict=True))
    mx.eval(named)
    if spec.has_biases:
        assert named["scales"].dtype == dtype
        if not mx.isfinite(named["scales"]).all().item():
            raise ConversionError(f"{place} has weights too large for {spec}; its scales overflow {values.dtype}")
    return named
