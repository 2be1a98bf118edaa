"""A text through a model one layer at a time: hidden states stay, the layer goes.

Memory is one layer's attention and one expert in float32 beside the hidden states (``tokens x hidden x 4`` bytes: 270 MB for
16,384 tokens of 8x7B), whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Matrix, matrices, norms
from mlx_mixtral.errors import MemoryBudgetError
from mlx_mixtral.layers.rotary import Rotary
from mlx_mixtral.machine.device import current_device
from mlx_mixtral.machine.memory import read_system_memory, usable_bytes
from mlx_mixtral.sizes import format_bytes
from mlx_mixtral_convert.calibration.layer import Layer, read_matrix, read_norm, times
from mlx_mixtral_convert.calibration.statistics import InputSum, input_name
from mlx_mixtral_convert.sources.base import TensorSource

__all__ = ["Sums", "Walk", "check_memory", "embed"]

Sums = dict[str, list[InputSum]]


def embed(source: TensorSource, tokens: npt.NDArray[np.int32], table: mx.array | None = None) -> mx.array:
    """Embeddings float32 ``[B, L, D]`` of ``tokens [B, L]``."""
    if table is None:
        table = read_matrix(source, next(iter(matrices(source.config))))
    embedded = table[mx.array(tokens)]
    mx.eval(embedded)
    return embedded


def check_memory(source: TensorSource, tokens: int, *, states: int = 3, copies: int = 1) -> None:
    """Raise MemoryBudgetError where hidden states, embeddings and a layer's attention are more than there is.

    Args:
        states: how many times hidden states of all tokens are held.
        copies: numbers held for each of attention's.
    """
    config = source.config
    largest = max(matrix.out_features * matrix.in_features for matrix in matrices(config))
    attention = 2 * config.hidden_size * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    needed = 4 * (states * tokens * config.hidden_size + largest + copies * attention)
    usable = usable_bytes(current_device(), read_system_memory())
    if usable is not None and needed > usable:
        raise MemoryBudgetError(
            f"calibrating on {tokens} tokens takes {format_bytes(needed)} of memory, and {format_bytes(usable)} is free; "
            "give fewer --tokens, or close other programs"
        )


class Walk:
    """Hidden states ``[B, L, D]`` of ``tokens [B, L]`` on their way through ``source``.

    Args:
        full: gather second moments as well as mean squares.
    """

    def __init__(self, source: TensorSource, tokens: npt.NDArray[np.int32], *, full: bool = False) -> None:
        self.source, self.config, self.full = source, source.config, full
        check_memory(source, tokens.size)
        self.hidden = embed(source, tokens)
        self._rotary = Rotary(self.config.rope, self.config.head_dim)
        self.next_layer = 0

    def layers(self) -> Iterator[tuple[Layer, Sums]]:
        """Every remaining layer after it was passed, with the sums over its inputs."""
        while self.next_layer < self.config.num_hidden_layers:
            yield self.step()

    def step(self) -> tuple[Layer, Sums]:
        """Pass the next layer; it, and the sums over its inputs."""
        layer = Layer(self.source, self.next_layer, self._rotary)
        sums = self._sums(layer)

        def see(x: mx.array, o_input: mx.array) -> None:
            sums["q_proj"][0].add(x)
            sums["o_proj"][0].add(o_input)

        h = layer.attend(self.hidden, see=see)
        flat = h.reshape(-1, h.shape[-1])
        normed = layer.post_norm(flat)
        routing = layer.route(normed)
        for expert in layer.experts():
            tokens, weights = routing.tokens[expert.index], routing.weights[expert.index]
            if tokens.size:
                x = normed[tokens]
                inner = expert(x)
                sums["gate_proj"][expert.index].add(x, mx.square(weights))
                sums["down_proj"][expert.index].add(inner, mx.square(weights))
                flat = flat.at[tokens].add(weights[:, None] * times(inner, expert.down))
                mx.eval(flat)
        self.hidden = flat.reshape(h.shape)
        self.next_layer += 1
        return layer, {input_name(layer.matrices[name]): found for name, found in sums.items()}

    def head_sum(self) -> dict[str, list[InputSum]]:
        """The output head's input; after the last layer. A tied head is the embedding matrix itself."""
        final = self.final_norm(self.hidden)
        found = InputSum(self.config.hidden_size, self.full)
        found.add(final)
        return {"model.embed_tokens" if self.config.tie_word_embeddings else "lm_head": [found]}

    def final_norm(self, hidden: mx.array) -> mx.array:
        return read_norm(self.source, list(norms(self.config))[-1])(hidden)

    def _sums(self, layer: Layer) -> Sums:
        def make(matrix: Matrix) -> list[InputSum]:
            return [InputSum(matrix.in_features, self.full) for _ in range(matrix.num_experts or 1)]

        return {name: make(layer.matrices[name]) for name in ("q_proj", "o_proj", "gate_proj", "down_proj")}
