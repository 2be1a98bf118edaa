"""Text of several generations at once: the scheduler's tokens put together row by row."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence

import mlx.core as mx

from mlx_mixtral.budget.demands import MemoryPlan
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.generation.scheduler import Scheduler, SequenceRequest
from mlx_mixtral.model.step import DecodeStep
from mlx_mixtral.model.transformer import MixtralModel
from mlx_mixtral.runtime.requests import Request
from mlx_mixtral.runtime.stream import Chunk, Generation

__all__ = ["DEFAULT_ROWS", "collect_batch", "make_scheduler", "stream_batch"]

DEFAULT_ROWS = 8


def make_scheduler(
    module: MixtralModel, step: DecodeStep, planned: MemoryPlan, context: int, max_rows: int, stream: mx.Stream
) -> Scheduler:
    """A scheduler of ``max_rows`` rows, within what was planned; no sequence has more than ``context`` tokens.

    Raises:
        InvalidRequestError: not a number of rows.
    """
    if not isinstance(max_rows, int) or isinstance(max_rows, bool) or max_rows < 1:
        raise InvalidRequestError(f"max_rows is {max_rows!r}; it must be an integer of at least 1")
    return Scheduler(
        module,
        step,
        lambda padding: module.make_cache(padding, max_tokens=context),
        stream=stream,
        max_rows=max_rows,
        max_columns=None if planned.budget_bytes is None else planned.demands.kv_columns,
        prefill_chunk=planned.chunk_tokens,
    )


def stream_batch(
    scheduler: Scheduler,
    requests: Sequence[Request],
    guard: contextlib.AbstractContextManager[None],
    memory: contextlib.AbstractContextManager[None],
    sequences: Sequence[SequenceRequest],
    stream: mx.Stream,
) -> Generator[tuple[int, Chunk], None, None]:
    """Chunks with the number of the request they belong to, as they come; the last of each has its finish reason."""
    with guard, memory:
        mx.reset_peak_memory()
        try:
            # PromptCache of about the same length are computed together.
            order = sorted(range(len(requests)), key=lambda index: -len(requests[index].tokens))
            index_of = {scheduler.submit(sequences[index]): index for index in order}
            while not scheduler.is_idle:
                for ticket, token in scheduler.step():
                    index = index_of[ticket]
                    stats = sequences[index].stats
                    stats.peak_memory_bytes = mx.get_peak_memory()
                    shown, reason = requests[index].text.add(token.token_id, stats.tokens)
                    if reason is not None:
                        scheduler.finish(ticket)
                    yield index, Chunk(shown, token.token_id, token.logprob, token.top_logprobs, reason)
        finally:
            # The step scheduled ahead may still run: a program that ends now would take MLX's threads down under it.
            mx.synchronize(stream)


def collect_batch(chunks: Iterator[tuple[int, Chunk]], sequences: Sequence[SequenceRequest]) -> list[Generation]:
    """All of them run to their end."""
    rows: list[list[Chunk]] = [[] for _ in sequences]
    for index, chunk in chunks:
        rows[index].append(chunk)
    return [Generation.of(row, sequence.stats) for row, sequence in zip(rows, sequences, strict=True)]
