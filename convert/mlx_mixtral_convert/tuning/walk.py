"""A text through the unquantised model and through the one that is being packed, layer by layer, side by side.

Every part learns on the states that the packed layers before it leave, and to give what the unquantised model has there: so it
makes up for what earlier parts lost, as far as it can see that. First attention, whose output should lead to the unquantised
states before the experts; then the experts. A token's squared error counts by the inverse of the mean square of its state, for
the norm that follows divides by that.

Held are both models' states (``5 x tokens x hidden x 4`` bytes at the most: 1.3 GB for 16,384 tokens of 8x7B), one layer in
packed form, and attention's matrices or one expert in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import matrices, norms
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.layers.rotary import Rotary
from mlx_mixtral_convert.calibration.layer import Expert, Layer, read_norm, times
from mlx_mixtral_convert.calibration.statistics import InputSum
from mlx_mixtral_convert.calibration.walk import check_memory, embed
from mlx_mixtral_convert.sources.base import TensorSource
from mlx_mixtral_convert.tuning.attention import tune_attention
from mlx_mixtral_convert.tuning.experts import EXPERT_MATRICES, ExpertsTuning, PackedLayer, Start
from mlx_mixtral_convert.tuning.packed import dequantized

__all__ = ["PackedLayer", "TuningWalk"]

GateUpDown = tuple[mx.array, mx.array, mx.array]


class TuningWalk:
    """States ``[B, L, D]`` of ``tokens [B, L]`` in both models, before layer ``next_layer``.

    Args:
        specs: the packing of every matrix by path, None for unquantised.
        start: packs one expert's float32 matrix, as it is before it learns; told its inputs, but for the embedding's.
    """

    def __init__(
        self,
        source: TensorSource,
        tokens: npt.NDArray[np.int32],
        specs: Mapping[str, QuantizationSpec | None],
        start: Start,
    ) -> None:
        self.source, self.config, self.specs, self._start = source, source.config, specs, start
        self._rotary = Rotary(self.config.rope, self.config.head_dim)
        check_memory(source, tokens.size, states=5, copies=5)
        self.next_layer = 0
        self.true, self.ours = embed(source, tokens), self._embedded(tokens)

    def tune(self) -> PackedLayer:
        """Pass the next layer; its packed matrices, tuned."""
        layer = Layer(self.source, self.next_layer, self._rotary)
        random = np.random.default_rng(layer.index)
        wanted = layer.attend(self.true)
        found = self._attention(layer, wanted, random)
        h = layer.attend(self.ours, self._values(layer, found, "qkvo"))
        self.true = self._after_experts(layer, wanted, lambda expert: (expert.gate, expert.up, expert.down))
        width = h.shape[-1]
        tuning = ExpertsTuning(layer, self.specs, h.reshape(-1, width), self.true.reshape(-1, width))
        for expert in layer.experts():
            tuning.begin(expert, self._start)
        for expert in layer.experts():
            tuning.learn(expert, random)
        found |= tuning.packed
        self._finish(layer, h, found)
        return found

    def skip(self, packed: PackedLayer) -> None:
        """Pass the next layer, which was tuned before: this came of it."""
        layer = Layer(self.source, self.next_layer, self._rotary)
        wanted = layer.attend(self.true)
        self.true = self._after_experts(layer, wanted, lambda expert: (expert.gate, expert.up, expert.down))
        self._finish(layer, layer.attend(self.ours, self._values(layer, packed, "qkvo")), packed)

    def head_sum(self) -> InputSum:
        """The head's inputs in the packed model, after the last layer."""
        found = InputSum(self.config.hidden_size, full=True)
        found.add(read_norm(self.source, list(norms(self.config))[-1])(self.ours))
        return found

    def _finish(self, layer: Layer, h: mx.array, packed: PackedLayer) -> None:
        def values(expert: Expert) -> GateUpDown:
            paths = (layer.matrices[name].path for name in EXPERT_MATRICES)
            gate, up, down = (dequantized(packed[path][expert.index], self.specs[path]) for path in paths)
            mx.eval(gate, up, down)
            return gate, up, down

        self.ours = self._after_experts(layer, h, values)
        self.next_layer += 1

    def _after_experts(self, layer: Layer, h: mx.array, matrices_of: Callable[[Expert], GateUpDown]) -> mx.array:
        flat = h.reshape(-1, h.shape[-1])
        normed = layer.post_norm(flat)
        routing = layer.route(normed)
        for expert in layer.experts():
            tokens, weights = routing.tokens[expert.index], routing.weights[expert.index]
            if tokens.size:
                gate, up, down = matrices_of(expert)
                flat = flat.at[tokens].add(weights[:, None] * times(expert(normed[tokens], (gate, up)), down))
                mx.eval(flat)
        return flat.reshape(h.shape)

    def _attention(self, layer: Layer, wanted: mx.array, random: np.random.Generator) -> PackedLayer:
        own = {name: layer.matrices[f"{name}_proj"] for name in layer.attention}
        sums = {name: InputSum(own[name].in_features, full=True) for name in "qo"}

        def see(x: mx.array, o_input: mx.array) -> None:
            sums["q"].add(x)
            sums["o"].add(o_input)

        layer.attend(self.ours, see=see)
        first = {
            name: self._start(matrix, 0, layer.attention[name], sums["o" if name == "o" else "q"])
            for name, matrix in own.items()
        }
        specs = {name: self.specs[matrix.path] for name, matrix in own.items()}
        packed = tune_attention(layer, self._rotary, first, specs, self.ours, wanted, random)
        return {own[name].path: [fields] for name, fields in packed.items()}

    def _values(self, layer: Layer, packed: PackedLayer, names: str) -> dict[str, mx.array]:
        paths = {name: layer.matrices[f"{name}_proj"].path for name in names}
        values = {name: dequantized(packed[path][0], self.specs[path]) for name, path in paths.items()}
        mx.eval(values)
        return values

    def _embedded(self, tokens: npt.NDArray[np.int32]) -> mx.array:
        """Only the rows in use are packed: the packing of a row does not depend on those beside it."""
        matrix = next(iter(matrices(self.config)))
        used, places = np.unique(tokens, return_inverse=True)
        rows = embed(self.source, used.astype(np.int32))
        values = dequantized(self._start(matrix, 0, rows, None), self.specs[matrix.path])
        states = values[mx.array(places.reshape(tokens.shape).astype(np.int32))]
        mx.eval(states)
        return states
