"""All experts of a layer are packed, one after the other, and may then learn what is missing of its output.

Held are one expert's matrices in full precision and those of all in packed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Matrix
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.machine.allocator import give_back_freed
from mlx_mixtral_convert.calibration.layer import Layer, read_matrix, swiglu, times
from mlx_mixtral_convert.calibration.states import States, pieces
from mlx_mixtral_convert.calibration.statistics import InputSum
from mlx_mixtral_convert.tuning.correction import can_correct, corrected
from mlx_mixtral_convert.tuning.expert import BATCH_TOKENS, Lesson, Swiglu, learn
from mlx_mixtral_convert.tuning.packed import (
    HiddenUnits,
    PackedExpert,
    PackedFields,
    columns_of,
    dequantized,
    hidden_blocks,
    joined,
    rows_of,
)
from mlx_mixtral_convert.tuning.trained import (
    MIN_TOKENS,
    FixedMatrix,
    Rates,
    TrainedMatrix,
    is_judge,
    make_learner,
    steps_for,
)

__all__ = ["EXPERT_MATRICES", "ExpertsTuning", "PackedLayer", "Start"]

# By path, one for every expert.
PackedLayer = dict[str, list[PackedFields]]
Start = Callable[[Matrix, int, mx.array, InputSum | None], PackedFields]

EXPERT_MATRICES = ("gate_proj", "up_proj", "down_proj")
STEPS = 120
# By bits: at more of them there is less to make up for, and steps as large lose more than they gain. With twice these, the
# bundled checkpoint at 2.5 bits loses 0.0621 nats instead of 0.0599 on text written for validation.
RATES = {1: Rates(0.05, 0.005), 2: Rates(0.05, 0.005), 3: Rates(0.035, 0.0035)}
RATES_FROM_4_BITS = Rates(0.025, 0.0025)


class ExpertsTuning:
    """Experts of ``layer`` for ``states`` after attention.

    Args:
        specs: packings by path.
        missing: what is to be added to the states beside what the unquantised experts give; in the end, beside the packed ones.
        counts: how much each token's squared error counts, float32 ``[N]``.
        folder: where hidden units are meanwhile, as for ``States``.
        learns: whether ``learn`` is to follow.
    """

    def __init__(
        self,
        layer: Layer,
        specs: Mapping[str, QuantizationSpec | None],
        states: States,
        missing: States,
        counts: npt.NDArray[np.float32],
        folder: Path | None = None,
        *,
        learns: bool,
    ) -> None:
        self.layer = layer
        self.matrices: list[Matrix] = [layer.matrices[name] for name in EXPERT_MATRICES]
        self._specs = [specs[matrix.path] for matrix in self.matrices]
        self.packed: PackedLayer = {matrix.path: [] for matrix in self.matrices}
        self._states, self._missing, self._counts = states, missing, counts
        self._routing, self._folder, self._learns = layer.route_all(states), folder, learns

    def begin(self, expert: int, start: Start) -> None:
        """Pack one expert, before it learns. All of them come before the first learns."""
        met = InputSum(self.matrices[0].in_features, full=True)
        for _, x, weights in self._inputs(expert):
            met.add(x, mx.square(weights[:, 0]))
        packed = [start(matrix, expert, self._read(matrix, expert), met) for matrix in self.matrices[:2]]
        hidden = HiddenUnits(self.matrices[2].in_features, len(self._routing.tokens[expert]), self._folder)
        down = self._corrected(expert, packed, hidden)
        met = InputSum(self.matrices[2].in_features, full=True)
        for piece, (_, weights) in self._pieces(expert):
            met.add(hidden.of(piece), mx.square(weights[:, 0]))
        packed.append(start(self.matrices[2], expert, down, met))
        for matrix, fields in zip(self.matrices, packed, strict=True):
            self.packed[matrix.path].append(fields)
        self._lose(expert, packed[2], down, hidden)
        hidden.close()

    def _corrected(self, expert: int, packed: Sequence[PackedFields], hidden: HiddenUnits) -> mx.array:
        """Down, for what gate and up and all packed before them have lost, and what it then leaves of that in ``missing``.

        ``hidden`` gets what the packed gate and up make of the expert's tokens.
        """
        give_back_freed()  # what gate and up took
        weights = [read_matrix(self.layer.source, matrix, expert, as_stored=True) for matrix in self.matrices]
        whole = PackedExpert(hidden.units, packed, self._specs)
        for units in hidden_blocks(hidden.units):
            gate, up, down = _floats(weights, units)
            for tokens, x, shares in self._inputs(expert):
                inner = whole.some_hidden(x, units)
                hidden.append(inner)
                lost = swiglu(times(x, gate), times(x, up)) - inner
                self._missing.add(tokens, shares * times(lost, down))
        found = weights[2].astype(mx.float32)
        del weights
        if not can_correct(self._specs[2]):
            return found

        def met(units: slice) -> Iterator[tuple[npt.NDArray[np.int32], mx.array]]:
            for piece, (tokens, shares) in self._pieces(expert):
                yield tokens, shares * hidden.of(piece, units)

        return corrected(np.array(found), hidden_blocks(hidden.units), met, self._missing, apart=self._learns)

    def _lose(self, expert: int, packed: PackedFields, down: mx.array, hidden: HiddenUnits) -> None:
        """Set down as missing what ``down [D, F]`` was to give and, packed, does not."""
        for units in hidden_blocks(hidden.units):
            given = dequantized(columns_of(packed, units, hidden.units), self._specs[2])
            lost = mx.contiguous(down[:, units] - given)
            for piece, (tokens, shares) in self._pieces(expert):
                self._missing.add(tokens, shares * times(hidden.of(piece, units), lost))

    def learn(self, expert: int, random: np.random.Generator) -> None:
        """Let an expert learn, block by block; a block keeps what it learned where that is better on text it has not seen."""
        own, routing = self._routing.tokens[expert], mx.array(self._routing.weights[expert])
        judges = is_judge(own // self._states.length)
        seen, unseen = np.flatnonzero(~judges), np.flatnonzero(judges)
        if (
            len(seen) < MIN_TOKENS
            or not len(unseen)
            or not any(spec is not None and spec.has_biases for spec in self._specs)
        ):
            return
        counts = mx.array(self._counts[own])

        def lesson(places: npt.NDArray[np.int_]) -> Lesson:
            tokens, rows = own[places], mx.array(places.astype(np.int32))
            x = self.layer.post_norm(self._states.take(tokens))
            return Lesson(x, routing[rows], self._missing.take(tokens), counts[rows])

        def loss(block: Swiglu) -> float:
            return sum(block.loss(lesson(unseen[piece])) for piece in pieces(len(unseen)))

        steps = steps_for(STEPS, len(seen), BATCH_TOKENS)
        fields = [self.packed[matrix.path][expert] for matrix in self.matrices]
        weights = [read_matrix(self.layer.source, matrix, expert, as_stored=True) for matrix in self.matrices]
        learned: list[list[PackedFields]] = [[], [], []]
        for units in hidden_blocks(self.matrices[0].out_features):
            parts = _block(weights, fields, units)
            block = Swiglu(
                *(make_learner(*part, spec, _rates(spec)) for part, spec in zip(parts, self._specs, strict=True))
            )
            # While it learns, what the block gives is missing too.
            self._add(expert, block, 1)
            before = loss(block)
            learn(block, lambda drawn: lesson(seen[drawn]), len(seen), steps, random)
            if not loss(block) < before:
                block = _fixed([first for _, first in parts], self._specs)
            self._add(expert, block, -1)
            for found, learner, (_, first) in zip(learned, (block.gate, block.up, block.down), parts, strict=True):
                found.append(learner.packed() if isinstance(learner, TrainedMatrix) else first)
        for matrix, blocks, axis in zip(self.matrices, learned, (0, 0, 1), strict=True):
            whole = joined(blocks, axis)
            mx.eval(whole)
            self.packed[matrix.path][expert] = whole

    def _read(self, matrix: Matrix, expert: int) -> mx.array:
        return read_matrix(self.layer.source, matrix, expert)

    def _add(self, expert: int, block: Swiglu, times_given: int) -> None:
        for tokens, x, weights in self._inputs(expert):
            self._missing.add(tokens, times_given * weights * block(x))

    def _inputs(self, expert: int) -> Iterator[tuple[npt.NDArray[np.int32], mx.array, mx.array]]:
        """Of an expert's tokens, some at a time: which they are, what the expert meets, and their weights ``[n, 1]``."""
        for tokens, weights in self._routing.pieces(expert):
            yield tokens, self.layer.post_norm(self._states.take(tokens)), weights

    def _pieces(self, expert: int) -> Iterator[tuple[slice, tuple[npt.NDArray[np.int32], mx.array]]]:
        """The same, and where they are among the expert's, without what it meets."""
        return zip(pieces(len(self._routing.tokens[expert])), self._routing.pieces(expert), strict=True)


def _rates(spec: QuantizationSpec | None) -> Rates:
    return RATES_FROM_4_BITS if spec is None else RATES.get(spec.bits, RATES_FROM_4_BITS)


def _fixed(fields: Sequence[PackedFields], specs: Sequence[QuantizationSpec | None]) -> Swiglu:
    """A block that does not learn."""
    return Swiglu(*(FixedMatrix(dequantized(packed, spec)) for packed, spec in zip(fields, specs, strict=True)))


def _floats(weights: Sequence[mx.array], units: slice) -> list[mx.array]:
    """Of gate, up and down some hidden units, float32."""
    own = weights[0][units], weights[1][units], mx.contiguous(weights[2][:, units])
    found = [each.astype(mx.float32) for each in own]
    mx.eval(found)
    return found


def _block(
    weights: Sequence[mx.array], fields: Sequence[PackedFields], units: slice
) -> list[tuple[mx.array, PackedFields]]:
    """Weights (float32) and packed fields of some hidden units: rows of gate and up, columns of down."""
    gate, up, down = _floats(weights, units)
    return [
        (gate, rows_of(fields[0], units)),
        (up, rows_of(fields[1], units)),
        (down, columns_of(fields[2], units, weights[2].shape[1])),
    ]
