"""One decoder layer in full precision, read from a source, with its experts one at a time.

The modules are the runtime's own; matrices are float32. Attention's matrices and the router of one layer are held, and one
expert: 0.9 GB for 8x7B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.cache.choice import AdapterChoice
from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.config.layout import Matrix, Norm, matrices, norms
from mlx_mixtral.layers.attention import Attention
from mlx_mixtral.layers.cpu import products_for
from mlx_mixtral.layers.linear import Linear, Products
from mlx_mixtral.layers.norm import RMSNorm
from mlx_mixtral.layers.rotary import Rotary
from mlx_mixtral.machine.device import current_device
from mlx_mixtral.model.moe import route
from mlx_mixtral.weights.dtypes import MLX_DTYPES
from mlx_mixtral_convert.calibration.states import States, pieces
from mlx_mixtral_convert.packing.quantize import cast
from mlx_mixtral_convert.packing.values import Values
from mlx_mixtral_convert.sources.base import TensorSource, tensor_place

__all__ = ["Expert", "Layer", "Routing", "pass_experts", "plain", "read_matrix", "read_norm", "swiglu", "times"]

# Sequences attended to at once: scores of a full batch would be the largest thing in memory.
ATTEND_AT_ONCE = 8


def read_matrix(source: TensorSource, matrix: Matrix, expert: int = 0, *, as_stored: bool = False) -> mx.array:
    """One expert of a matrix, float32 ``[out, in]``.

    Args:
        as_stored: in the source's own type where that is one of 16 bits.

    Raises:
        NonFiniteWeightsError: NaN or infinity, which would turn all that is measured into the same.
    """
    scratch = np.empty(matrix.out_features * matrix.in_features * 4, np.uint8)
    values, where = source.read(matrix, expert, scratch), tensor_place(source, matrix, expert)
    if as_stored and values.dtype in ("BF16", "F16"):
        return mx.array(cast(values, values.dtype, where).array).view(MLX_DTYPES[values.dtype])
    return _floats(values, where)


def read_norm(source: TensorSource, norm: Norm) -> RMSNorm:
    weight = _floats(source.read_norm(norm), tensor_place(source, norm)).reshape(-1)
    return RMSNorm(weight, source.config.rms_norm_eps)


def _floats(values: Values, where: str) -> mx.array:
    return mx.array(cast(values, "F32", where).array)


def plain(weight: mx.array) -> Linear:
    return Linear({"weight": weight}, None, _products())


def times(x: mx.array, weight: mx.array) -> mx.array:
    """``x W^T``."""
    return plain(weight)(x)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """``silu(gate) * up``."""
    return _products().swiglu(gate, up, is_long=True)


@cache
def _products() -> Products:
    return products_for(current_device())


class _Tap(Linear):
    """A linear layer that keeps its input."""

    seen: mx.array

    def __call__(self, x: mx.array, choice: AdapterChoice = None) -> mx.array:
        self.seen = x
        return super().__call__(x, choice)


@dataclass(frozen=True)
class Expert:
    """One expert's matrices, float32."""

    index: int
    gate: mx.array
    up: mx.array
    down: mx.array

    def __call__(self, x: mx.array, gate_up: tuple[mx.array, mx.array] | None = None) -> mx.array:
        """``silu(x W1) * (x W3)`` for ``x [N, D]``: what the down matrix meets; with other matrices when given."""
        gate, up = (self.gate, self.up) if gate_up is None else gate_up
        return swiglu(times(x, gate), times(x, up))


@dataclass(frozen=True)
class Routing:
    """Which of ``N`` tokens each expert gets, ascending, and with what weight: int32 and float32 of one length an expert."""

    tokens: tuple[npt.NDArray[np.int32], ...]
    weights: tuple[npt.NDArray[np.float32], ...]

    def pieces(self, expert: int) -> Iterator[tuple[npt.NDArray[np.int32], mx.array]]:
        """An expert's tokens and weights ``[n, 1]``, some at a time."""
        for piece in pieces(len(self.tokens[expert])):
            yield self.tokens[expert][piece], mx.array(self.weights[expert][piece][:, None])


