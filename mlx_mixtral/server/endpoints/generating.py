"""From a checked request to its reply: the job, the stream of its events, the counts at the end."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Send

from mlx_mixtral.server.guards import notes_of
from mlx_mixtral.server.jobs import Ended, Failed, Pooling, ReplyPart, RowSpec, RowUsage, Scoring, ServerJob
from mlx_mixtral.server.log import RequestNotes
from mlx_mixtral.server.protocol import abort_connection
from mlx_mixtral.server.replies import send_body, send_events, watching
from mlx_mixtral.server.service import Service
from mlx_mixtral.server.wire.reply import Reply, StreamedReply

__all__ = ["generate", "reply_head", "usage_of"]


def reply_head(service: Service, kind: str, model: str) -> dict[str, Any]:
    """What each reply and each of its chunks begins with."""
    return {
        "id": f"{kind}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": service.served.fingerprint,
    }


def usage_of(prompts: Sequence[int], usage: Sequence[RowUsage]) -> dict[str, Any]:
    """Counts of tokens; a prompt that several answers continue counts once.

    Args:
        prompts: lengths of the request's prompts.
        usage: of its answers, in order; the same number for each prompt.
    """
    generated = sum(row.tokens for row in usage)
    each = max(1, len(usage) // max(1, len(prompts)))
    cached = sum(row.cached_tokens for row in usage[::each])
    return {
        "prompt_tokens": sum(prompts),
        "completion_tokens": generated,
        "total_tokens": sum(prompts) + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


async def generate(
    service: Service,
    request: Request,
    send: Send,
    rows: Sequence[RowSpec],
    reply: Reply,
    *,
    prompts: Sequence[int],
    is_stream: bool = False,
    scoring: Scoring | None = None,
    pooling: Pooling | None = None,
) -> None:
    """Carry out ``rows``, and send the reply.

    Args:
        prompts: lengths of the request's prompts.
        is_stream: ``reply`` is a ``StreamedReply`` then.
        scoring: log-probabilities of prompts that are wanted as well.
        pooling: vectors of prompts that are wanted.

    Raises:
        ApiError: instead of a reply; of a stream that has begun it is an event.
        ClientDisconnect: the client went away.
    """
    job = ServerJob(rows, scoring, pooling, max_unsent_bytes=service.options.max_unsent_bytes)
    notes = notes_of(request.scope)
    notes.is_stream, notes.rows, notes.prompt_tokens = is_stream, len(rows), sum(prompts)
    service.admission.join(job, on_overflow=lambda: abort_connection(request.scope))
    try:
        async with watching(request.receive, (job,)):
            if is_stream and isinstance(reply, StreamedReply):
                await send_events(_parts(service, job, reply, prompts, notes), send)
            else:
                usage = await _collect(job, reply, prompts)
                await send_body(reply.body(usage), send)
        if job.is_abandoned or job.is_overflowing:
            notes.outcome = "slow_reader" if job.is_overflowing else "disconnected"
            raise ClientDisconnect
    finally:
        service.admission.leave(job)
        _note(service, job, notes)


async def _collect(job: ServerJob, reply: Reply, prompts: Sequence[int]) -> dict[str, Any]:
    while True:
        for event in await job.next(None):
            if isinstance(event, ReplyPart):
                reply.add(event)
            elif isinstance(event, Ended):
                return usage_of(prompts, event.usage)
            elif isinstance(event, Failed):
                raise event.error
        if job.is_abandoned:
            raise ClientDisconnect


async def _parts(
    service: Service, job: ServerJob, reply: StreamedReply, prompts: Sequence[int], notes: RequestNotes
) -> AsyncIterator[bytes]:
    """Events as they are sent; those that came with one step are one part."""
    if first := reply.first():
        yield reply.encoded(first)
    while not job.is_abandoned:
        events = await job.next(service.options.comment_s)
        part = b"" if events or job.is_abandoned else reply.waiting
        for event in events:
            if isinstance(event, ReplyPart):
                part += reply.encoded(reply.add(event))
            elif isinstance(event, Ended):
                usage = usage_of(prompts, event.usage)
                yield part + reply.encoded(reply.last(usage)) + reply.end
                return
            elif isinstance(event, Failed):
                notes.outcome = event.error.code or "error"
                yield part + reply.encoded(reply.failed(event.error)) + reply.end
                return
        if part:
            yield part


def _note(service: Service, job: ServerJob, notes: RequestNotes) -> None:
    metrics, now = service.metrics, time.monotonic()
    notes.generated_tokens = job.tokens
    notes.cached_tokens = job.cached_tokens
    notes.adapter = job.adapter
    label = {} if job.adapter is None else {"adapter": job.adapter}
    metrics.count("mlx_mixtral_generated_tokens_total", job.tokens, **label)
    metrics.count("mlx_mixtral_prompt_tokens_total", notes.prompt_tokens or 0, **label)
    metrics.count("mlx_mixtral_cached_prompt_tokens_total", job.cached_tokens, **label)
    metrics.observe("mlx_mixtral_request_seconds", now - job.opened_at)
    if job.began_at is not None:
        notes.queued_s = job.began_at - job.opened_at
        metrics.observe("mlx_mixtral_queue_seconds", notes.queued_s)
    if job.first_token_at is not None:
        notes.first_token_s = job.first_token_at - job.opened_at
        metrics.observe("mlx_mixtral_time_to_first_token_seconds", notes.first_token_s)
        steps = job.tokens / max(1, len(job.rows)) - 1
        if steps >= 1:
            metrics.observe("mlx_mixtral_step_seconds", (now - job.first_token_at) / steps)
