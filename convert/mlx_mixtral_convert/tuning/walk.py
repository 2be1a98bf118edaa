"""A text through the unquantised model and through the one that is being packed, layer by layer, side by side.

Every part is packed for the states that the packed layers before it leave, and corrected to give what the unquantised model has
there: so it makes up for what earlier parts lost, as far as it can see that. First attention, whose output should lead to the
unquantised states before the experts; then the experts. What learns does so with the same aim; a token's squared error then
counts by the inverse of the mean square of its state, for the norm that follows divides by that. One in eight sequences judges:
no correction is computed and nothing learned from these, and what is worse on them stays as it was before.

Held are one layer in packed form, and attention's matrices or one expert in full precision. Both models' states and as much
again are on the disk: 1.1 GB for 16,384 tokens of 8x7B, 4.3 GB for 65,536.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import matrices, norms
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.layers.rotary import Rotary
from mlx_mixtral.machine.allocator import give_back_freed
from mlx_mixtral_convert.calibration.layer import (
    ATTEND_AT_ONCE,
    Layer,
    pass_experts,
    read_matrix,
    read_norm,
)
from mlx_mixtral_convert.calibration.states import States, pieces
from mlx_mixtral_convert.calibration.statistics import InputSum
from mlx_mixtral_convert.calibration.walk import check_memory, embed, embedded
from mlx_mixtral_convert.sources.base import TensorSource
from mlx_mixtral_convert.tuning.attention import tune_attention
from mlx_mixtral_convert.tuning.correction import can_correct, corrected
from mlx_mixtral_convert.tuning.experts import EXPERT_MATRICES, ExpertsTuning, PackedLayer, Start
from mlx_mixtral_convert.tuning.packed import PackedExpert, dequantized, hidden_blocks

__all__ = ["PackedLayer", "PackingWalk", "Told", "attention_copies", "told_nothing"]

Told = Callable[[int, float], None]
"""Told the layer at hand, and the share of the work on it that is done. What it raises ends the walk."""

# Numbers held for each of attention's while it is packed: the source's, the packed ones, one on its way.
PACKED_COPIES = 3
# The same while all of it learns: codes, what Adam remembers, values, a gradient, one on its way.
LEARNING_COPIES = 6
# What parts of a layer take beside the packing of one expert: all before the experts, with and without learning, the learning
# of an expert, and the passing of what was packed. On the bundled checkpoint, and nearly so at the width of 8x7B.
FIRST_WORK, LEARNED_FIRST_WORK, LEARNED_EXPERT_WORK, PASSING_WORK = 2.5, 10.0, 1.5, 1.0


def told_nothing(layer: int, share: float) -> None:
    """For walks that nobody waits for."""


def attention_copies(*, learns: bool) -> int:
    """How many numbers a walk holds for each of attention's."""
    return LEARNING_COPIES if learns else PACKED_COPIES


