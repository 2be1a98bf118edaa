"""How codes, scales and biases are chosen at a given packing: by search, with error compensation, or by learning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_mixtral.config.layout import Matrix, fields_of, matrices, module_tensor
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.machine.allocator import give_back_freed
from mlx_mixtral.weights.dtypes import MLX_DTYPES
from mlx_mixtral_convert.calibration.file import Calibration
from mlx_mixtral_convert.calibration.layer import read_matrix
from mlx_mixtral_convert.calibration.statistics import InputSum, input_name
from mlx_mixtral_convert.output.plan import Plan
from mlx_mixtral_convert.packing.gptq import gptq
from mlx_mixtral_convert.packing.search import search
from mlx_mixtral_convert.sources.base import TensorSource
from mlx_mixtral_convert.tuning.experts import PackedLayer
from mlx_mixtral_convert.tuning.packed import PackedFields
from mlx_mixtral_convert.tuning.trained import JUDGE_EVERY
from mlx_mixtral_convert.tuning.walk import PackingWalk, Told, told_nothing

__all__ = ["LayerByLayer", "Rounder", "Search", "make_rounder"]

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


class LayerByLayer:
    """Error compensation along two walks of the text, one through the unquantised layers and one through the packed ones.

    Embedding and router are packed by search; the head for the states that the packed layers leave.

    Args:
        learns: codes, scales and biases then learn, too.
    """

    def __init__(
        self, calibration: Calibration, open_source: Callable[[], TensorSource], plan: Plan, *, learns: bool
    ) -> None:
        self._search, self._calibration, self._open, self._plan = Search(calibration), calibration, open_source, plan
        self.learns = learns
        self._source: TensorSource | None = None
        self._walk: PackingWalk | None = None
        self._layer: PackedLayer = {}
        self._head: InputSum | None = None
        self.finished: Mapping[int, Path] = {}
        """The shards of layers that an earlier run finished."""
        self.folder: Path | None = None
        """Where hidden states are meanwhile, as for ``States``."""
        self.told: Told = told_nothing
        """Told how far the walk is."""

    def pack(self, matrix: Matrix, expert: int, weights: mx.array, spec: QuantizationSpec) -> dict[str, mx.array]:
        if matrix.part in ("embedding", "router"):
            return self._search.pack(matrix, expert, weights, spec)
        walk = self._walk_to(matrix.layer)
        if matrix.layer is not None:
            return dict(self._layer[matrix.path][expert])
        if self._head is None:
            self._layer = {}  # the last one is written
            give_back_freed()
            self._head = walk.head_sum()
        return self._pack(matrix, expert, weights, spec, self._head)

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
        if self._walk is not None:
            self._walk.close()

    def _walk_to(self, layer: int | None) -> PackingWalk:
        """Past ``layer``, or all of them."""
        if self._walk is None or self._source is None:
            self._source = self._open()
            specs = {path: None if self._plan.keeps(path) else spec for path, spec in self._plan.specs.items()}
            self._walk = PackingWalk(
                self._source, self._calibration.tokens, specs, self._start, self.folder, self.told, learns=self.learns
            )
        last = self._plan.config.num_hidden_layers - 1 if layer is None else layer
        while self._walk.next_layer <= last:
            self._layer = {}  # before the next one is held
            if (file := self.finished.get(self._walk.next_layer)) is None:
                self._layer = self._walk.step()
            else:
                self._walk.skip(self._read(self._source, self._walk.next_layer, file))
        return self._walk

    def _start(self, matrix: Matrix, expert: int, weights: mx.array, inputs: InputSum | None) -> PackedFields:
        spec, typed = self._plan.specs[matrix.path], weights.astype(MLX_DTYPES[self._plan.dtype])
        if spec is None or self._plan.keeps(matrix.path):
            return {"weight": typed if spec is None else weights}
        if spec.has_biases:
            return self._pack(matrix, expert, typed, spec, inputs)
        packed = mx.quantize(typed, group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
        return dict(zip(fields_of(spec), packed, strict=True))

    def _pack(
        self, matrix: Matrix, expert: int, weights: mx.array, spec: QuantizationSpec, inputs: InputSum | None
    ) -> dict[str, mx.array]:
        if inputs is None or not _says_enough(inputs):
            return self._search.pack(matrix, expert, weights, spec)
        return gptq(weights, spec, inputs.hessian)

    def _read(self, source: TensorSource, layer: int, file: Path) -> PackedLayer:
        """A finished layer as its shard has it."""
        held, found = mx.load(str(file)), PackedLayer()
        assert isinstance(held, dict)
        for matrix in matrices(source.config):
            if matrix.layer != layer or matrix.part == "router":
                continue
            experts = range(matrix.num_experts or 1)
            if self._plan.keeps(matrix.path):
                found[matrix.path] = [{"weight": read_matrix(source, matrix, expert)} for expert in experts]
                continue
            fields = {field: held[module_tensor(matrix, field)] for field in fields_of(self._plan.specs[matrix.path])}
            stacked = {name: array.reshape(len(experts), -1, array.shape[-1]) for name, array in fields.items()}
            found[matrix.path] = [{name: array[e] for name, array in stacked.items()} for e in experts]
        return found


def _says_enough(found: InputSum) -> bool:
    return found.tokens >= MIN_TOKENS_PER_INPUT * min(found.columns, 1024)


def make_rounder(
    method: str, calibration: Calibration | None, open_source: Callable[[], TensorSource], plan: Plan
) -> Search | LayerByLayer | None:
    """The rounder for a recipe's ``rounding``; None for ``plain``.

    Raises:
        InvalidRequestError: GPTQ or tuning without a calibration, tuning with too little text.
    """
    if method == "search":
        return Search(calibration)
    if method in ("gptq", "tuned"):
        if calibration is None:
            raise InvalidRequestError(
                f"rounding {method} needs a calibration file; make one with mlx-mixtral calibrate"
            )
        sequences, length = calibration.tokens.shape
        if method == "tuned" and sequences < JUDGE_EVERY:
            raise InvalidRequestError(
                f"rounding tuned needs {JUDGE_EVERY} sequences of text, one of them to judge what was learned, and the "
                f"calibration has {sequences}; make one with mlx-mixtral calibrate --tokens {JUDGE_EVERY * length}, or use gptq"
            )
        return LayerByLayer(calibration, open_source, plan, learns=method == "tuned")
    return None
