"""The next token of every row of a step, each as its own request has it, under one upload of masks."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_mixtral.constraints.base import ALL_ALLOWED, mask_words
from mlx_mixtral.generation.constrained import allowed_tokens
from mlx_mixtral.generation.rows import BatchRow
from mlx_mixtral.generation.sampling import Sampled

__all__ = ["draw"]


def draw(rows: Sequence[BatchRow], logits: mx.array) -> mx.array:
    """A token for each row of ``logits [B, V]``: sets ``unread`` and returns the tokens, lazy, ``[B]`` int32.

    Rows that want the likeliest share a kernel. Rows that feed earlier tokens again have nothing to read; what a request's
    own functions or its constraint raise ends its row, whose token means nothing.
    """
    allowed = _allowed(rows, logits)
    is_plain = [row.request.sampler.is_plain and not row.is_finished and not row.replay for row in rows]
    likeliest = _likeliest(logits, allowed) if any(is_plain) else None
    tokens: list[mx.array] = []
    for place, row in enumerate(rows):
        at, row.unread = slice(place, place + 1), None
        row.logits = logits[at] if row.is_constrained else None
        if row.is_finished or row.replay:
            tokens.append(mx.array([row.replay.popleft() if row.replay else 0], mx.int32))
            continue
        if likeliest is not None and is_plain[place]:
            row.unread = Sampled(likeliest[at])
        else:
            _draw(row, logits[at], None if allowed is None else allowed[at])
        tokens.append(mx.zeros(1, mx.int32) if row.unread is None else row.unread.token.astype(mx.int32))
    if likeliest is not None and all(is_plain):
        return likeliest
    return mx.concatenate(tokens)


def _likeliest(logits: mx.array, allowed: mx.array | None) -> mx.array:
    logits = logits.astype(mx.float32)
    if allowed is not None:
        logits = mx.where(allowed, logits, -mx.inf)
    return mx.argmax(logits, axis=-1).astype(mx.int32)


def _draw(row: BatchRow, logits: mx.array, allowed: mx.array | None) -> None:
    sampler = row.request.sampler
    try:
        # Under a constraint a token is recorded when it is known that it stays.
        row.unread = sampler.drawn(logits, allowed) if row.is_constrained else sampler(logits)
    except Exception as error:
        row.fail(error)


def _allowed(rows: Sequence[BatchRow], logits: mx.array) -> mx.array | None:
    """What the rows' constraints allow, ``[B, V]`` boolean: the host fills all masks, then there is one upload."""
    constrained = [(place, row) for place, row in enumerate(rows) if row.is_constrained]
    if not constrained:
        return None
    words = np.full((len(rows), mask_words(logits.shape[-1])), ALL_ALLOWED, np.int32)
    for place, row in constrained:
        assert row.request.constraint is not None
        try:
            words[place] = 0
            row.request.constraint.mask_into(words[place])
        except Exception as error:
            row.fail(error)
            words[place] = ALL_ALLOWED
    return allowed_tokens(words, logits.shape[-1])
