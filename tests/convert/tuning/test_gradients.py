"""Gradients that are written out, against those MLX finds by itself in the formula they are of."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.layers.rotary import Rotary
from mlx_mixtral_convert.tuning.attention import Heads, step
from mlx_mixtral_convert.tuning.expert import Lesson, Swiglu
from tests.convert.support import CONFIG

HIDDEN, UNITS, TOKENS = 64, 96, 300


class Recorder:
    """A matrix that keeps its gradient."""

    def __init__(self, values: mx.array) -> None:
        self.values = values
        self.gradient = mx.zeros_like(values)

    def learn(self, gradient: mx.array, share: float) -> None:
        self.gradient = gradient


def normal(*shape: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def agree(found: mx.array, expected: mx.array) -> bool:
    return bool((mx.abs(found - expected).max() < 1e-5 * mx.abs(expected).max()).item())


def test_an_experts_gradient_is_that_of_its_weighted_error() -> None:
    gate, up, down = (normal(*s, seed=i) / 5 for i, s in enumerate([(UNITS, HIDDEN), (UNITS, HIDDEN), (HIDDEN, UNITS)]))
    x, wanted = normal(TOKENS, HIDDEN, seed=3), normal(TOKENS, HIDDEN, seed=4)
    routing, counts = mx.abs(normal(TOKENS, seed=5)), mx.abs(normal(TOKENS, seed=6))

    def loss(gate: mx.array, up: mx.array, down: mx.array) -> mx.array:
        a = x @ gate.T
        out = routing[:, None] * (a * mx.sigmoid(a) * (x @ up.T) @ down.T)
        return (counts[:, None] * mx.square(out - wanted)).sum() / 2

    matrices = [Recorder(gate), Recorder(up), Recorder(down)]
    Swiglu(*matrices).step(Lesson(x, routing, wanted, counts), 1.0)
    for matrix, expected in zip(matrices, mx.grad(loss, argnums=(0, 1, 2))(gate, up, down), strict=True):
        assert agree(matrix.gradient, expected)


def naive_attention(config: MixtralConfig, x: mx.array, weights: dict[str, mx.array]) -> mx.array:
    """Half-rotated grouped-query attention, a head at a time, as transformers writes it."""
    d, length = config.head_dim, x.shape[1]
    frequencies = mx.array((config.rope.theta ** (-np.arange(0, d, 2) / d)).astype(np.float32))
    angles = mx.arange(length)[:, None] * mx.concatenate([frequencies, frequencies])
    distance = mx.arange(length)[:, None] - mx.arange(length)
    seen = (distance >= 0) & (distance < (config.sliding_window or length))

    def rotated(h: mx.array) -> mx.array:
        turned = mx.concatenate([-h[..., d // 2 :], h[..., : d // 2]], axis=-1)
        return h * mx.cos(angles) + turned * mx.sin(angles)

    outs = []
    for head in range(config.num_attention_heads):
        shared = head * config.num_key_value_heads // config.num_attention_heads
        q = rotated(x @ weights["q"][head * d : (head + 1) * d].T)
        k = rotated(x @ weights["k"][shared * d : (shared + 1) * d].T)
        scores = mx.where(seen, q @ k.swapaxes(-1, -2) * d**-0.5, -mx.inf)
        outs.append(mx.softmax(scores, axis=-1) @ (x @ weights["v"][shared * d : (shared + 1) * d].T))
    return mx.concatenate(outs, axis=-1) @ weights["o"].T


@pytest.mark.parametrize("window", [None, 7])
def test_attentions_gradient_is_that_of_its_error(window: int | None) -> None:
    config = MixtralConfig.from_hf(CONFIG | {"sliding_window": window})
    shapes = {"q": (128, 128), "k": (64, 128), "v": (64, 128), "o": (128, 128)}
    weights = {name: normal(*shape, seed=i) / 10 for i, (name, shape) in enumerate(shapes.items())}
    x, wanted, counts = normal(3, 20, 128, seed=5), normal(3, 20, 128, seed=6), mx.abs(normal(3, 20, seed=7))

    def loss(weights: dict[str, mx.array]) -> mx.array:
        return (counts[..., None] * mx.square(naive_attention(config, x, weights) - wanted)).sum() / 2

    matrices = {name: Recorder(values) for name, values in weights.items()}
    step(Heads(config, Rotary(config.rope, config.head_dim)), matrices, x, wanted, counts, 1.0)
    for name, expected in mx.grad(loss)(weights).items():
        assert agree(matrices[name].gradient, expected), name
