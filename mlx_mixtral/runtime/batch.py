"""Text of several generations at once: the scheduler's tokens put together row by row."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import mlx.core as mx

from mlx_mixtral.generation.scheduler import Scheduler
from mlx_mixtral.runtime.engine import Engine
from mlx_mixtral.runtime.requests import TextRequest
from mlx_mixtral.runtime.steps import Steps
from mlx_mixtral.runtime.stream import Chunk, Generation

__all__ = ["DEFAULT_ROWS", "collect_batch", "stream_batch"]

DEFAULT_ROWS = 8


def stream_batch(engine: Engine, scheduler: Scheduler, requests: Sequence[TextRequest]) -> Steps[tuple[int, Chunk]]:
    """Chunks with the number of the request they belong to, as they come; the last of each has its finish reason."""
    return engine.opened(_chunks(engine, scheduler, requests))


def _chunks(
    engine: Engine, scheduler: Scheduler, requests: Sequence[TextRequest]
) -> Generator[tuple[int, Chunk], None, None]:
    with engine.running():
        engine.prompt_cache.free()
        # Prompts of about the same length are computed together.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].request.tokens))
        index_of = {scheduler.submit(requests[index].request): index for index in order}
        while not scheduler.is_idle:
            for ticket, token in scheduler.step():
                made = requests[index_of[ticket]]
                made.request.stats.peak_memory_bytes = mx.get_peak_memory()
                chunk = made.text.chunk(token)
                if made.text.is_finished:
                    scheduler.finish(ticket)
                yield index_of[ticket], chunk


def collect_batch(chunks: Iterator[tuple[int, Chunk]], requests: Sequence[TextRequest]) -> list[Generation]:
    """All of them run to their end."""
    rows: list[list[Chunk]] = [[] for _ in requests]
    for index, chunk in chunks:
        rows[index].append(chunk)
    return [Generation.of(row, made.request.stats) for row, made in zip(rows, requests, strict=True)]
