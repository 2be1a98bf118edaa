"""How codes, scales and biases are chosen at a given packing: plainly, by search, or with error compensation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_mixtral.config.layout import Matrix
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral_convert.calibration.file import Calibration
from mlx_mixtral_convert.calibration.statistics import InputSum, input_name
from mlx_mixtral_convert.calibration.walk import Sums, Walk
from mlx_mixtral_convert.packing.gptq import gptq
from mlx_mixtral_convert.packing.search import search
from mlx_mixtral_convert.sources.base import TensorSource

__all__ = ["Gptq", "Rounder", "Search", "make_rounder"]

# An expert that saw fewer tokens borrows the rest of its weight from the average over the layer's experts.
PRIOR_TOKENS = 64
# Mean squares are raised by this share of their average: an input silent in the text may speak elsewhere.
FLOOR = 0.01
# Second moments from fewer tokens than this share of the inputs say more about the text than about the expert.
MIN_TOKENS_PER_INPUT = 0.25


class Rounder(Protocol):
    """Packs one expert's matrix in affine mode; scales and biases come in the type of ``weights``."""

    def pack(self, matrix: Matrix, expert: int, weights: mx.array, spec: QuantizationSpec) -> dict[str, mx.array]: ...


class Search:
    """Scales and biases by search, weighted by ``calibration``'s mean squares where there is one."""

    def __init__(self, calibration: Calibration | None = None) -> None:
        self.calibration = calibration

    def pack(self, matrix: Matrix, expert: int, weights: mx.array, spec: QuantizationSpec) -> dict[str, mx.array]:
        return search(weights, spec, self.importance(matrix, expert))

    def importance(self, matrix: Matrix, expert: int) -> mx.array | None:
        # An embedding is looked up, not multiplied: every column of a row counts the same.
        if self.calibration is None or matrix.part in ("router", "embedding"):
            return None
        name = input_name(matrix)
        squares, routed = self.calibration.mean_squares[name], self.calibration.routed[name]
        share = np.float32(routed[expert] / (routed[expert] + PRIOR_TOKENS))
        average = np.average(squares, axis=0, weights=routed) if routed.sum() else squares.mean(axis=0)
        mixed = share * squares[expert] + (1 - share) * average.astype(np.float32)
        if not (mean := float(mixed.mean())):
            return None
        return mx.array(mixed + np.float32(FLOOR * mean))


class Gptq:
    """Error compensation with one Hessian an expert, gathered layer by layer as the conversion gets to them.

    The Hessians of one layer are held: 0.7 GB for 8x7B, beside the hidden states of the calibration text. An expert
    that saw too few tokens is packed by search.
    """

    def __init__(self, calibration: Calibration, open_source: Callable[[], TensorSource]) -> None:
        self._search = Search(calibration)
        self._calibration, self._open = calibration, open_source
        self._source: TensorSource | None = None
        self._walk: Walk | None = None
        self._sums: Sums = {}
        self._layer: int | None = -1

    def pack(self, matrix: Matrix, expert: int, weights: mx.array, spec: QuantizationSpec) -> dict[str, mx.array]:
        if matrix.part == "embedding":
            return self._search.pack(matrix, expert, weights, spec)
        found = self._sum(matrix, expert)
        if found.tokens < MIN_TOKENS_PER_INPUT * min(found.columns, 1024):
            return self._search.pack(matrix, expert, weights, spec)
        return gptq(weights, spec, found.hessian)

    def close(self) -> None:
        if self._source is not None:
            self._source.close()

    def _sum(self, matrix: Matrix, expert: int) -> InputSum:
        if self._walk is None:
            self._source = self._open()
            self._walk = Walk(self._source, self._calibration.tokens, full=True)
        while self._layer != matrix.layer:
            if self._walk.next_layer < self._walk.config.num_hidden_layers:
                layer, self._sums = self._walk.step()
                self._layer = layer.index
            else:
                self._layer, self._sums = None, self._walk.head_sum()
        return self._sums[input_name(matrix)][expert]


def make_rounder(
    method: str, calibration: Calibration | None, open_source: Callable[[], TensorSource]
) -> Search | Gptq | None:
    """The rounder for a recipe's ``rounding``; None for ``plain``.

    Raises:
        InvalidRequestError: GPTQ without a calibration.
    """
    if method == "search":
        return Search(calibration)
    if method == "gptq":
        if calibration is None:
            raise InvalidRequestError("rounding gptq needs a calibration file; make one with mlx-mixtral calibrate")
        return Gptq(calibration, open_source)
    return None
