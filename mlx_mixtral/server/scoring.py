"""Log-probabilities of a prompt's own tokens, a chunk at a time, so that generations beside it go on."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import mlx.core as mx
import numpy as np

from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.prefill import prefill
from mlx_mixtral.server.jobs import PromptScores

__all__ = ["prompt_scores"]


def prompt_scores(
    context: DecodeContext, tokens: Sequence[int], top: int, adapter: int | None = None
) -> Generator[None, None, PromptScores]:
    """Score ``tokens`` with an adapter, by its number: a step a chunk; the value is returned with the last.

    The stream of ``context`` is entered for each step, and never held across a ``yield``.
    """
    logprobs: list[float | None] = [None]
    likeliest: list[list[tuple[int, float]]] = [[]]
    if len(tokens) > 1:
        with mx.stream(context.stream):
            given = mx.array([list(tokens)], mx.int32)
            cache = context.model.make_cache(adapter=adapter)
            chunks = prefill(context.model, given, cache, context.chunk_tokens, first=0)
        done = 0
        while done < len(tokens):
            with mx.stream(context.stream):
                start = done
                done, hidden = next(chunks)
                assert hidden is not None
                following = tokens[start + 1 : done + 1]
                if following:
                    scores, found = _scored(
                        context.model.head(hidden, cache.adapter)[0, : len(following)], following, top
                    )
                    logprobs += scores
                    likeliest += found
            yield
    return PromptScores(logprobs, likeliest)


def _scored(logits: mx.array, following: Sequence[int], top: int) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Of ``logits [L, V]``: the log-probability of each of ``following``, and the ``top`` likeliest ids with theirs."""
    logits = logits.astype(mx.float32)
    values = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    ids = mx.array(list(following), mx.int32)
    chosen = mx.take_along_axis(values, ids[:, None], axis=-1)[:, 0]
    order = mx.argsort(-values, axis=-1)[:, :top]
    best = mx.take_along_axis(values, order, axis=-1)
    mx.eval(chosen, order, best)
    pairs = [
        list(zip(map(int, row), map(float, numbers), strict=True))
        for row, numbers in zip(np.asarray(order), np.asarray(best), strict=True)
    ]
    return [float(value) for value in np.asarray(chosen)], pairs
