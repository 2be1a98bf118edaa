"""Attention learns: q, k, v and o together, against what attention adds to the hidden states of the unquantised model.

Products are written out, as for experts; between q, k, v and o MLX differentiates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.layers.rotary import Rotary
from mlx_mixtral_convert.calibration.layer import Layer, times
from mlx_mixtral_convert.calibration.states import States
from mlx_mixtral_convert.tuning.packed import PackedFields
from mlx_mixtral_convert.tuning.products import to_input, to_matrix
from mlx_mixtral_convert.tuning.trained import (
    Learner,
    Rates,
    TrainedMatrix,
    is_judge,
    make_learner,
    shares_of_rate,
    steps_for,
)

__all__ = ["Heads", "step", "tune_attention"]

BATCH_SEQUENCES = 4
STEPS, RATES = 80, Rates(codes=0.05, scales=0.01)


@dataclass(frozen=True)
class Heads:
    """Everything between the products of q, k, v and that of o."""

    config: MixtralConfig
    rotary: Rotary

    def __call__(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """``[B, L, H d]``, ``[B, L, KV d]`` twice, to ``[B, L, H d]``."""
        config, (batch, length, _) = self.config, q.shape
        scale = config.head_dim**-0.5 * self.rotary.score_scale
        table = self.rotary.table(length)

        def split(x: mx.array) -> mx.array:
            return x.reshape(batch, length, -1, config.head_dim).transpose(0, 2, 1, 3)

        queries, keys = (self.rotary(split(x), 0, table) for x in (q, k))
        mask: mx.array | str = "causal"
        if config.sliding_window is not None and config.sliding_window < length:
            distance = mx.arange(length)[:, None] - mx.arange(length)
            mask = (distance >= 0) & (distance < config.sliding_window)
        out = mx.fast.scaled_dot_product_attention(queries, keys, split(v), scale=scale, mask=mask)
        return out.transpose(0, 2, 1, 3).reshape(batch, length, -1)


def tune_attention(
    layer: Layer,
    rotary: Rotary,
    first: Mapping[str, PackedFields],
    specs: Mapping[str, QuantizationSpec | None],
    states: States,
    wanted: States,
    random: np.random.Generator,
) -> dict[str, PackedFields]:
    """The layer's matrices by ``q``, ``k``, ``v`` and ``o``, tuned.

    The layer's own ones are let go of as soon as they are not needed. What is learned is kept where it is better on sequences
    that nothing learned from.

    Args:
        first: them as they are before they learn.
        states: what they meet.
        wanted: what should come out, the states included.
    """
    learners = {name: make_learner(layer.attention.pop(name), first[name], specs[name], RATES) for name in first}
    heads, numbers = Heads(layer.config, rotary), np.arange(states.count, dtype=np.int32)
    seen, unseen = numbers[~is_judge(numbers)], numbers[is_judge(numbers)]
    if not (len(seen) and len(unseen) and any(isinstance(learner, TrainedMatrix) for learner in learners.values())):
        return dict(first)

    def lesson(rows: npt.NDArray[np.int32]) -> tuple[mx.array, mx.array, mx.array]:
        """What attention meets, what it should give, and how much each token counts."""
        met, true = (
            mx.concatenate([held.sequences(row, row + 1) for row in rows.tolist()]) for held in (states, wanted)
        )
        return layer.input_norm(met), true - met, 1 / mx.square(true).mean(axis=-1)

    def loss() -> float:
        batches = np.split(unseen, range(BATCH_SEQUENCES, len(unseen), BATCH_SEQUENCES))
        return sum(_loss(heads, learners, *lesson(rows)) for rows in batches if len(rows))

    before = loss()
    for share in shares_of_rate(steps_for(STEPS, len(seen), BATCH_SEQUENCES)):
        step(heads, learners, *lesson(random.permutation(seen)[:BATCH_SEQUENCES]), share)
    if not loss() < before:
        return dict(first)
    return {
        name: learner.packed() if isinstance(learner, TrainedMatrix) else first[name]
        for name, learner in learners.items()
    }


def _loss(
    heads: Callable[[mx.array, mx.array, mx.array], mx.array],
    matrices: Mapping[str, Learner],
    x: mx.array,
    wanted: mx.array,
    counts: mx.array,
) -> float:
    """The squared error, as its tokens count."""
    out = times(heads(*(times(x, matrices[name].values) for name in "qkv")), matrices["o"].values)
    return float((counts * mx.square(out - wanted).sum(axis=-1)).sum())


def step(
    heads: Callable[[mx.array, mx.array, mx.array], mx.array],
    matrices: Mapping[str, Learner],
    x: mx.array,
    wanted: mx.array,
    counts: mx.array,
    share: float,
) -> None:
    values = {name: matrix.values for name, matrix in matrices.items()}
    mx.eval(values)
    projected = [times(x, values[name]) for name in "qkv"]
    # The gradient of what lies between them is asked for once the error is known: it is computed twice, and is cheap.
    met = heads(*projected)
    error = times(met, values["o"]) - wanted
    d_out = error * counts[..., None]
    _, found = mx.vjp(heads, projected, [to_input(d_out, values["o"])])
    for name, seen, gradient in (*zip("qkv", (x, x, x), found, strict=True), ("o", met, d_out)):
        matrices[name].learn(to_matrix(gradient, seen), share)