class PackingWalk:
    """States of ``tokens [B, L]`` in both models, before layer ``next_layer``.

    Args:
        specs: the packing of every matrix by path, None for unquantised.
        start: packs one expert's float32 matrix, as it is before it learns; told its inputs, but for the embedding's.
        folder: where the states are, as for ``States``.
        told: as it goes: when a layer begins, before its experts and after each, and at its end.
        learns: whether what was packed then learns.
    """

    def __init__(
        self,
        source: TensorSource,
        tokens: npt.NDArray[np.int32],
        specs: Mapping[str, QuantizationSpec | None],
        start: Start,
        folder: Path | None = None,
        told: Told = told_nothing,
        *,
        learns: bool,
    ) -> None:
        self.source, self.config, self.specs, self._start = source, source.config, specs, start
        self._learns, self._told, self._done = learns, told, 0.0
        self._first_work = LEARNED_FIRST_WORK if learns else FIRST_WORK
        experts = max(1, self.config.num_local_experts) * (1 + LEARNED_EXPERT_WORK * learns)
        self._layer_work = self._first_work + experts + PASSING_WORK
        self._rotary = Rotary(self.config.rope, self.config.head_dim)
        check_memory(source, copies=attention_copies(learns=learns))
        give_back_freed()
        self.next_layer, self._folder = 0, folder
        self.true = embedded(tokens, read_matrix(source, next(iter(matrices(self.config)))), folder)
        self.ours = States(self.true.length, self.true.width, folder)
        self._embed(tokens)
        # The states before the experts, or what the experts still have to add.
        self._other = States(self.true.length, self.true.width, folder)

    def step(self) -> PackedLayer:
        """Pass the next layer; its packed matrices."""
        give_back_freed()  # what the layer before took
        self._begin()
        layer = Layer(self.source, self.next_layer, self._rotary)
        random = np.random.default_rng(layer.index)
        layer.attend_all(self.true)
        found = self._attention(layer, random)
        layer.attend_all(self.ours, self._values(layer, found, "qkvo"))
        layer.attention.clear()  # before its experts are held
        self._pass_experts(layer)
        counts = self._missing(layer)
        self._did(self._first_work)
        tuning = ExpertsTuning(layer, self.specs, self.ours, self._other, counts, self._folder, learns=self._learns)
        experts = range(layer.matrices["gate_proj"].num_experts or 1)
        for expert in experts:
            give_back_freed()  # what the expert before took
            tuning.begin(expert, self._start)
            self._did(1.0)
        for expert in experts if self._learns else ():
            give_back_freed()
            tuning.learn(expert, random)
            self._did(LEARNED_EXPERT_WORK)
        found |= tuning.packed
        self._pass_packed(layer, found)
        self._did(PASSING_WORK)
        self.next_layer += 1
        return found

    def skip(self, packed: PackedLayer) -> None:
        """Pass the next layer, which was packed before: this came of it."""
        give_back_freed()
        self._begin()
        layer = Layer(self.source, self.next_layer, self._rotary)
        layer.attend_all(self.true)
        layer.attend_all(self.ours, self._values(layer, packed, "qkvo"))
        layer.attention.clear()
        self._pass_experts(layer)
        self._pass_packed(layer, packed)
        self.next_layer += 1

    def head_sum(self) -> InputSum:
        """The head's inputs in the packed model, after the last layer."""
        found, norm = InputSum(self.config.hidden_size, full=True), read_norm(self.source, list(norms(self.config))[-1])
        for piece in pieces(self.ours.tokens):
            found.add(norm(self.ours.rows(piece)))
        return found

    def close(self) -> None:
        """Let go of the states."""
        for states in (self.true, self.ours, self._other):
            states.close()

    def _begin(self) -> None:
        self._done = 0.0
        self._told(self.next_layer, 0.0)

    def _did(self, work: float) -> None:
        self._done += work
        self._told(self.next_layer, self._done / self._layer_work)

    def _pass_experts(self, layer: Layer) -> None:
        """True states through true experts."""
        self._other.fill(self.true.count, self.true.rows)
        pass_experts(layer, layer.experts(), self._other, self.true)

    def _pass_packed(self, layer: Layer, packed: PackedLayer) -> None:
        """Our states through packed experts."""
        self._other.fill(self.ours.count, self.ours.rows)
        held = [layer.matrices[name] for name in EXPERT_MATRICES]
        specs, routing = [self.specs[matrix.path] for matrix in held], layer.route_all(self._other)
        for index, fields in enumerate(zip(*(packed[matrix.path] for matrix in held), strict=True)):
            expert = PackedExpert(held[0].out_features, fields, specs)
            for tokens, weights in routing.pieces(index):
                self.ours.add(tokens, weights * expert(layer.post_norm(self._other.take(tokens))))

    def _missing(self, layer: Layer) -> npt.NDArray[np.float32]:
        """Set down what unquantised experts leave of what our states after attention lack; how much each token counts."""
        counts = [np.zeros(0, np.float32)]

        def beyond(piece: slice) -> mx.array:
            wanted = self.true.rows(piece)
            counts.append(np.array(1 / mx.square(wanted).mean(axis=-1)))
            return self.ours.rows(piece) - wanted

        self._other.fill(self.true.count, beyond)
        pass_experts(layer, layer.experts(), self.ours, self._other)
        self._other.fill(self.true.count, lambda piece: -self._other.rows(piece))
        return np.concatenate(counts)

    def _attention(self, layer: Layer, random: np.random.Generator) -> PackedLayer:
        """Attention's matrices where ``true`` has passed it already."""
        own = {name: layer.matrices[f"{name}_proj"] for name in layer.attention}
        specs = {name: self.specs[matrix.path] for name, matrix in own.items()}
        met = InputSum(own["q"].in_features, full=True)
        for piece in pieces(self.ours.tokens):
            met.add(layer.input_norm(self.ours.rows(piece)))
        packed = {name: self._start(own[name], 0, layer.attention[name], met) for name in "qkv"}
        met = self._correct_output(layer, {name: dequantized(packed[name], specs[name]) for name in "qkv"})
        packed["o"] = self._start(own["o"], 0, layer.attention["o"], met)
        if self._learns:
            packed = tune_attention(layer, self._rotary, packed, specs, self.ours, self.true, random)
        return {own[name].path: [fields] for name, fields in packed.items()}

    def _correct_output(self, layer: Layer, held: dict[str, mx.array]) -> InputSum:
        """Correct o for what the packed q, k and v that are ``held``, and all before them, have lost; what it meets.

        An o that is not packed, or not in affine mode, stays as it is, and its packing needs no input.
        """
        matrix, weights = layer.matrices["o_proj"], layer.attention["o"]
        if not can_correct(self.specs[matrix.path]):
            return InputSum(matrix.in_features)
        met = InputSum(matrix.in_features, full=True)
        inputs = States(self.ours.length, matrix.in_features, self._folder)

        def see(_: mx.array, o_input: mx.array) -> None:
            inputs.append(o_input)
            met.add(o_input)

        self._other.fill(0, self.true.rows)
        for start in range(0, self.ours.count, ATTEND_AT_ONCE):
            end = start + ATTEND_AT_ONCE
            given = layer.attend(self.ours.sequences(start, end), held, see)
            self._other.append(self.true.sequences(start, end) - given)

        def some(columns: slice) -> Iterator[tuple[npt.NDArray[np.int32], mx.array]]:
            for piece in pieces(inputs.tokens):
                yield np.arange(piece.start, piece.stop, dtype=np.int32), inputs.rows(piece)[:, columns]

        blocks = hidden_blocks(matrix.in_features)
        layer.attention["o"] = corrected(np.array(weights), blocks, some, self._other, apart=self._learns)
        inputs.close()
        return met

    def _values(self, layer: Layer, packed: PackedLayer, names: str) -> dict[str, mx.array]:
        paths = {name: layer.matrices[f"{name}_proj"].path for name in names}
        values = {name: dequantized(packed[path][0], self.specs[path]) for name, path in paths.items()}
        mx.eval(values)
        return values

    def _embed(self, tokens: npt.NDArray[np.int32]) -> None:
        """Only the rows in use are packed: the packing of a row does not depend on those beside it."""
        matrix = next(iter(matrices(self.config)))
        used, places = np.unique(tokens, return_inverse=True)
        rows = embed(self.source, used.astype(np.int32))
        values = dequantized(self._start(matrix, 0, rows, None), self.specs[matrix.path])
        flat = places.reshape(-1).astype(np.int32)
        self.ours.fill(len(tokens), lambda piece: values[mx.array(flat[piece])])
