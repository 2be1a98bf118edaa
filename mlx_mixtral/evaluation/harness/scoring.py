"""Log-probabilities of many continuations, batched; a context that several of them follow is read once.

G contexts read together, R rows of continuations, n tokens of the longest of them, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.errors import ContextLengthError
from mlx_mixtral.evaluation.forward import Scored, predict, score
from mlx_mixtral.evaluation.harness.encoding import Pair
from mlx_mixtral.generation.prefill import last_hidden
from mlx_mixtral.runtime.mixtral import Mixtral

__all__ = ["Answer", "score_pairs", "truncated"]

# Rows of different lengths are read together when padding adds no more than this share.
PADDING_SHARE = 0.25

T = TypeVar("T")


class Answer(NamedTuple):
    """Log-probability of a continuation in nats, and whether greedy decoding would write it."""

    logprob: float
    is_greedy: bool


class _Group(NamedTuple):
    """A context and the numbers of the pairs that have it."""

    context: tuple[int, ...]
    members: list[int]


def truncated(pair: Pair, size: int) -> Pair:
    """The pair with so much of its context cut off at the left that ``size`` tokens are read; the last one never is.

    Raises:
        ContextLengthError: a continuation that leaves no room for a token before it.
    """
    if len(pair.continuation) > size:
        raise ContextLengthError(
            f"a continuation of {len(pair.continuation)} tokens was asked for; the model's context holds {size}"
        )
    return Pair(pair.context[-(size + 1 - len(pair.continuation)) :], pair.continuation)


def score_pairs(model: Mixtral, pairs: Sequence[Pair], rows: int, done: Callable[[int, Answer], None]) -> None:
    """Call ``done`` with the number of every pair and its answer, longest first; none is longer than the model's context.

    Args:
        rows: most rows of a batch; fewer where a chunk of a prompt or the memory budget's KV cache holds no more.

    Raises:
        CheckpointError: logits that are not finite.
    """
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        by_context.setdefault(pair.context, []).append(index)
    single: list[int] = []
    shared: list[_Group] = []
    for context, members in by_context.items():
        longest = max(len(pairs[index].continuation) for index in members)
        if len(members) > 1 and len(context) >= longest and _can_share(model, len(context) + longest):
            shared.append(_Group(context, members))
        else:
            single += members
    lengths = [len(pair.context) + len(pair.continuation) for pair in pairs]
    for batch in _batches(model, sorted(single, key=lambda index: -lengths[index]), lambda i: lengths[i], rows):
        for index, answer in zip(batch, _score_single(model, [pairs[index] for index in batch]), strict=True):
            done(index, answer)
    shared.sort(key=lambda group: -len(group.context))
    for groups in _batches(model, shared, lambda group: len(group.context), rows):
        for index, answer in _score_shared(model, groups, pairs, rows):
            done(index, answer)


def _can_share(model: Mixtral, columns: int) -> bool:
    """Whether nothing of a context is overwritten, and its KV cache may be held twice."""
    plan = model.engine.plan
    fits = plan.budget_bytes is None or plan.kv_columns >= 2 * columns
    if model.config.rope.table_of(columns):  # keys of the context are turned by the length of the whole
        return False
    return fits and model.module.kv.window(model.config) is None


def _batches(model: Mixtral, items: Sequence[T], length: Callable[[T], int], rows: int) -> Iterator[list[T]]:
    """Items in their order, longest first, as many as a chunk of a prompt has tokens, about equally long."""
    plan = model.engine.plan
    batch: list[T] = []
    for item in items:
        longest = length(batch[0]) if batch else length(item)
        columns = (len(batch) + 1) * longest
        fits = columns <= plan.chunk_tokens and length(item) >= (1 - PADDING_SHARE) * longest
        rope = model.config.rope  # of what is read, all but the last token
        fits = fits and rope.table_of(length(item) - 1) == rope.table_of(longest - 1)
        if batch and (len(batch) == rows or not fits):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _score_single(model: Mixtral, pairs: Sequence[Pair]) -> Iterator[Answer]:
    """Each pair as a row, padded at the right: nothing sees what comes after it."""
    inputs = [(pair.context + pair.continuation)[:-1] for pair in pairs]
    firsts = [len(pair.context) - 1 for pair in pairs]
    longest, skip = max(map(len, inputs)), min(firsts)
    targets = [(pair.context + pair.continuation)[skip + 1 :] for pair in pairs]
    found = score(model, _padded(inputs, longest), _padded(targets, longest - skip), skip)
    for pair, first, scored in zip(pairs, firsts, found, strict=True):
        yield _answer(pair, scored, first - skip)


def _score_shared(
    model: Mixtral, groups: Sequence[_Group], pairs: Sequence[Pair], rows: int
) -> Iterator[tuple[int, Answer]]:
    """Contexts as rows, aligned at their ends, and then their continuations, each after a copy of its context."""
    longest = max(len(group.context) for group in groups)
    padding = [longest - len(group.context) for group in groups]
    tokens = np.array([[0] * pad + list(group.context) for pad, group in zip(padding, groups, strict=True)], np.int32)
    cache = model.module.make_cache(padding, max_tokens=longest)
    chunk = max(1, model.engine.plan.chunk_tokens // len(groups))
    last = last_hidden(model.module, mx.array(tokens), cache, chunk)  # [G, 1, D]
    mx.eval(last, cache.arrays)
    members = [(place, index) for place, group in enumerate(groups) for index in group.members]
    members.sort(key=lambda member: -len(pairs[member[1]].continuation))
    while members:
        count = _rows(model, longest, len(groups), len(pairs[members[0][1]].continuation), rows)
        batch, members = members[:count], members[count:]
        places = [place for place, _ in batch]
        chosen = [pairs[index] for _, index in batch]
        n = len(chosen[0].continuation)
        hidden = last[mx.array(places)]  # [R, 1, D]
        if n > 1:
            inputs = _padded([pair.continuation[:-1] for pair in chosen], n - 1)
            more = model.module.hidden(mx.array(inputs), cache.take(places))
            hidden = mx.concatenate([hidden, more], axis=1)  # [R, n, D]
        found = predict(model, hidden, _padded([pair.continuation for pair in chosen], n))
        for (_, index), scored in zip(batch, found, strict=True):
            yield index, _answer(pairs[index], scored, 0)


def _rows(model: Mixtral, context: int, groups: int, continuation: int, rows: int) -> int:
    """Continuations to read at once."""
    plan = model.engine.plan
    count = min(rows, plan.chunk_tokens // continuation)
    if plan.budget_bytes is not None:
        count = min(count, plan.kv_columns // (context + continuation) - groups)
    return max(1, count)


def _padded(rows: Sequence[Sequence[int]], length: int) -> npt.NDArray[np.int32]:
    padded = np.zeros((len(rows), length), np.int32)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded


def _answer(pair: Pair, scored: Scored, first: int) -> Answer:
    places = slice(first, first + len(pair.continuation))
    logprob = float(scored.logprobs[places].sum(dtype=np.float64))
    return Answer(logprob, scored.best[places].tolist() == list(pair.continuation))
