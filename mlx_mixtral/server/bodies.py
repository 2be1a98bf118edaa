"""Bodies of requests, within their limits: bytes, JSON, depth, and text that UTF-8 can hold."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request

from mlx_mixtral.server.wire.errors import ApiError

__all__ = ["parse_body", "read_json_body"]

MAX_DEPTH = 64
MAX_VALUES = 500_000
WORKER_BYTES = 64_000
"""Bodies beyond it are parsed on another thread, so that streams go on meanwhile."""


async def read_json_body(request: Request, max_bytes: int) -> Any:
    """The JSON of a request's body.

    Raises:
        ApiError: 413, 415 or 400.
        starlette.requests.ClientDisconnect: the client went away before it was whole.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        said = f"is {kind[:60]!r}" if kind else "is missing"
        raise ApiError(415, f"the content type {said}; send application/json")
    data = await _read(request, max_bytes)
    return await asyncio.to_thread(parse_body, data) if len(data) > WORKER_BYTES else parse_body(data)


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = ApiError(
        413, f"the body has more than {max_bytes} bytes, the most this server takes", headers={"connection": "close"}
    )
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 12 or int(length) > max_bytes):
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def parse_body(data: bytes) -> Any:
    """JSON as RFC 8259 has it: no NaN, no lone surrogates, at most ``MAX_DEPTH`` levels.

    Raises:
        ApiError: 400.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}") from None
    if not text.strip():
        raise ApiError(400, "the body is empty; send a JSON object")
    try:
        parsed = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ApiError(400, f"the body is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        # Of an error only the reason and the place: never the text around it.
        where = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ApiError(400, f"the body is not JSON: {where}", code="invalid_json") from None
    if isinstance(parsed, str | dict | list):
        _check(parsed)
    return parsed


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which JSON has not")


def _check(parsed: Any) -> None:
    """Depth, count and text of a parsed body, without recursion."""
    waiting: list[tuple[Any, str, int]] = [(parsed, "", 1)]
    seen = 0
    while waiting:
        value, place, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ApiError(400, f"the body is nested more than {MAX_DEPTH} levels deep", _head(place))
        if isinstance(value, str):
            _check_text(value, place)
            continue
        seen += len(value)
        if seen > MAX_VALUES:
            raise ApiError(400, f"the body holds more than {MAX_VALUES} values", _head(place))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            inside = f"{place}[{key}]" if isinstance(key, int) else f"{place}.{key}" if place else key
            if isinstance(key, str):
                _check_text(key, place)
            if isinstance(item, str | dict | list):
                waiting.append((item, inside, depth + 1))


def _check_text(text: str, place: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ApiError.field(
            place or "the body", f"holds a lone surrogate U+{code:04X} at character {error.start}, which is no text"
        ) from None


def _head(place: str) -> str | None:
    """The field of the body a place is in."""
    return place.partition(".")[0].partition("[")[0] or None
