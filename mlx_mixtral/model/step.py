"""One step of decoding as one graph: compiled once for a size of the cache, whatever the number of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import mlx.core as mx

from mlx_mixtral.cache.choice import AdapterChoice
from mlx_mixtral.cache.storage import KVStorage, LayerArrays
from mlx_mixtral.cache.views import CacheView, DecodeView, GroupedDecodeView
from mlx_mixtral.cache.window import Window
from mlx_mixtral.layers.compiled import Compiled
from mlx_mixtral.model.transformer import MixtralModel

__all__ = ["DecodeStep", "StepCache"]


class DecodeStep:
    """Computes the next token's logits; replays a compiled graph, so that Python does the same work for 2 layers and for 32.

    Where a token is in the cache is an array to it, not a number: the graph of one step is the graph of all, until the cache
    grows. The cache's arrays go in and come out, and nothing else holds them when MLX computes, so they are written in place.
    Rows of a batch that lie in several groups of arrays are attended to group by group, and share everything else.

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
        link = self._model.link
        if link is None:
            return self._step(tokens, cache, last_only=last_only)
        with link.forward("step", cache, tokens, last_only) as sent:
            logits = self._step(sent, cache, last_only=last_only)
            mx.async_eval(logits, [array for part in cache.parts for layer in part.layers for array in layer])
        return logits

    def _step(self, tokens: mx.array, cache: StepCache, *, last_only: bool) -> mx.array:
        model, (rows, L) = self._model, tokens.shape
        cache.reserve(rows, L)
        run = self._run(Kind(cache.storage, cache.window, last_only, cache.adapter))
        table = model.frequencies(cache.length + L)
        parts, orders = cache.parts, cache.orders
        held = [(part.layers, part.lengths, part.padding) for part in parts]
        logits, after = run(tokens if orders is None else tokens[orders[0]], held, table)
        for part, (layers, lengths) in zip(parts, after, strict=True):
            part.layers = layers
            part.advance(L, lengths)
        return logits if orders is None else logits[orders[1]]

    def _run(self, kind: Kind) -> StepFunction:
        run = partial(_step, self._model, kind)
        link = self._model.link
        # Where layers lie on several machines the host waits between them.
        is_cut = link is not None and link.share.split == "layers"
        if not self._is_compiled or self._model.is_streamed or is_cut:
            return run
        if kind not in self._compiled:
            self._compiled[kind] = Compiled(run)
        return self._compiled[kind]


class StepPart(Protocol):
    """Rows that lie in the same arrays."""

    layers: list[LayerArrays]

    @property
    def lengths(self) -> mx.array: ...

    @property
    def padding(self) -> mx.array | None: ...

    def advance(self, L: int, lengths: mx.array | None = None) -> None: ...


class StepCache(Protocol):
    """What a step asks of a cache: ``KVCache`` and ``BatchCache`` both."""

    @property
    def storage(self) -> KVStorage: ...

    @property
    def window(self) -> Window | None: ...

    @property
    def adapter(self) -> AdapterChoice: ...

    @property
    def length(self) -> int: ...

    @property
    def parts(self) -> Sequence[StepPart]: ...

    @property
    def orders(self) -> tuple[mx.array, mx.array] | None: ...

    def reserve(self, rows: int, L: int) -> None: ...


class Kind(NamedTuple):
    """What makes another graph, beside shapes."""

    storage: KVStorage
    window: Window | None
    last_only: bool
    adapter: AdapterChoice


HeldPart = tuple[list[LayerArrays], mx.array, mx.array | None]
StepFunction = Callable[
    [mx.array, list[HeldPart], mx.array | None],
    tuple[mx.array, list[tuple[list[LayerArrays], mx.array]]],
]


def _step(
    model: MixtralModel, kind: Kind, tokens: mx.array, parts: list[HeldPart], table: mx.array | None
) -> tuple[mx.array, list[tuple[list[LayerArrays], mx.array]]]:
    length = tokens.shape[1]
    views = [
        DecodeView(kind.storage, list(layers), lengths, padding, length, kind.window, table, kind.adapter)
        for layers, lengths, padding in parts
    ]
    view: CacheView = views[0] if len(views) == 1 else GroupedDecodeView(views, kind.adapter)
    hidden = model.through_layers(tokens, view, last_only=kind.last_only)
    logits = model.head(hidden, kind.adapter) if model.link is None or model.link.is_leader else hidden
    return logits, [(view.layers, lengths + length) for view, (_, lengths, _) in zip(views, parts, strict=True)]
