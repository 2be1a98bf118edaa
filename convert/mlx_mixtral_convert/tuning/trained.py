"""One packed matrix that learns: codes, and a scale and a bias for each group, by Adam (arXiv 1412.6980).

``W = s round(z) + b``. The codes' positions ``z`` are real numbers between 0 and ``2^bits - 1`` and start where rounding gives
the codes they were packed with, at the distance that the weight has from its code. Rounding counts as the identity in the
gradient (arXiv 1308.3432), so that a code moves once enough has been gathered for it: ``dz = s dW``, ``ds = sum q dW`` and
``db = sum dW`` over the group. Scales and biases are used as their stored type holds them, from the first step on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral_convert.packing.codes import pack
from mlx_mixtral_convert.tuning.packed import PackedFields, dequantized

__all__ = [
    "JUDGE_EVERY",
    "MIN_TOKENS",
    "FixedMatrix",
    "Learner",
    "Rates",
    "TrainedMatrix",
    "is_judge",
    "make_learner",
    "shares_of_rate",
    "steps_for",
]

# Adam's decay of mean and mean square, and what keeps a silent weight's step finite.
MEAN_DECAY, SQUARE_DECAY, SILENT = 0.9, 0.99, 1e-12
# The farthest a weight may start from its code: at a half it would be another code.
HALF = 0.499
WARM_UP = 0.05
# How often anything is learned from.
MAX_PASSES = 4
# One of so many sequences judges.
JUDGE_EVERY = 8
# From fewer tokens nothing is learned.
MIN_TOKENS = 64


@dataclass(frozen=True)
class Rates:
    """How far a step goes at its largest: ``codes`` in codes, ``scales`` as a share of the matrix's mean scale."""

    codes: float
    scales: float


def shares_of_rate(steps: int) -> list[float]:
    """What share of the rate each step has: up over the first twentieth, then down along a half cosine."""
    return [
        min(1.0, (index + 1) / (WARM_UP * steps)) * (1 + math.cos(math.pi * index / steps)) / 2
        for index in range(steps)
    ]


def steps_for(most: int, count: int, batch: int) -> int:
    """How many steps of ``batch`` to take with ``count`` to learn from: what is seen too often is learned by heart."""
    return max(1, min(most, MAX_PASSES * count // batch))


def is_judge(sequences: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Which of these sequences, by number, nothing learns from: they tell whether what was learned holds for other text."""
    return np.equal(sequences % JUDGE_EVERY, JUDGE_EVERY - 1)


class _Adam:
    """A value and what Adam remembers of its gradient."""

    def __init__(self, value: mx.array, rate: float) -> None:
        self.value, self._rate = value, rate
        self._mean, self._square = mx.zeros_like(value), mx.zeros_like(value)

    def step(self, gradient: mx.array, share: float, taken: int) -> None:
        self._mean = MEAN_DECAY * self._mean + (1 - MEAN_DECAY) * gradient
        self._square = SQUARE_DECAY * self._square + (1 - SQUARE_DECAY) * mx.square(gradient)
        mean = self._mean / (1 - MEAN_DECAY**taken)
        root = mx.sqrt(self._square / (1 - SQUARE_DECAY**taken))
        self.value = self.value - (self._rate * share) * mean / (root + SILENT)

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        return self.value, self._mean, self._square


class Learner(Protocol):
    """A matrix that may learn."""

    @property
    def values(self) -> mx.array: ...

    def learn(self, gradient: mx.array, share: float) -> None: ...


@dataclass(frozen=True)
class FixedMatrix:
    """``values [rows, columns]`` float32 that stay: of a matrix that is not packed, or not in affine mode."""

    values: mx.array

    def learn(self, gradient: mx.array, share: float) -> None:
        """Nothing."""


class TrainedMatrix:
    """``weights [rows, columns]`` float32 in the packing of ``spec``, which begins as ``named`` has it.

    Args:
        named: packed ``weight``, ``scales`` and ``biases``; the type of the last two is the one they are stored in.
        rates: of codes and scales.
    """

    def __init__(self, weights: mx.array, named: PackedFields, spec: QuantizationSpec, rates: Rates) -> None:
        self.spec, self.shape, self._dtype, self._taken = spec, weights.shape, named["scales"].dtype, 0
        self._top = float(2**spec.bits - 1)
        scales, biases = (named[field].astype(mx.float32)[..., None] for field in ("scales", "biases"))
        groups = (*scales.shape[:-1], spec.group_size)
        ones, zeros = mx.ones(scales.shape[:-1]), mx.zeros(scales.shape[:-1])
        codes = mx.dequantize(named["weight"], ones, zeros, spec.group_size, spec.bits).reshape(groups)
        distance = (weights.reshape(groups) - biases) / mx.where(scales == 0, 1, scales) - codes
        places = mx.clip(codes + mx.clip(distance, -HALF, HALF), 0, self._top)
        size = float(np.abs(np.array(scales)).mean()) * rates.scales
        self._places = _Adam(places, rates.codes)
        self._scales, self._biases = _Adam(scales, size), _Adam(biases, size * self._top / 2)
        self._evaluate()

    @property
    def values(self) -> mx.array:
        """The matrix as its codes stand for it, float32 ``[rows, columns]``."""
        return (self._stored(self._scales) * self._codes + self._stored(self._biases)).reshape(self.shape)

    def learn(self, gradient: mx.array, share: float) -> None:
        """Take one step against ``gradient [rows, columns]``, with ``share`` of the rates."""
        self._taken += 1
        grouped = gradient.reshape(self._places.value.shape)
        codes, scales = self._codes, self._stored(self._scales)
        step = partial(_Adam.step, share=share, taken=self._taken)
        step(self._places, grouped * scales)
        self._places.value = mx.clip(self._places.value, 0, self._top)
        step(self._scales, (grouped * codes).sum(axis=-1, keepdims=True))
        step(self._biases, grouped.sum(axis=-1, keepdims=True))
        self._evaluate()

    def packed(self) -> dict[str, mx.array]:
        """Evaluated ``weight`` (uint32), ``scales`` and ``biases`` in the type they are stored in."""
        named = {
            "weight": pack(self._codes.reshape(self.shape), self.spec.bits),
            "scales": self._scales.value.squeeze(-1).astype(self._dtype),
            "biases": self._biases.value.squeeze(-1).astype(self._dtype),
        }
        mx.eval(named)
        return named

    @property
    def _codes(self) -> mx.array:
        return mx.round(self._places.value)

    def _stored(self, numbers: _Adam) -> mx.array:
        return numbers.value.astype(self._dtype).astype(mx.float32)

    def _evaluate(self) -> None:
        mx.eval(self._places.arrays, self._scales.arrays, self._biases.arrays)


def make_learner(
    weights: mx.array, packed: PackedFields, spec: QuantizationSpec | None, rates: Rates
) -> TrainedMatrix | FixedMatrix:
    """A matrix that learns where it is packed in affine mode."""
    if spec is None or not spec.has_biases:
        return FixedMatrix(dequantized(packed, spec))
    return TrainedMatrix(weights, packed, spec, rates)
