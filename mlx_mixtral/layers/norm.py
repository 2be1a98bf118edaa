"""Root-mean-square normalisation."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module

from mlx_mixtral.cache.choice import AdapterChoice
from mlx_mixtral.layers.runs import by_runs

__all__ = ["RMSNorm"]


class RMSNorm(Module):
    """``x / rms(x) * weight`` over the last axis (arXiv 1910.07467); the mean accumulates in float32.

    ``adapted`` are weights that adapters put in its place, by their numbers.
    """

    def __init__(self, weight: mx.array, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self._eps = eps
        self._adapted: dict[int, mx.array] = {}

    @property
    def adapted(self) -> dict[int, mx.array]:
        return self._adapted

    def __call__(self, x: mx.array, choice: AdapterChoice = None) -> mx.array:
        y = mx.fast.rms_norm(x, self.weight, self._eps)
        return by_runs(choice, self._adapted, y, lambda own, rows, _: mx.fast.rms_norm(x[rows], own, self._eps))
