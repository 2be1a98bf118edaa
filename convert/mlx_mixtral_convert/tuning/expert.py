"""An expert learns to give what is missing of its layer's output, hidden units in blocks.

The expert's output is the sum over its hidden units: a block of them, which is rows of gate and up and columns of down, learns
while the others stand still. So memory is that of a block's matrices and their gradients, whatever the size of the expert.

    y = silu(x G^T) * (x U^T) D^T

The gradient is written out, for products then go the way all others do: by BLAS on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral_convert.calibration.layer import times
from mlx_mixtral_convert.tuning.products import to_input, to_matrix
from mlx_mixtral_convert.tuning.trained import Learner, shares_of_rate

__all__ = ["Lesson", "Swiglu", "learn"]

BATCH_TOKENS = 512

Indices = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Lesson:
    """Some tokens an expert learns from: its inputs ``x [N, D]``, their routing weights ``[N]``, what the weighted output
    should be, ``wanted [N, D]``, and how much the squared error of each token counts, ``[N]``.
    """

    x: mx.array
    routing: mx.array
    wanted: mx.array
    counts: mx.array


@dataclass(frozen=True)
class Swiglu:
    """Gate and up ``[F, D]`` and down ``[D, F]`` of a block of hidden units."""

    gate: Learner
    up: Learner
    down: Learner

    def __call__(self, x: mx.array) -> mx.array:
        gate, up, down = self._values()
        a, b = times(x, gate), times(x, up)
        return times(a * mx.sigmoid(a) * b, down)

    def loss(self, lesson: Lesson) -> float:
        """The squared error of the tokens of ``lesson``, as they count."""
        error = lesson.routing[:, None] * self(lesson.x) - lesson.wanted
        return float((lesson.counts * mx.square(error).sum(axis=-1)).sum())

    def step(self, lesson: Lesson, share: float) -> None:
        """One step against the squared error of the tokens of ``lesson``."""
        gate, up, down = self._values()
        x, routing = lesson.x, lesson.routing[:, None]
        a, b = times(x, gate), times(x, up)
        open_share = mx.sigmoid(a)
        inner = a * open_share * b
        error = routing * times(inner, down) - lesson.wanted
        d_out = error * routing * lesson.counts[:, None]
        d_inner = to_input(d_out, down)
        d_gate = d_inner * b * open_share * (1 + a * (1 - open_share))
        d_up = d_inner * a * open_share
        self.down.learn(to_matrix(d_out, inner), share)
        self.gate.learn(to_matrix(d_gate, x), share)
        self.up.learn(to_matrix(d_up, x), share)

    def _values(self) -> tuple[mx.array, mx.array, mx.array]:
        values = self.gate.values, self.up.values, self.down.values
        mx.eval(values)
        return values


def learn(
    block: Swiglu, lesson: Callable[[Indices], Lesson], count: int, steps: int, random: np.random.Generator
) -> None:
    """``steps`` steps, each with tokens that ``random`` draws from ``count``; ``lesson`` says what to learn of them."""
    for share in shares_of_rate(steps):
        block.step(lesson(random.integers(count, size=min(BATCH_TOKENS, count)).astype(np.int32)), share)
