"""Decoder layers that lie on several machines, one run of them after the other."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from mlx_mixtral.cache.choice import AdapterChoice
from mlx_mixtral.cache.views import CacheView
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.distributed.link import Link

__all__ = ["through_stages"]


class Staged(Protocol):
    """What is asked of a model whose layers lie on several machines: ``MixtralModel``."""

    config: MixtralConfig
    dtype: mx.Dtype

    def embed(self, tokens: mx.array, choice: AdapterChoice = None) -> mx.array: ...

    def stage(self, x: mx.array, view: CacheView, *, last_only: bool = False) -> mx.array: ...

    def remember_stage(self, x: mx.array, view: CacheView) -> None: ...


def through_stages(
    model: Staged,
    link: Link,
    tokens: mx.array,
    view: CacheView,
    *,
    last_only: bool = False,
    remembers: bool = False,
) -> mx.array:
    """``tokens [B, L]`` through the layers of all machines: hidden states ``[B, L, D]`` on each, or ``[B, 1, D]``.

    States go from machine to machine as sums to which the others add zeros: every machine takes part in every collective, so
    that they come in one order. A machine waits on the host for what enters its layers: a GPU that waits for another machine
    is ended by macOS after some seconds.

    Args:
        remembers: of the last layer only keys and values are wanted; what is returned means nothing.
    """
    (rows, length), width, size, rank = tokens.shape, model.config.hidden_size, link.group.size, link.group.rank
    x: mx.array | None = None
    for stage in range(size):
        is_last = stage == size - 1
        if stage == rank:
            if x is None:
                assert stage == 0
                x = model.embed(tokens, view.adapter)
            else:
                mx.eval(x)
            if is_last and remembers:
                model.remember_stage(x, view)
                break
            x = model.stage(x, view, last_only=last_only and is_last)
        if is_last and remembers:
            break
        shape = (rows, 1 if is_last and last_only else length, width)
        own = x if stage == rank and x is not None else mx.zeros(shape, model.dtype)
        x = link.group.from_rank(stage, own, x)
        # Whoever needs nothing of it takes part as well, and now: collectives come in one order.
        mx.async_eval(x)
    assert x is not None
    return x
