"""What each group of matrices costs at each packing, in nats a token: predicted KL to the full-precision model.

Groups are what a recipe packs alike: in every layer q, k and v; o; the experts' gate and up; their down; then the embedding
and the head. Two things are measured, on a few sequences, while the text passes through the layers:

- the group's output error ``E ‖y' - y‖²`` at every candidate packing, the rest of the layer in full precision;
- its weight: with the group at ``REFERENCE``, the hidden states that come out travel on beside the true ones through all later
  layers, and the KL of the logits is taken at the end.

KL grows with the square of a small error, so ``loss(packing) = KL(REFERENCE) * error(packing) / error(REFERENCE)``. No gradient
is needed, nor more than one layer in memory; the travelling states are ``4 groups x layers x tokens x hidden x 4`` bytes,
1 GB for 8x7B.

The text measured on may use experts otherwise than the text a model is wanted for. With ``counts`` of a routing trace of that,
the error of expert e enters with the square root of ``w_e = (trace's share of e) / (own share of e)``, which weighs its squared
error by w_e, as if it had been chosen as often as there: an expert that is rarely chosen counts less. Shares are of the layer's
assignments to experts that the text reaches at all; what it does not reach cannot be measured. With the text's own counts
every weight is 1.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Matrix, matrices
from mlx_mixtral.config.quantization import AFFINE_BITS, QuantizationSpec
from mlx_mixtral_convert.calibration.layer import Expert, Layer, Routing, read_matrix, times
from mlx_mixtral_convert.calibration.walk import Walk, embed
from mlx_mixtral_convert.packing.measure import digits
from mlx_mixtral_convert.packing.search import search
from mlx_mixtral_convert.sources.base import TensorSource

__all__ = ["CANDIDATES", "REFERENCE_BITS", "Sensitivity", "candidates_for", "expert_weights", "group_of"]

# From 2.25 to 8.5 bits a weight; finer groups of few bits fill the gaps.
CANDIDATES = tuple(
    QuantizationSpec(bits, group)
    for bits, group in (
        (2, 128), (2, 64), (2, 32), (3, 128), (3, 64), (3, 32), (4, 128), (4, 64), (4, 32), (5, 64), (6, 64), (8, 64),
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
    """The candidates whose groups divide rows of ``in_features``; groups of 32 at every width where 64 does not."""
    if in_features % 64 == 0:
        return [spec for spec in CANDIDATES if in_features % spec.group_size == 0]
    return [QuantizationSpec(bits, 32) for bits in AFFINE_BITS if bits > 1] if in_features % 32 == 0 else []


def reference(in_features: int) -> QuantizationSpec:
    fitting = [spec for spec in candidates_for(in_features) if spec.bits == REFERENCE_BITS]
    return next((spec for spec in fitting if spec.group_size == 64), fitting[0])


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
        self, source: TensorSource, tokens: npt.NDArray[np.int32], counts: npt.NDArray[np.int64] | None = None
    ) -> None:
        self.source, self.config, self.tokens, self.counts = source, source.config, tokens, counts
        listed = list(matrices(self.config))
        self.errors: dict[str, dict[str, float]] = {}
        self._references: dict[str, str] = {}  # in the order of the travelling states
        table = read_matrix(source, listed[0])
        self._states = embed(source, tokens, table)  # [streams * B, L, D], the true states first
        if specs := candidates_for(listed[0].in_features):
            used = mx.array(np.unique(tokens))
            rows = table[used]
            places = mx.array(np.searchsorted(np.unique(tokens), tokens).astype(np.int32))
            for spec in specs:
                changed = packed(rows, spec)[places]
                self._record("embed_tokens", spec, changed - self._states[: len(tokens)])
                if spec == reference(listed[0].in_features):
                    self._start("embed_tokens", spec, changed)

    def step(self, layer: Layer) -> None:
        """Measure ``layer`` and take all states through it."""
        batch = len(self.tokens)
        true = self._states[:batch]
        after = layer.attend(self._states)
        self._states = after
        for group, names in (("qkv", "qkv"), ("o", "o")):
            width = layer.attention[names[0]].shape[1]
            for spec in candidates_for(width):
                other = layer.attend(true, {name: packed(layer.attention[name], spec) for name in names})
                self._record(f"layers.{layer.index}.{group}", spec, other - after[:batch])
                if spec == reference(width):
                    self._start(f"layers.{layer.index}.{group}", spec, other)
        self._experts(layer)

    def _experts(self, layer: Layer) -> None:
        batch, shape = len(self.tokens), self._states.shape
        flat = self._states.reshape(-1, shape[-1])
        normed = layer.post_norm(flat)
        routing = layer.route(normed)
        count = batch * shape[1]  # the true states are the first rows
        owned = np.array([int((np.array(tokens) < count).sum()) for tokens in routing.tokens])  # ascending within each
        scales = np.sqrt(expert_weights(owned, None if self.counts is None else self.counts[layer.index]))
        changes: dict[tuple[str, QuantizationSpec], mx.array] = {}
        for expert in layer.experts():
            tokens, weights = routing.tokens[expert.index], routing.weights[expert.index]
            if not tokens.size:
                continue
            out = weights[:, None] * times(expert(normed[tokens]), expert.down)
            if own := int(owned[expert.index]):
                part = Routing((tokens[:own],), (weights[:own],))
                self._pack_expert(expert, normed, part, out[:own], changes, count, float(scales[expert.index]))
            flat = flat.at[tokens].add(out)
            mx.eval(flat, *changes.values())
        self._states = flat.reshape(shape)
        for (group, spec), change in changes.items():
            name = f"layers.{layer.index}.{group}"
            self._record(name, spec, change)
            width = layer.matrices["gate_proj" if group == "gate_up" else "down_proj"].in_features
            if spec == reference(width):
                self._start(name, spec, self._states[:batch] + change.reshape(batch, *shape[1:]))

    def _pack_expert(
        self,
        expert: Expert,
        normed: mx.array,
        routing: Routing,
        true: mx.array,
        changes: dict[tuple[str, QuantizationSpec], mx.array],
        count: int,
        scale: float,
    ) -> None:
        tokens, weights = routing.tokens[0], routing.weights[0][:, None]
        x = normed[tokens]
        inner = expert(x)

        def add(group: str, spec: QuantizationSpec, out: mx.array) -> None:
            before = changes.get((group, spec), mx.zeros((count, normed.shape[1])))
            changes[group, spec] = before.at[tokens].add(scale * (weights * out - true))
            mx.eval(changes[group, spec])

        for spec in candidates_for(expert.gate.shape[1]):
            changed = expert(x, (packed(expert.gate, spec), packed(expert.up, spec)))
            add("gate_up", spec, times(changed, expert.down))
        for spec in candidates_for(expert.down.shape[1]):
            add("down", spec, times(inner, packed(expert.down, spec)))

    def finish(self, walk: Walk) -> dict[str, dict[str, float]]:
        """Predicted KL of every group and packing, in nats a token."""
        batch = len(self.tokens)
        final = walk.final_norm(self._states)
        head = list(matrices(self.config))[0 if self.config.tie_word_embeddings else -1]
        weight = read_matrix(self.source, head)
        true = final[:batch]
        kl = {
            name: _mean_kl(true, final[batch * (index + 1) : batch * (index + 2)], weight, weight)
            for index, name in enumerate(self._references)
        }
        losses = {}
        for name, errors in self.errors.items():
            base = errors[self._references[name]]
            losses[name] = {spec: digits(kl[name] * error / base if base else 0.0) for spec, error in errors.items()}
        tied = self.config.tie_word_embeddings
        own = {
            str(spec): digits(_mean_kl(true, true, weight, packed(weight, spec)))
            for spec in candidates_for(head.in_features)
        }
        if tied and own:
            losses["embed_tokens"] = {spec: digits(loss + own[spec]) for spec, loss in losses["embed_tokens"].items()}
        elif own:
            losses["lm_head"] = own
        return losses

    def _record(self, name: str, spec: QuantizationSpec, change: mx.array) -> None:
        self.errors.setdefault(name, {})[str(spec)] = float(np.array(mx.square(change).sum(axis=-1).mean()))

    def _start(self, name: str, spec: QuantizationSpec, states: mx.array) -> None:
        self._references[name] = str(spec)
        self._states = mx.concatenate([self._states, states])
        mx.eval(self._states)


def _mean_kl(true: mx.array, other: mx.array, true_head: mx.array, other_head: mx.array) -> float:
    """``E KL(p ‖ p')`` over final states ``[B, L, D]``, a sequence at a time: logits are wide."""
    total = 0.0
    for row, other_row in zip(true, other, strict=True):
        p, q = (times(x, head) for x, head in ((row, true_head), (other_row, other_head)))
        log_p, log_q = p - mx.logsumexp(p, axis=-1, keepdims=True), q - mx.logsumexp(q, axis=-1, keepdims=True)
        total += float(np.array((mx.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()))
    return max(total / len(true), 0.0)
