"""Replies as they are sent: JSON, and streams of events that are watched for a client that goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from starlette.types import Receive, Send

from mlx_mixtral.server.jobs import ServerJob
from mlx_mixtral.server.wire.sse import SSE_HEADERS, compact_json

__all__ = ["send_body", "send_events", "send_json", "watching"]

_JSON = (b"content-type", b"application/json")


async def send_json(value: Any, send: Send, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
    """A whole reply."""
    await send_body(compact_json(value), send, status=status, headers=headers)


async def send_body(body: bytes, send: Send, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
    """A whole reply, JSON already."""
    extra = [(name.lower().encode(), text.encode("latin-1")) for name, text in (headers or {}).items()]
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [_JSON, length, *extra]})
    await send({"type": "http.response.body", "body": body})


async def send_events(parts: AsyncIterator[bytes], send: Send) -> None:
    """A stream: its head at once, then each part as it comes."""
    await send({"type": "http.response.start", "status": 200, "headers": list(SSE_HEADERS)})
    await send({"type": "http.response.body", "body": b"", "more_body": True})
    async for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def watching(receive: Receive, jobs: Iterable[ServerJob]) -> AsyncIterator[None]:
    """Abandon ``jobs`` as soon as the client goes away; its request must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        for job in jobs:
            job.abandon()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
