"""Root-mean-square normalisation."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module

__all__ = ["RMSNorm"]


class RMSNorm(Module):
    """``x / rms(x) * weight`` over the last axis (arXiv 1910.07467); the mean accumulates in float32."""

    def __init__(self, weight: mx.array, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self._eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self._eps)
