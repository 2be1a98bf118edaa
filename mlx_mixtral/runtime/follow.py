"""A machine that follows the leader of its group: it repeats each forward on its part of the weights and caches."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_mixtral.cache.batch import BatchCache
from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.distributed.link import Link
from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.runtime.joining import sum_seconds
from mlx_mixtral.runtime.shared_prompts import collect, spread

__all__ = ["Follower"]


class Follower:
    """Carries out what the leader sends until it ends.

    Args:
        context: the model's, its link included.
    """

    def __init__(self, context: DecodeContext, link: Link) -> None:
        self._context, self._model, self._link = context, context.model, link
        self._caches: dict[int, Any] = {}

    def run(self) -> None:
        """Until the leader ends.

        Raises:
            CheckpointError: an expert cannot be read.
            RuntimeError: the connection was lost.
        """
        with mx.stream(self._context.stream):
            while True:
                found, tokens = self._link.receive()
                with self._link.group.deadline.armed("the other machines"):
                    for name, numbers in found:
                        if name == "end":
                            return
                        self._carry_out(name, numbers, tokens)

    def _carry_out(self, name: str, numbers: list[int], tokens: list[int]) -> None:
        own, *rest = numbers
        if name == "tick":
            return
        if name in ("hidden", "remember", "step"):
            *rest, rows, length = rest
            self._forward(name, self._caches[own], mx.array(tokens, mx.int32).reshape(rows, length), rest)
        elif name == "collect":
            collect(self._model, self._caches[own])
        elif name == "spread":
            spread(self._model, self._caches[own], None, rest[0])
        elif name == "time":
            sum_seconds(self._link.group, rest[0])
        elif name == "drop":
            self._caches.pop(own, None)
        elif name in ("trim", "join", "keep", "take_back"):
            self._change(name, self._caches[own], *rest)
        else:
            self._caches[own] = made = self._made(name, *rest)
            if isinstance(made, KVCache):
                mx.async_eval(made.arrays)

    def _made(self, how: str, source: int, *numbers: int) -> Any:
        model = self._model
        if how == "cache":
            most, adapter, *padding = numbers
            own = None if adapter < 0 else adapter
            return model.make_cache(padding or None, max_tokens=None if most < 0 else most, adapter=own)
        if how == "batch":
            empty = model.make_cache()
            return BatchCache(empty.storage, empty.window)
        held = self._caches[source]
        if how == "take":
            return held.take(numbers)
        return getattr(held, how)(*numbers)

    def _change(self, act: str, cache: Any, other: int, *numbers: int) -> None:
        if act == "join":
            keep, *flat = numbers
            cache.join(self._caches[other], list(zip(flat[::2], flat[1::2], strict=True)), keep=bool(keep))
        elif act == "keep":
            cache.keep(numbers)
        else:
            getattr(cache, act)(*numbers)

    def _forward(self, kind: str, cache: Any, tokens: mx.array, numbers: list[int]) -> None:
        if kind == "step":
            result = self._context.step(tokens, cache, last_only=bool(numbers[0]))
            mx.eval(result, [array for part in cache.parts for layer in part.layers for array in layer])
            return
        if kind == "remember":
            self._model.remember(tokens, cache, total=None if numbers[0] < 0 else numbers[0])
            mx.eval(cache.arrays)
            return
        last_only, total, count, *ends = numbers
        assert len(ends) == count
        x = self._model.hidden(
            tokens,
            cache,
            last_only=bool(last_only),
            total=None if total < 0 else total,
            ends=tuple(ends) if ends else None,
        )
        mx.eval(x, cache.arrays)
