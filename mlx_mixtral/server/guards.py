"""What every request passes first: its Host, its Origin, its key, an id; and the one line of log it leaves."""

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
import time
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_mixtral.server.log import RequestLog, RequestNotes
from mlx_mixtral.server.metrics import Metrics
from mlx_mixtral.server.options import ServerOptions
from mlx_mixtral.server.replies import send_json
from mlx_mixtral.server.wire.errors import ApiError, error_body, is_anthropic

__all__ = ["Guards", "is_loopback", "notes_of"]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_OPEN_PATHS = frozenset({"/health", "/"})
"""Paths that need no key: they say nothing of anybody's requests."""

METHODS = "GET, HEAD, POST, OPTIONS"
"""All there are on some path."""


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's alone."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _address(host)
    return address is not None and address.is_loopback


def notes_of(scope: MutableMapping[str, Any]) -> RequestNotes:
    """What a request's line of log will say."""
    notes = scope["mlx_mixtral.notes"]
    assert isinstance(notes, RequestNotes)
    return notes


class Guards:
    """An ASGI application around ``app``: checks, CORS, errors as JSON, the log.

    Args:
        methods_of: those that the path of a scope takes; none where there is no such path.
    """

    def __init__(
        self,
        app: ASGIApp,
        methods_of: Callable[[Scope], Sequence[str]],
        options: ServerOptions,
        log: RequestLog,
        metrics: Metrics,
    ) -> None:
        self._app, self._methods_of = app, methods_of
        self._options, self._log, self._metrics = options, log, metrics
        self._keys = [key.encode() for key in options.api_keys]
        self._hosts = frozenset(host.lower() for host in options.allowed_hosts)
        self._takes_addresses = not is_loopback(options.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given_id = headers.get("x-request-id", "")
        request_id = given_id if _REQUEST_ID.fullmatch(given_id) else f"req-{secrets.token_hex(12)}"
        notes = scope["mlx_mixtral.notes"] = RequestNotes(request_id, scope["method"])
        scope["app"] = self
        _tidy_path(scope)
        started = time.monotonic()

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                notes.status = message["status"]
                added = MutableHeaders(scope=message)
                added["x-request-id"] = request_id
                if is_anthropic(scope["path"]):
                    added["request-id"] = request_id
                for name, value in self._cors(headers).items():
                    added[name] = value
            await send(message)

        try:
            await self._answer(scope, headers, receive, tell)
        except ClientDisconnect:
            notes.outcome = notes.outcome or "disconnected"
        except ApiError as error:
            notes.outcome = error.code or "error"
            await self._tell_error(scope, error, tell)
        except HTTPException as error:
            await self._tell_error(scope, self._plain_error(error, scope), tell)
        except Exception as error:
            # The type alone: a message may hold what a request said.
            self._log.problem(f"{type(error).__name__} while answering {request_id}", error)
            notes.outcome = "error"
            await self._tell_error(scope, ApiError(500, "the server failed to answer; its log has the reason"), tell)
        finally:
            self._metrics.count(
                "mlx_mixtral_requests_total", path=notes.path or "other", status=str(notes.status or 499)
            )
            self._log.request(notes, time.monotonic() - started)

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        self._check_host(headers)
        if scope["method"] not in ("GET", "HEAD"):
            self._check_origin(scope, headers)
        if scope["method"] == "OPTIONS":
            # Before the key: a browser asks first, and without one.
            if not (allowed := self._allowed_methods(scope)):
                raise HTTPException(404)
            start = {"type": "http.response.start", "status": 204, "headers": [(b"allow", allowed.encode())]}
            await send(start)
            await send({"type": "http.response.body", "body": b""})
            return
        if self._keys and scope["path"] not in _OPEN_PATHS:
            self._check_key(headers)
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        """Names that somebody else may point at this machine are refused: that is how pages of other sites reach it."""
        given = headers.get("host", "")
        host = _host_name(given)
        is_known = host in self._hosts or "*" in self._hosts or is_loopback(host)
        # An address cannot be pointed elsewhere by anybody's name server.
        if is_known or (self._takes_addresses and _address(host) is not None):
            return
        raise ApiError(
            403,
            f"the host name {given[:100]!r} is not one of this server's; start it with --allow-host {host[:60] or 'NAME'}",
        )

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or self._is_allowed(origin):
            return
        parts = urlsplit(origin)
        if parts.scheme == scope.get("scheme", "http") and parts.netloc.lower() == headers.get("host", "").lower():
            return
        raise ApiError(
            403, f"pages of {origin[:100]!r} may not use this server; start it with --cors-origin to allow it"
        )

    def _check_key(self, headers: Headers) -> None:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # All of them are compared, each in constant time: neither says how near a guess is, nor to which.
        matches = [hmac.compare_digest(given.encode(), key) for key in self._keys]
        if not any(matches):
            said = "is not valid" if given else "is missing"
            raise ApiError(
                401,
                f"the API key {said}; send it as Authorization: Bearer KEY, or as x-api-key: KEY",
                headers={"www-authenticate": "Bearer"},
            )

    def _is_allowed(self, origin: str) -> bool:
        return "*" in self._options.cors_origins or origin in self._options.cors_origins

    def _cors(self, headers: Headers) -> dict[str, str]:
        """https://fetch.spec.whatwg.org/#http-cors-protocol"""
        origin = headers.get("origin")
        if origin is None or not self._is_allowed(origin):
            return {"vary": "origin"} if self._options.cors_origins else {}
        found = {
            "access-control-allow-origin": origin,
            "vary": "origin",
            "access-control-expose-headers": "x-request-id, request-id, retry-after",
        }
        if "access-control-request-method" in headers:
            found["access-control-allow-methods"] = METHODS
            found["access-control-allow-headers"] = headers.get(
                "access-control-request-headers", "authorization, content-type"
            )
            found["access-control-max-age"] = "600"
            if headers.get("access-control-request-private-network") == "true":
                found["access-control-allow-private-network"] = "true"
        return found

    def _allowed_methods(self, scope: Scope) -> str:
        """As in ``Allow``; "" where there is no such path. The path ``*`` is the whole server."""
        if scope["path"] == "*":
            return METHODS
        methods = self._methods_of(scope)
        return ", ".join([*methods, "OPTIONS"]) if methods else ""

    def _plain_error(self, error: HTTPException, scope: Scope) -> ApiError:
        path = scope["path"][:100]
        if error.status_code == 405:
            headers = {"allow": self._allowed_methods(scope)}
            return ApiError(405, f"{path} does not take this method; it takes {headers['allow']}", headers=headers)
        return ApiError(error.status_code, f"there is no {path!r} here; /openapi.json lists what there is")

    @staticmethod
    async def _tell_error(scope: Scope, error: ApiError, send: Send) -> None:
        notes = notes_of(scope)
        if notes.status is None:
            body = error_body(error, scope["path"], notes.request_id)
            await send_json(body, send, status=error.status, headers=error.headers)


def _tidy_path(scope: Scope) -> None:
    """``//models/`` is ``/models``."""
    path = re.sub(r"/{2,}", "/", scope["path"])
    scope["path"] = path.rstrip("/") or "/"
    scope["raw_path"] = scope["path"].encode("utf-8", "surrogateescape")


def _host_name(given: str) -> str:
    try:
        return (urlsplit(f"//{given}").hostname or "").rstrip(".").lower()
    except ValueError:
        return ""


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
