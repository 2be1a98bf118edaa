"""The one loop over a prompt: chunk by chunk through the model, so that working memory does not grow with its length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.model.transformer import MixtralModel

__all__ = ["Prefilled", "last_hidden", "prefill"]


class Prefilled(NamedTuple):
    """A chunk that is done: ``done`` tokens are in the cache, and ``hidden [B, n, D]`` is there where it was wanted."""

    done: int
    hidden: mx.array | None


def prefill(
    model: MixtralModel,
    tokens: mx.array,
    cache: KVCache,
    chunk_tokens: int | Callable[[], int],
    *,
    first: int | None = None,
    lengths: Sequence[int] | None = None,
) -> Iterator[Prefilled]:
    """Take ``tokens [B, L]`` (int32) into ``cache``, at most ``chunk_tokens`` of each row at a time.

    Hidden states are given from position ``first`` on, of the last token alone when None. A chunk is evaluated before the next
    one begins; the last one is lazy, so that what follows from it can be scheduled with it.

    Args:
        chunk_tokens: a number, or what is asked before each chunk. No chunk is shorter than ``model.min_chunk_tokens``, so that
            none is rounded in another way: the one before the last is shorter for that, or as much longer.
        lengths: tokens of each row where some are shorter than ``L``, filled up behind their ends: these lie in one chunk.
    """
    length, done = tokens.shape[1], 0
    total, least = cache.length + length, model.min_chunk_tokens
    # What is left for the last chunk begins here at the latest.
    latest = (length if lengths is None else min(lengths)) - least
    while done < length:
        start, wanted = done, chunk_tokens() if callable(chunk_tokens) else chunk_tokens
        done = min(start + max(wanted, least), length)
        if latest < done < length:
            done = latest if latest - start >= least else length
        part = tokens[:, start:done]
        if done == length and first is None:
            ends = None if lengths is None else tuple(end - 1 - start for end in lengths)
            yield Prefilled(done, model.hidden(part, cache, last_only=True, total=total, ends=ends))
        elif first is None or done <= first:
            model.remember(part, cache, total=total)
            mx.eval(cache.arrays)
            yield Prefilled(done, None)
        else:
            hidden = model.hidden(part, cache, total=total)
            if done < length:
                mx.eval(hidden, cache.arrays)
            yield Prefilled(done, hidden[:, max(first - start, 0) :])


def last_hidden(model: MixtralModel, tokens: mx.array, cache: KVCache, chunk_tokens: int) -> mx.array:
    """``prefill`` to the end: the hidden state of each row's last token, ``[B, 1, D]``, lazy."""
    *_, last = prefill(model, tokens, cache, chunk_tokens)
    assert last.hidden is not None
    return last.hidden
