"""What each group of matrices costs at each packing, in nats per token: predicted KL to the full-precision model.

Groups are what a recipe packs alike: in every layer q, k and v; o; the experts' gate and up; their down; then the embedding
and the head. Two things are measured, on a few sequences, while the text passes through the layers:

- the group's output error ``E ‖y' - y‖²`` at every candidate packing, the rest of the layer in full precision;
- its weight: with the group at ``REFERENCE``, the hidden states that come out travel on beside the true ones through all later
  layers, and the KL of the logits is taken at the end.

KL grows with the square of a small error, so ``loss(packing) = KL(REFERENCE) * error(packing) / error(REFERENCE)``. No gradient
is needed, nor more than one layer in memory; the travelling states, ``4 groups x layers x tokens x hidden x 4`` bytes, 2.1 GB
for 8x7B, are on the disk.

The text measured on may use experts otherwise than the text a model is wanted for. With ``counts`` of a routing trace of that,
the error of expert e enters with the square root of ``w_e = (trace's share of e) / (own share of e)``, which weighs its squared
error by w_e, as if it had been chosen as often as there: an expert that is rarely chosen counts less. Shares are of the layer's
assignments to experts that the text reaches at all; what it does not reach cannot be measured. With the text's own counts
every weight is 1.

Errors are those of searched codes. What a whole model loses is not just the sum: ``uniform.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Matrix, matrices
from mlx_mixtral.config.quantization import AFFINE_BITS, QuantizationSpec
from mlx_mixtral_convert.calibration.layer import Expert, Layer, Routing, read_matrix, times
from mlx_mixtral_convert.calibration.states import States, Stored, pieces
from mlx_mixtral_convert.calibration.truth import Truth
from mlx_mixtral_convert.calibration.uniform import (
    ANCHOR_BITS,
    ANCHOR_ROUNDINGS,
    UniformModels,
    anchor,
    plainly_packed,
)
from mlx_mixtral_convert.calibration.walk import Walk, embed
from mlx_mixtral_convert.packing.measure import digits
from mlx_mixtral_convert.packing.search import search
from mlx_mixtral_convert.sources.base import TensorSource

__all__ = ["CANDIDATES", "REFERENCE_BITS", "Sensitivity", "candidates_for", "expert_weights", "group_of"]

# From 1.25 to 8.5 bits per weight; finer groups of few bits fill the gaps. One bit in groups of 64 is never taken beside groups
# of 128: measured at six sizes, it changes nothing.
CANDIDATES = tuple(
    QuantizationSpec(bits, group)
    for bits, group in (
        (1, 128), (2, 128), (2, 64), (2, 32), (3, 128), (3, 64), (3, 32), (4, 128), (4, 64), (4, 32), (5, 64), (6, 64), (8, 64),
    )
)  # fmt: skip
REFERENCE_BITS = 3
_GROUPS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o", "down_proj": "down"}
_GROUPS |= {"gate_proj": "gate_up", "up_proj": "gate_up"}


def group_of(matrix: Matrix) -> str | None:
    """The group a matrix is packed with, ``layers.3.gate_up`` or ``embed_tokens``; None for a router, which is not packed."""
    if matrix.part == "router":
        return None
    name = matrix.path.rpartition(".")[2]
    return name if matrix.layer is None else f"layers.{matrix.layer}.{_GROUPS[name]}"


def candidates_for(in_features: int) -> list[QuantizationSpec]:
    """The candidates whose groups divide rows of ``in_features``: 1 bit in groups of 64 where 128 does not divide them, groups
    of 32 at every width where 64 does not.
    """
    if in_features % 64 == 0:
        fitting = [spec for spec in CANDIDATES if in_features % spec.group_size == 0]
        return fitting if in_features % 128 == 0 else [QuantizationSpec(1, 64), *fitting]
    return [QuantizationSpec(bits, 32) for bits in AFFINE_BITS] if in_features % 32 == 0 else []


def at_bits(in_features: int, bits: int) -> QuantizationSpec | None:
    """The candidate of so many bits that a uniform model takes: groups of 64 where they divide the rows."""
    fitting = [spec for spec in candidates_for(in_features) if spec.bits == bits]
    return next((spec for spec in fitting if spec.group_size == 64), fitting[0] if fitting else None)


def reference(in_features: int) -> QuantizationSpec | None:
    return at_bits(in_features, REFERENCE_BITS)


def packed(weight: mx.array, spec: QuantizationSpec) -> mx.array:
    """``weight`` as it comes back from ``spec``, float32; scales as a bfloat16 conversion has them."""
    named = search(weight.astype(mx.bfloat16), spec)
    scales, biases = (named[field].astype(mx.float32) for field in ("scales", "biases"))
    return mx.dequantize(named["weight"], scales, biases, spec.group_size, spec.bits)


def expert_weights(own: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64] | None) -> npt.NDArray[np.float64]:
    """``[E]``: how much the squared error of each expert of a layer counts; 1 for all without ``wanted``.

    Args:
        own: ``[E]`` tokens of the text measured on that chose each expert.
        wanted: ``[E]`` the same of a routing trace; one that chose none of the experts reached says nothing.
    """
    reached = own > 0
    if wanted is None or not (total := int(wanted[reached].sum())):
        return np.ones(len(own))
    # Whole numbers as long as possible: equal shares give 1 to the last bit.
    return np.where(reached, wanted * own.sum() / np.where(reached, own * total, 1), 0.0)


class Sensitivity:
    """Measured along a ``Walk`` over the same source; ``tokens [B, L]`` are the few sequences it is measured on.

    ``counts [layers, experts]`` says how often a text that matters more chooses each expert.
    """

    def __init__(
        self,
        source: TensorSource,
        tokens: npt.NDArray[np.int32],
        counts: npt.NDArray[np.int64] | None = None,
        tick: Callable[[], None] = lambda: None,
        folder: Path | None = None,
    ) -> None:
        self.source, self.config, self.tokens, self.counts, self.tick = source, source.config, tokens, counts, tick
        self.errors: dict[str, dict[str, float]] = {}
        self.references: dict[str, str] = {}  # in the order of the travelling states
        # [streams * B, L, D], the true states first
        self.states, self._before = (States(tokens.shape[1], self.config.hidden_size, folder) for _ in range(2))
        self.uniform = UniformModels()

    def start(self) -> None:
        """The embeddings, where every state begins."""
        first = next(iter(matrices(self.config)))
        table = read_matrix(self.source, first)
        true = embed(self.source, self.tokens, table)
        self.states.append(true)
        # Only the rows in use: the packing of a row does not depend on those beside it.
        used = np.unique(self.tokens)
        rows, places = table[mx.array(used)], mx.array(np.searchsorted(used, self.tokens).astype(np.int32))
        for bits in self._anchor_bits():
            spec = at_bits(first.in_features, bits)
            for rounding in ANCHOR_ROUNDINGS:
                self.uniform.states[rounding, bits] = true if spec is None else _pack(rounding, rows, spec)[places]
        mx.eval(self.uniform.states)
        for spec in candidates_for(first.in_features):
            changed = packed(rows, spec)[places]
            self._record("embed_tokens", spec, changed - true)
            if spec == reference(first.in_features):
                self._start("embed_tokens", spec, changed)

    def arrays(self) -> dict[str, mx.array | States]:
        """With ``figures`` all that was measured so far."""
        uniform: dict[str, mx.array | States] = {
            f"uniform.{rounding}.{bits}": x for (rounding, bits), x in self.uniform.states.items()
        }
        return {"states": self.states, **uniform}

    def figures(self) -> dict[str, Any]:
        """See ``arrays``; JSON."""
        return {"errors": self.errors, "references": self.references}

    def restore(self, arrays: Mapping[str, mx.array], states: Mapping[str, Stored], figures: Mapping[str, Any]) -> None:
        """Go on from there, in place of ``start``."""
        self.states.load(states["states"])
        self.errors, self.references = figures["errors"], figures["references"]
        for bits in self._anchor_bits():
            for rounding in ANCHOR_ROUNDINGS:
                self.uniform.states[rounding, bits] = arrays[f"uniform.{rounding}.{bits}"]

    def _anchor_bits(self) -> list[int]:
        widths = {matrix.in_features for matrix in matrices(self.config)}
        return [bits for bits in ANCHOR_BITS if any(at_bits(width, bits) for width in widths)]

    def step(self, layer: Layer) -> None:
        """Measure ``layer`` and take all states through it."""
        batch = len(self.tokens)
        true = self.states.sequences(0, batch)
        layer.attend_all(self.states)
        after = self.states.sequences(0, batch)
        for group, names in (("qkv", "qkv"), ("o", "o")):
            width = layer.attention[names[0]].shape[1]
            for spec in candidates_for(width):
                other = layer.attend(true, {name: packed(layer.attention[name], spec) for name in names})
                self._record(f"layers.{layer.index}.{group}", spec, other - after)
                if spec == reference(width):
                    self._start(f"layers.{layer.index}.{group}", spec, other)
            self.tick()
        for key in self.uniform.states:
            rounding, bits = key
            specs = {name: at_bits(weight.shape[1], bits) for name, weight in layer.attention.items()}
            held = {name: _pack(rounding, layer.attention[name], spec) for name, spec in specs.items() if spec}
            self.uniform.attend(layer, key, held)
        self._experts(layer)
        self.uniform.close()

    def _experts(self, layer: Layer) -> None:
        batch, width = len(self.tokens), self.states.width
        self._before.fill(self.states.count, self.states.rows)
        routing = layer.route_all(self._before)
        count = self.tokens.size  # the true states are the first rows
        normed = layer.post_norm(self._before.sequences(0, batch).reshape(-1, width))
        owned = np.array([int((tokens < count).sum()) for tokens in routing.tokens])  # ascending within each
        scales = np.sqrt(expert_weights(owned, None if self.counts is None else self.counts[layer.index]))
        changes: dict[tuple[str, QuantizationSpec], mx.array] = {}
        for expert in layer.experts():
            own = int(owned[expert.index])
            tokens, weights = routing.tokens[expert.index], routing.weights[expert.index]
            out = mx.zeros((0, width))
            if own:
                x = normed[mx.array(tokens[:own])]
                out = mx.array(weights[:own, None]) * times(expert(x), expert.down)
                self.states.add(tokens[:own], out)
            for piece in pieces(len(tokens) - own):
                others, shares = tokens[own:][piece], mx.array(weights[own:][piece][:, None])
                x = layer.post_norm(self._before.take(others))
                self.states.add(others, shares * times(expert(x), expert.down))
            part = Routing((tokens[:own],), (weights[:own],))
            self._pack_expert(layer, expert, normed, part, out, changes, float(scales[expert.index]))
            mx.eval(*changes.values())
            del expert  # before the next one is read
            self.tick()
        after = self.states.sequences(0, batch)
        for (group, spec), change in changes.items():
            name = f"layers.{layer.index}.{group}"
            self._record(name, spec, change)
            width = layer.matrices["gate_proj" if group == "gate_up" else "down_proj"].in_features
            if spec == reference(width):
                self._start(name, spec, after + change.reshape(after.shape))

    def _pack_expert(
        self,
        layer: Layer,
        expert: Expert,
        normed: mx.array,
        routing: Routing,
        true: mx.array,
        changes: dict[tuple[str, QuantizationSpec], mx.array],
        scale: float,
    ) -> None:
        """One expert at every packing; no more of them than those of one number of bits are held."""
        tokens, weights = mx.array(routing.tokens[0]), mx.array(routing.weights[0][:, None])
        x = normed[tokens]
        inner = expert(x) if tokens.size else x
        widths = expert.gate.shape[1], expert.down.shape[1]

        def add(group: str, spec: QuantizationSpec, out: mx.array) -> None:
            before = changes.get((group, spec), mx.zeros(normed.shape))
            changes[group, spec] = before.at[tokens].add(scale * (weights * out - true))
            mx.eval(changes[group, spec])

        for bits in sorted({spec.bits for width in widths for spec in candidates_for(width)}):
            gate, up, down = expert.gate, expert.up, expert.down  # as the searched uniform model has them
            anchors = list(self.uniform.models(bits))
            for spec in candidates_for(widths[0]):
                if spec.bits != bits or not (tokens.size or (anchors and spec == at_bits(widths[0], bits))):
                    continue
                pair = packed(expert.gate, spec), packed(expert.up, spec)
                if tokens.size:
                    add("gate_up", spec, times(expert(x, pair), expert.down))
                if spec == at_bits(widths[0], bits):
                    gate, up = pair
            for spec in candidates_for(widths[1]):
                if spec.bits != bits or not (tokens.size or (anchors and spec == at_bits(widths[1], bits))):
                    continue
                changed = packed(expert.down, spec)
                if tokens.size:
                    add("down", spec, times(inner, changed))
                if spec == at_bits(widths[1], bits):
                    down = changed
            for key in anchors:
                held = (gate, up, down) if key[0] == "search" else _plain_expert(expert, bits)
                self.uniform.expert(layer, key, expert, *held)

    def finish(self, walk: Walk) -> tuple[dict[str, dict[str, float]], dict[str, list[list[float]]]]:
        """Predicted KL of every group and packing, in nats per token, and the measured one of the uniform models."""
        batch = len(self.tokens)

        def final(stream: int) -> mx.array:
            return walk.final_norm(self.states.sequences(batch * stream, batch * (stream + 1)))

        head = list(matrices(self.config))[0 if self.config.tie_word_embeddings else -1]
        weight = read_matrix(self.source, head)
        truth = Truth(final(0), weight)
        kl = {}
        for stream, name in enumerate(self.references, 1):
            kl[name] = truth.mean_kl(final(stream), weight)
            self.tick()
        losses = {}
        for name, errors in self.errors.items():
            base = errors[self.references[name]]
            losses[name] = {spec: digits(kl[name] * error / base if base else 0.0) for spec, error in errors.items()}
        tied = self.config.tie_word_embeddings
        own = {
            str(spec): digits(truth.mean_kl(truth.final, packed(weight, spec)))
            for spec in candidates_for(head.in_features)
        }
        if tied and own:
            losses["embed_tokens"] = {spec: digits(loss + own[spec]) for spec, loss in losses["embed_tokens"].items()}
        elif own:
            losses["lm_head"] = own
        return losses, self._anchors(walk, truth, weight, losses)

    def _anchors(
        self, walk: Walk, truth: Truth, head: mx.array, losses: Mapping[str, Mapping[str, float]]
    ) -> dict[str, list[list[float]]]:
        widths = {group_of(matrix): matrix.in_features for matrix in matrices(self.config)}
        found: dict[str, list[list[float]]] = {}
        for (rounding, bits), states in self.uniform.states.items():
            spec = at_bits(head.shape[1], bits)
            other = head if spec is None else _pack(rounding, head, spec)
            kl = truth.kl(walk.final_norm(states), other)
            predicted = sum(losses[name].get(str(at_bits(widths[name], bits)), 0.0) for name in losses)
            found.setdefault(rounding, []).append(anchor(predicted, kl))
            self.tick()
        return {rounding: sorted(rows) for rounding, rows in found.items()}

    def _record(self, name: str, spec: QuantizationSpec, change: mx.array) -> None:
        self.errors.setdefault(name, {})[str(spec)] = float(np.array(mx.square(change).sum(axis=-1).mean()))

    def _start(self, name: str, spec: QuantizationSpec, states: mx.array) -> None:
        self.references[name] = str(spec)
        self.states.append(states)


def _pack(rounding: str, weight: mx.array, spec: QuantizationSpec) -> mx.array:
    return packed(weight, spec) if rounding == "search" else plainly_packed(weight, spec)


def _plain_expert(expert: Expert, bits: int) -> list[mx.array]:
    found = []
    for weight in (expert.gate, expert.up, expert.down):
        spec = at_bits(weight.shape[1], bits)
        found.append(weight if spec is None else plainly_packed(weight, spec))
    return found
