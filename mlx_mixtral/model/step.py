"""One step of decoding as one graph: compiled once for a size of the cache, whatever the number of layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import mlx.core as mx

from mlx_mixtral.cache.storage import KVStorage, LayerArrays
from mlx_mixtral.cache.views import DecodeView
from mlx_mixtral.cache.window import Window
from mlx_mixtral.layers.compiled import Compiled
from mlx_mixtral.model.transformer import MixtralModel

__all__ = ["DecodeStep", "StepCache"]


class DecodeStep:
    """Computes the next token's logits; replays a compiled graph, so that Python does the same work for 2 layers and for 32.

    Where a token is in the cache is an array to it, not a number: the graph of one step is the graph of all, until the cache
    grows. The cache's arrays go in and come out, and nothing else holds them when MLX computes, so they are written in place.

    Where MLX computes on the CPU it would call a C++ compiler for each of the two dozen groups of operations that it fuses, for
    half a minute before the first token, to save Python a few milliseconds per token where matrix products take all the time:
    ``compiled`` is for GPUs. Without it the same operations run one by one.

    A model that streams experts reads the routers' choices in between and cannot be one graph: it runs them one by one as well.

    Keep it no longer than the model's weights are to live, and make another when banks of experts have changed: the graph
    holds them.
    """

    def __init__(self, model: MixtralModel, *, compiled: bool) -> None:
        self._model, self._is_compiled = model, compiled
        self._compiled: dict[Kind, StepFunction] = {}

    def __call__(self, tokens: mx.array, cache: StepCache, *, last_only: bool = True) -> mx.array:
        """Lazy logits ``[B, L, V]`` of ``tokens [B, L]`` int32, of the last token ``[B, 1, V]`` when ``last_only``."""
        model, (rows, L) = self._model, tokens.shape
        cache.reserve(rows, L)
        run = self._run(Kind(cache.storage, cache.window, last_only))
        table = model.frequencies(cache.length + L)
        logits, cache.layers, lengths = run(tokens, cache.layers, cache.lengths, cache.padding, table)
        cache.advance(L, lengths)
        return logits

    def _run(self, kind: Kind) -> StepFunction:
        run = partial(_step, self._model, kind)
        if not self._is_compiled or self._model.is_streamed:
            return run
        if kind not in self._compiled:
            self._compiled[kind] = Compiled(run)
        return self._compiled[kind]


class StepCache(Protocol):
    """What a step asks of a cache: ``KVCache`` and ``BatchCache`` both."""

    layers: list[LayerArrays]

    @property
    def storage(self) -> KVStorage: ...

    @property
    def window(self) -> Window | None: ...

    @property
    def length(self) -> int: ...

    @property
    def lengths(self) -> mx.array: ...

    @property
    def padding(self) -> mx.array | None: ...

    def reserve(self, rows: int, L: int) -> None: ...

    def advance(self, L: int, lengths: mx.array | None = None) -> None: ...


class Kind(NamedTuple):
    """What makes another graph, beside shapes."""

    storage: KVStorage
    window: Window | None
    last_only: bool


StepFunction = Callable[
    [mx.array, list[LayerArrays], mx.array, mx.array | None, mx.array | None],
    tuple[mx.array, list[LayerArrays], mx.array],
]


def _step(
    model: MixtralModel,
    kind: Kind,
    tokens: mx.array,
    layers: list[LayerArrays],
    lengths: mx.array,
    padding: mx.array | None,
    table: mx.array | None,
) -> tuple[mx.array, list[LayerArrays], mx.array]:
    length = tokens.shape[1]
    step = DecodeView(kind.storage, list(layers), lengths, padding, length, kind.window, table)
    logits = model.head(model.through_layers(tokens, step, last_only=kind.last_only))
    return logits, step.layers, lengths + length