class Layer:
    """Layer ``index`` of a source. ``attend`` and ``route`` are the two halves up to the experts."""

    def __init__(self, source: TensorSource, index: int, rotary: Rotary) -> None:
        self.source, self.config, self.index = source, source.config, index
        own = [matrix for matrix in matrices(self.config) if matrix.layer == index]
        self.matrices = {matrix.path.rpartition(".")[2]: matrix for matrix in own if matrix.part != "router"}
        self.router = next((matrix for matrix in own if matrix.part == "router"), None)
        input_norm, post_norm = (norm for norm in norms(self.config) if norm.layer == index)
        self.input_norm, self.post_norm = read_norm(source, input_norm), read_norm(source, post_norm)
        self.attention = {name: read_matrix(source, self.matrices[f"{name}_proj"]) for name in "qkvo"}
        self._gate = None if self.router is None else plain(read_matrix(source, self.router))
        self._rotary = rotary

    def attend(
        self,
        x: mx.array,
        weights: dict[str, mx.array] | None = None,
        see: Callable[[mx.array, mx.array], None] | None = None,
    ) -> mx.array:
        """``x + Attention(norm(x))`` for ``x [B, L, D]``.

        Args:
            weights: other matrices for q, k, v or o.
            see: told the input of q, k, v and that of o, ``[B', L, …]``, a few sequences at a time.
        """
        held = self.attention | (weights or {})
        out = _Tap({"weight": held["o"]}, None, _products())
        attention = Attention(self.config, [plain(held[name]) for name in "qkv"], out, self._rotary, _products())
        parts = []
        for start in range(0, x.shape[0], ATTEND_AT_ONCE):
            part = x[start : start + ATTEND_AT_ONCE]
            cache = KVCache(1, self.config.num_key_value_heads, self.config.head_dim, window=self.config.sliding_window)
            normed = self.input_norm(part)
            rows, length, _ = part.shape
            y = part + attention(normed, 0, cache.chunk(rows, length, self._rotary.table(length)))
            mx.eval(y)
            if see is not None:
                see(normed, out.seen)
            parts.append(y)
        return mx.concatenate(parts)

    def attend_all(
        self,
        states: States,
        weights: dict[str, mx.array] | None = None,
        see: Callable[[mx.array, mx.array], None] | None = None,
    ) -> None:
        """``attend`` for all states, in place."""
        for start in range(0, states.count, ATTEND_AT_ONCE):
            states.put(start, self.attend(states.sequences(start, start + ATTEND_AT_ONCE), weights, see))

    def route(self, normed: mx.array) -> Routing:
        """Experts of ``normed [N, D]``; a dense model's only one gets every token with weight 1."""
        return self._routing([self._chosen(normed)])

    def route_all(self, states: States) -> Routing:
        """Experts of all tokens of states after attention."""
        return self._routing([self._chosen(self.post_norm(states.rows(piece))) for piece in pieces(states.tokens)])

    def _chosen(self, normed: mx.array) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Experts and weights, ``[N, K]``."""
        if self._gate is None:
            return np.zeros((len(normed), 1), np.int32), np.ones((len(normed), 1), np.float32)
        chosen, weights = route(self._gate(normed), self.config.num_experts_per_tok)
        return np.array(chosen.astype(mx.int32)), np.array(weights.astype(mx.float32))

    def _routing(self, chosen: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]) -> Routing:
        experts, shares = (np.concatenate(parts) for parts in zip(*chosen, strict=True))
        tokens, weights = [], []
        for expert in range(1 if self._gate is None else self.config.num_local_experts):
            rows, places = np.nonzero(experts == expert)
            tokens.append(rows.astype(np.int32))
            weights.append(shares[rows, places])
        return Routing(tuple(tokens), tuple(weights))

    def experts(self) -> Iterator[Expert]:
        """The experts, each read when it is its turn."""
        for index in range(self.matrices["gate_proj"].num_experts or 1):
            names = ("gate_proj", "up_proj", "down_proj")
            yield Expert(index, *(read_matrix(self.source, self.matrices[name], index) for name in names))


def pass_experts(
    layer: Layer,
    experts: Iterable[Expert],
    before: States,
    after: States,
    see: Callable[[int, mx.array, mx.array, mx.array], None] | None = None,
) -> None:
    """Add to ``after`` what ``experts`` make of ``before``, the states after attention; one of them is held at a time.

    Args:
        see: told the expert, the input of gate and up, that of down, and the weights ``[n, 1]`` of a piece of its tokens.
    """
    routing = layer.route_all(before)
    for expert in experts:
        for tokens, weights in routing.pieces(expert.index):
            x = layer.post_norm(before.take(tokens))
            inner = expert(x)
            if see is not None:
                see(expert.index, x, inner, weights)
            after.add(tokens, weights * times(inner, expert.down))
        del expert  # before the next one is read
