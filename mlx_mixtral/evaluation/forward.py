"""Windows through the model: log-probabilities come out, logits are never held for more than a chunk.

B rows, L tokens per row, n tokens of a chunk, K tokens kept of each distribution, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.generation.prefill import prefill
from mlx_mixtral.runtime.mixtral import Mixtral

__all__ = ["Scored", "TopTokens", "context_limit", "hidden_states", "predict", "score"]

# Numbers of logits computed at once: 16 MiB in float32.
LOGITS = 2**22
NOTHING = -1e30

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class TopTokens(NamedTuple):
    """Of each distribution K tokens' ids ``[n, K]``, their log-probabilities ``[n, K]``, and that of all others ``[n]``."""

    ids: Ids
    logprobs: Floats
    rest: Floats


class Scored(NamedTuple):
    """What a model makes of n tokens: log-probabilities ``[n]``, its own likeliest tokens ``[n]``, distributions."""

    logprobs: Floats
    best: Ids
    kept: TopTokens | None


def context_limit(model: Mixtral) -> int:
    """Tokens a sequence may have: the model's own, or those a memory budget holds KV cache for."""
    return model.engine.context_limit


def score(
    model: Mixtral, rows: Ids, targets: Ids, skip: int, *, top_k: int | None = None, ids: Ids | None = None
) -> list[Scored]:
    """Predict ``targets`` from ``rows``, one result a row.

    Softmax is computed in float32, whatever the compute type.

    Args:
        rows: int32 ``[B, L]``, tokens read.
        targets: int32 ``[B, L - skip]``: the token that follows each, from position ``skip`` on.
        skip: leading positions of which no prediction is wanted.
        top_k: keep this many of the likeliest tokens, likeliest first.
        ids: int32 ``[B, L - skip, K]``: keep these instead.

    Raises:
        CheckpointError: logits that are not finite.
    """
    parts: list[list[Scored]] = [[] for _ in rows]
    for at, hidden in hidden_states(model, rows, skip):
        places = slice(at - skip, at - skip + hidden.shape[1])
        found = predict(model, hidden, targets[:, places], top_k=top_k, ids=None if ids is None else ids[:, places])
        for part, piece in zip(parts, found, strict=True):
            part.append(piece)
    return [_joined(part) for part in parts]


def predict(
    model: Mixtral, hidden: mx.array, targets: Ids, *, top_k: int | None = None, ids: Ids | None = None
) -> list[Scored]:
    """As ``score``, from hidden states ``[B, n, D]``, one for each of ``targets [B, n]``."""
    parts: list[list[Scored]] = [[] for _ in targets]
    for start, stop in _pieces(hidden.shape[1], len(targets), model.config.vocab_size):
        logits = model.module.head(hidden[:, start:stop], model.module.adapter).astype(mx.float32)  # [B, n, V]
        wanted = None if ids is None else mx.array(ids[:, start:stop])
        for part, piece in zip(parts, _scored(logits, mx.array(targets[:, start:stop]), top_k, wanted), strict=True):
            part.append(piece)
    return [_joined(part) for part in parts]


def hidden_states(model: Mixtral, rows: Ids, skip: int = 0) -> Iterator[tuple[int, mx.array]]:
    """Hidden states ``[B, n, D]`` from position ``skip`` on, a chunk of the prompt at a time, each with its position."""
    cache = model.module.make_cache(max_tokens=rows.shape[1])
    for done, hidden in prefill(model.module, mx.array(rows), cache, model.engine.plan.chunk_tokens, first=skip):
        if hidden is not None:
            mx.eval(hidden, cache.arrays)
            yield done - hidden.shape[1], hidden


def _pieces(length: int, rows: int, vocab_size: int) -> Iterator[tuple[int, int]]:
    step = max(1, LOGITS // (rows * vocab_size))
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _scored(logits: mx.array, targets: mx.array, top_k: int | None, ids: mx.array | None) -> list[Scored]:
    total = mx.logsumexp(logits, axis=-1, keepdims=True)  # [B, n, 1]
    logprobs = (mx.take_along_axis(logits, targets[..., None], axis=-1) - total)[..., 0]
    best = mx.argmax(logits, axis=-1)
    outputs = [logprobs, best]
    if ids is None and top_k is not None:
        ids = _likeliest(logits, top_k)
    if ids is not None:
        kept = mx.take_along_axis(logits, ids, axis=-1) - total
        # Not -inf: the log of a sum of nothing would be NaN where all tokens are kept.
        others = mx.put_along_axis(logits, ids, mx.array(NOTHING), axis=-1)
        rest = mx.logsumexp(others, axis=-1) - total[..., 0]
        outputs += [ids, kept, mx.where(rest < NOTHING / 2, -mx.inf, rest)]
    mx.eval(outputs)
    arrays = [np.array(output) for output in outputs]
    if not np.isfinite(arrays[0]).all():
        raise CheckpointError(
            "the model's logits are not finite; the weights are damaged, or too large for the compute type: try float32"
        )
    if len(arrays) > 2:
        # A sum over the vocabulary in float32 is off by 1e-5: a distribution that sums to 1 in float64 is not.
        excess = np.log(np.exp(arrays[3], dtype=np.float64).sum(-1) + np.exp(arrays[4], dtype=np.float64))
        for index in (0, 3, 4):
            shift = excess if arrays[index].ndim == excess.ndim else excess[..., None]
            arrays[index] = (arrays[index] - shift).astype(np.float32)
    found = []
    for row in range(logits.shape[0]):
        kept_row = TopTokens(*(array[row] for array in arrays[2:])) if len(arrays) > 2 else None
        found.append(Scored(arrays[0][row], arrays[1][row].astype(np.int32), kept_row))
    return found


def _likeliest(logits: mx.array, top_k: int) -> mx.array:
    """Ids of the ``top_k`` largest, largest first, equal ones in order of id."""
    size = logits.shape[-1]
    if top_k < size:
        ids = mx.sort(mx.argpartition(-logits, top_k - 1, axis=-1)[..., :top_k], axis=-1)
    else:
        ids = mx.broadcast_to(mx.arange(size), logits.shape)
    values = np.array(mx.take_along_axis(logits, ids, axis=-1))
    order = np.argsort(-values, axis=-1, kind="stable")
    return mx.array(np.take_along_axis(np.array(ids), order, axis=-1).astype(np.int32))


def _joined(parts: Sequence[Scored]) -> Scored:
    logprobs = np.concatenate([part.logprobs for part in parts])
    best = np.concatenate([part.best for part in parts])
    kept = [part.kept for part in parts if part.kept is not None]
    if not kept:
        return Scored(logprobs, best, None)
    return Scored(logprobs, best, TopTokens(*(np.concatenate(arrays) for arrays in zip(*kept, strict=True))))
