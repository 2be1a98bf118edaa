"""The two products of a gradient through ``y = x W^T``, by whom all others are computed."""

from __future__ import annotations

import mlx.core as mx

from mlx_mixtral_convert.calibration.layer import times

__all__ = ["to_input", "to_matrix"]


def to_input(d_out: mx.array, weight: mx.array) -> mx.array:
    """``dx = dy W`` for ``dy [..., out]`` and ``W [out, in]``."""
    # BLAS reads memory as it lies.
    return times(d_out, mx.contiguous(weight.T))


def to_matrix(d_out: mx.array, x: mx.array) -> mx.array:
    """``dW = dy^T x``, ``[out, in]``, summed over all tokens of ``dy [..., out]`` and ``x [..., in]``."""
    flat, inputs = d_out.reshape(-1, d_out.shape[-1]), x.reshape(-1, x.shape[-1])
    return times(mx.contiguous(flat.T), mx.contiguous(inputs.T))
