"""All experts of a layer learn, one after the other, what is missing of the layer's output while the others stand still.

Held are one expert's matrices in full precision and those of all in packed form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx
import numpy as np

from mlx_mixtral.config.layout import Matrix
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral_convert.calibration.layer import Expert, Layer, times
from mlx_mixtral_convert.calibration.statistics import InputSum
from mlx_mixtral_convert.tuning.expert import BATCH_TOKENS, Lesson, Swiglu, hidden_blocks, learn
from mlx_mixtral_convert.tuning.packed import PackedFields, columns_of, dequantized, joined, rows_of
from mlx_mixtral_convert.tuning.trained import Rates, TrainedMatrix, make_learner, steps_for

__all__ = ["EXPERT_MATRICES", "ExpertsTuning", "PackedLayer", "Start"]

# By path, one for every expert.
PackedLayer = dict[str, list[PackedFields]]
Start = Callable[[Matrix, int, mx.array, InputSum | None], PackedFields]

EXPERT_MATRICES = ("gate_proj", "up_proj", "down_proj")
STEPS = 120
# By bits: at more of them there is less to make up for, and steps as large lose more than they gain.
RATES = {1: Rates(0.1, 0.01), 2: Rates(0.1, 0.01), 3: Rates(0.07, 0.007)}
RATES_FROM_4_BITS = Rates(0.05, 0.005)
# An expert that fewer tokens chose stays as it was packed first.
MIN_TOKENS = 64


class ExpertsTuning:
    """Experts of ``layer`` for states ``[N, D]`` before them, which should lead to ``wanted [N, D]`` after them.

    Args:
        specs: packings by path.
    """

    def __init__(
        self, layer: Layer, specs: Mapping[str, QuantizationSpec | None], states: mx.array, wanted: mx.array
    ) -> None:
        self.layer = layer
        self.matrices: list[Matrix] = [layer.matrices[name] for name in EXPERT_MATRICES]
        self._specs = [specs[matrix.path] for matrix in self.matrices]
        self.packed: PackedLayer = {matrix.path: [] for matrix in self.matrices}
        self._normed = layer.post_norm(states)
        self._routing = layer.route(self._normed)
        self._counts = 1 / mx.square(wanted).mean(axis=-1)
        self._missing = wanted - states
        mx.eval(self._counts, self._missing)

    def begin(self, expert: Expert, start: Start) -> None:
        """Pack one expert, before it learns. All of them come before the first learns."""
        tokens, routing = self._tokens(expert)
        x, share = self._normed[tokens], mx.square(routing)
        met = InputSum(expert.gate.shape[1], full=True)
        met.add(x, share)
        packed = [
            start(matrix, expert.index, weights, met)
            for matrix, weights in zip(self.matrices[:2], (expert.gate, expert.up), strict=True)
        ]
        gate, up = (dequantized(fields, spec) for fields, spec in zip(packed, self._specs[:2], strict=True))
        inner = expert(x, (gate, up)) if tokens.size else mx.zeros((0, expert.down.shape[1]))
        met = InputSum(expert.down.shape[1], full=True)
        met.add(inner, share)
        packed.append(start(self.matrices[2], expert.index, expert.down, met))
        for matrix, fields in zip(self.matrices, packed, strict=True):
            self.packed[matrix.path].append(fields)
        if tokens.size:
            given = times(inner, dequantized(packed[2], self._specs[2]))
            self._missing = self._missing.at[tokens].add(-routing[:, None] * given)
            mx.eval(self._missing)

    def learn(self, expert: Expert, random: np.random.Generator) -> None:
        tokens, routing = self._tokens(expert)
        if tokens.size < MIN_TOKENS or not any(spec is not None and spec.has_biases for spec in self._specs):
            return
        x, counts, missing = self._normed[tokens], self._counts[tokens], self._missing[tokens]
        steps = steps_for(STEPS, tokens.size, BATCH_TOKENS)
        fields = [self.packed[matrix.path][expert.index] for matrix in self.matrices]
        learned: list[list[PackedFields]] = [[], [], []]
        for units in hidden_blocks(len(expert.gate)):
            parts = _block(expert, fields, units)
            block = Swiglu(
                *(make_learner(*part, spec, _rates(spec)) for part, spec in zip(parts, self._specs, strict=True))
            )
            wanted = missing + routing[:, None] * block(x)
            learn(block, Lesson(x, routing, wanted, counts), steps, random)
            missing = wanted - routing[:, None] * block(x)
            mx.eval(missing)
            for found, learner, (_, first) in zip(learned, (block.gate, block.up, block.down), parts, strict=True):
                found.append(learner.packed() if isinstance(learner, TrainedMatrix) else first)
        for matrix, blocks, axis in zip(self.matrices, learned, (0, 0, 1), strict=True):
            whole = joined(blocks, axis)
            mx.eval(whole)
            self.packed[matrix.path][expert.index] = whole
        self._missing = self._missing.at[tokens].add(missing - self._missing[tokens])
        mx.eval(self._missing)

    def _tokens(self, expert: Expert) -> tuple[mx.array, mx.array]:
        return self._routing.tokens[expert.index], self._routing.weights[expert.index]


def _rates(spec: QuantizationSpec | None) -> Rates:
    return RATES_FROM_4_BITS if spec is None else RATES.get(spec.bits, RATES_FROM_4_BITS)


def _block(expert: Expert, fields: list[PackedFields], units: slice) -> list[tuple[mx.array, PackedFields]]:
    """Weights and packed fields of some hidden units: rows of gate and up, columns of down."""
    gate, up, down = fields
    return [
        (expert.gate[units], rows_of(gate, units)),
        (expert.up[units], rows_of(up, units)),
        (expert.down[:, units], columns_of(down, units, expert.down.shape[1])),
    ]
