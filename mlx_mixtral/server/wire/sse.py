"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["COMMENT", "DONE", "SSE_HEADERS", "compact_json", "data_event"]

SSE_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
"""Of a stream; the last keeps nginx from holding it back."""

COMMENT = b": waiting\n\n"
"""Says that the connection lives; clients skip it."""

DONE = b"data: [DONE]\n\n"


def compact_json(value: Any) -> bytes:
    """UTF-8 without blanks."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def data_event(value: Any, name: str | None = None) -> bytes:
    """One event with JSON as its data, and its name where the protocol has names."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + compact_json(value) + b"\n\n"
