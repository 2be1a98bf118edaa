"""Logits for every position of a text."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.prefill import prefill

__all__ = ["all_logits"]


def all_logits(context: DecodeContext, tokens: Sequence[int]) -> mx.array:
    """Logits ``[L, V]`` (in the compute type, evaluated) for every position of ``tokens``, computed in chunks."""
    model, parts = context.model, list[mx.array]()
    cache = model.make_cache()
    for _, hidden in prefill(model, mx.array([list(tokens)], mx.int32), cache, context.chunk_tokens, first=0):
        assert hidden is not None
        parts.append(model.head(hidden, cache.adapter)[0])
        mx.eval(parts[-1])
    result = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    mx.eval(result)
    return result
