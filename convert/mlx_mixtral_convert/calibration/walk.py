"""A text through a model one layer at a time: hidden states stay, on the disk, and the layer goes.

Memory is one layer's attention and one expert in float32 (0.9 GB for 8x7B) beside what a piece of the text needs, whatever the
number of layers and of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Matrix, matrices, norms
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import MemoryBudgetError
from mlx_mixtral.layers.rotary import Rotary
from mlx_mixtral.machine.device import current_device
from mlx_mixtral.machine.memory import read_system_memory, usable_bytes
from mlx_mixtral.sizes import format_bytes
from mlx_mixtral_convert.calibration.layer import Layer, pass_experts, read_matrix, read_norm
from mlx_mixtral_convert.calibration.states import PIECE, States, pieces
from mlx_mixtral_convert.calibration.statistics import InputSum, input_name
from mlx_mixtral_convert.sources.base import TensorSource

__all__ = ["Sums", "Walk", "check_memory", "embed", "embedded", "walk_bytes"]

Sums = dict[str, list[InputSum]]


def embed(source: TensorSource, tokens: npt.NDArray[np.int32], table: mx.array | None = None) -> mx.array:
    """Embeddings float32 ``[B, L, D]`` of ``tokens [B, L]``."""
    if table is None:
        table = read_matrix(source, next(iter(matrices(source.config))))
    embedded = table[mx.array(tokens)]
    mx.eval(embedded)
    return embedded


def embedded(tokens: npt.NDArray[np.int32], table: mx.array, folder: Path | None) -> States:
    """States in which ``tokens [B, L]`` begin, with ``table [V, D]``."""
    states = States(tokens.shape[1], table.shape[1], folder)
    flat = tokens.reshape(-1)
    states.fill(len(tokens), lambda piece: table[mx.array(flat[piece])])
    return states


def walk_bytes(config: MixtralConfig, *, copies: int = 1) -> int:
    """What a walk holds at the most: embeddings; or a piece of the text beside a layer's attention and an expert, or beside
    all that is held of attention.

    Args:
        copies: numbers held for each of attention's, before there is an expert.
    """
    table = config.vocab_size * config.hidden_size
    attention = 2 * config.hidden_size * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    expert = 3 * config.hidden_size * config.intermediate_size
    text = PIECE * (2 * config.hidden_size + 3 * config.intermediate_size)
    return 4 * max(table, max(copies * attention, attention + expert) + text)


def check_memory(source: TensorSource, *, copies: int = 1) -> None:
    """Raise MemoryBudgetError where ``walk_bytes`` are more than there is."""
    needed = walk_bytes(source.config, copies=copies)
    usable = usable_bytes(current_device(), read_system_memory())
    if usable is not None and needed > usable:
        raise MemoryBudgetError(
            f"calibrating this model takes {format_bytes(needed)} of memory, and {format_bytes(usable)} is free; close other "
            "programs"
        )


class Walk:
    """Hidden states ``[B, L, D]`` of ``tokens [B, L]`` on their way through ``source``.

    Args:
        folder: where the states are, as for ``States``.
    """

    def __init__(self, source: TensorSource, tokens: npt.NDArray[np.int32], *, folder: Path | None = None) -> None:
        self.source, self.config = source, source.config
        check_memory(source)
        self.hidden = embedded(tokens, read_matrix(source, next(iter(matrices(self.config)))), folder)
        self._before = States(self.hidden.length, self.hidden.width, folder)
        self.final_norm = read_norm(source, list(norms(self.config))[-1])
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

        def see_expert(expert: int, x: mx.array, inner: mx.array, weights: mx.array) -> None:
            sums["gate_proj"][expert].add(x, mx.square(weights[:, 0]))
            sums["down_proj"][expert].add(inner, mx.square(weights[:, 0]))

        layer.attend_all(self.hidden, see=see)
        self._before.fill(self.hidden.count, self.hidden.rows)
        pass_experts(layer, layer.experts(), self._before, self.hidden, see_expert)
        self.next_layer += 1
        return layer, {input_name(layer.matrices[name]): found for name, found in sums.items()}

    def head_sum(self) -> dict[str, list[InputSum]]:
        """The output head's input; after the last layer. A tied head is the embedding matrix itself."""
        found = self.new_sum(self.config.hidden_size)
        for piece in pieces(self.hidden.tokens):
            found.add(self.final_norm(self.hidden.rows(piece)))
        return {"model.embed_tokens" if self.config.tie_word_embeddings else "lm_head": [found]}

    def new_sum(self, columns: int) -> InputSum:
        """What is gathered of one matrix's input."""
        return InputSum(columns)

    def close(self) -> None:
        """Let go of the states."""
        self.hidden.close()
        self._before.close()

    def _sums(self, layer: Layer) -> Sums:
        def make(matrix: Matrix) -> list[InputSum]:
            return [self.new_sum(matrix.in_features) for _ in range(matrix.num_experts or 1)]

        return {name: make(layer.matrices[name]) for name in ("q_proj", "o_proj", "gate_proj", "down_proj")}
