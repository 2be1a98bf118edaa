"""Vectors of texts: their last hidden states pooled, a few short texts or a chunk of a long one at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.prefill import prefill
from mlx_mixtral.generation.prompts import go_together
from mlx_mixtral.model.transformer import MixtralModel
from mlx_mixtral.server.jobs import PooledPrompt
from mlx_mixtral.server.options import PoolingKind

__all__ = ["pooled_prompts"]


def pooled_prompts(
    context: DecodeContext, prompts: Sequence[Sequence[int]], kind: PoolingKind, adapter: int | None = None
) -> Generator[list[PooledPrompt], None, None]:
    """The vector of each prompt, computed with an adapter, by its number: a step a chunk, with what became whole in it.

    Hidden states are those after the final norm. "mean" is their average over all tokens of a prompt, "last" that of its last
    token; either is divided by its length.

    The stream of ``context`` is entered for each step, and never held across a ``yield``.
    """
    for group in _groups(context.model, [len(prompt) for prompt in prompts], context.chunk_tokens):
        work = _pooled(context, [prompts[index] for index in group], kind, adapter)
        vectors: np.ndarray | None = None
        while vectors is None:
            with mx.stream(context.stream):
                vectors = next(work)
            found = [] if vectors is None else [PooledPrompt(*pair) for pair in zip(group, vectors, strict=True)]
            yield found


def _groups(model: MixtralModel, lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """Prompts that are computed together, by their numbers: with what fills up the shorter ones they fit into a chunk."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        wider = [lengths[each] for each in (*group, index)]
        if group and (len(wider) * max(wider) > most_tokens or not _fit_together(model, wider)):
            yield group
            group = []
        group.append(index)
    yield group


def _fit_together(model: MixtralModel, lengths: Sequence[int]) -> bool:
    # Some rope scalings turn a prompt by its length.
    is_alike = min(lengths) == max(lengths) or model.frequencies(max(lengths)) is None
    return is_alike and go_together(model, lengths)


def _pooled(
    context: DecodeContext, prompts: Sequence[Sequence[int]], kind: PoolingKind, adapter: int | None
) -> Iterator[np.ndarray | None]:
    """None for each chunk but the last, which gives ``[B, D]`` float32."""
    model, lengths = context.model, [len(prompt) for prompt in prompts]
    longest = max(lengths)
    filled = mx.array([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], mx.int32)
    uneven = None if min(lengths) == longest else lengths
    first = None if kind == "last" else 0
    chunk_tokens = max(1, context.chunk_tokens // len(prompts))
    cache = model.make_cache(adapter=adapter)
    chunks = prefill(model, filled, cache, chunk_tokens, first=first, lengths=uneven)
    ends = mx.array(lengths)[:, None]
    pooled = mx.zeros((len(prompts), 1), mx.float32)
    before = 0
    for done, hidden in chunks:
        if hidden is not None:
            states = model.final_norm(hidden, cache.adapter).astype(mx.float32)  # [B, n, D]
            counts = mx.arange(before, done)[None] < ends if kind == "mean" else mx.ones((len(prompts), 1))
            pooled = pooled + (states * counts[..., None]).sum(axis=1)
            mx.eval(pooled)
        before = done
        if done < longest:
            yield None
    # A mean has the direction of the sum.
    vectors = np.array(pooled, copy=True)
    yield vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
