"""uvicorn's HTTP/1.1 protocol with limits it has not: time for a head and a body, and a bounded number of connections.

A connection that sends half a request would be kept for ever otherwise, and enough of them lock everybody out.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from mlx_mixtral.server.wire.errors import ApiError, error_body

__all__ = ["ConnectionLimits", "abort_connection", "limited_protocol"]

LINGER_S = 2.0
_CONNECTION = "mlx_mixtral.connection"


@dataclass(frozen=True)
class ConnectionLimits:
    """Seconds and counts, named as in ``ServerOptions``."""

    header_timeout_s: float
    body_timeout_s: float
    max_connections: int
    max_lingering_bytes: int


def abort_connection(scope: MutableMapping[str, Any]) -> None:
    """Close a request's connection at once, whatever is still to be sent."""
    connection = scope.get("state", {}).get(_CONNECTION)
    if isinstance(connection, asyncio.Protocol):
        connection.transport.abort()  # type: ignore[attr-defined]


class _PatientTransport:
    """A transport whose ``close`` leaves a client that is still sending its body the time to read the reply.

    To close a socket with unread data resets it, and what was sent may be lost on the way
    (https://www.rfc-editor.org/rfc/rfc9112#section-9.6).
    """

    def __init__(self, transport: Any, protocol: Any) -> None:
        self._transport, self._protocol = transport, protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        transport = self._transport
        is_sending = self._protocol.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if not is_sending or transport.is_closing() or not transport.can_write_eof():
            transport.close()
        elif not self._protocol.is_lingering:
            self._protocol.linger()
            transport.write_eof()


class _Limited(H11Protocol):
    """One connection."""

    limits: ConnectionLimits

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, {**app_state, _CONNECTION: self}, _loop)
        self._deadline: asyncio.TimerHandle | None = None
        self._waits_for: object = None
        self.is_lingering = False
        self._discarded_bytes = 0
        self._idle_since = self.loop.time()

    def connection_made(self, transport: Any) -> None:
        self._make_room()
        # asyncio does so only for sockets that were made with the protocol's number. A reply's second packet would wait for the
        # receipt of the first, which clients delay by 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(_PatientTransport(transport, self))  # type: ignore[arg-type]
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self.is_lingering:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > self.limits.max_lingering_bytes:
                self.transport.pause_reading()
            return
        super().data_received(data)
        self._watch()

    def eof_received(self) -> None:
        if self.is_lingering:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._drop_deadline()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()
        self._watch()

    def linger(self) -> None:
        """Read on for a while, and take nothing of it."""
        self.is_lingering = True
        self._drop_deadline()
        self.flow.resume_reading()
        self._deadline = self.loop.call_later(LINGER_S, self.transport.abort)

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def idle_since(self) -> float:
        """The loop's time at which it became idle."""
        return self._idle_since

    def _watch(self) -> None:
        """Arm the timer of what is waited for now: the rest of a head, or of a body."""
        if self.is_lingering or self.transport.is_closing():
            return
        waits_for: object = None
        if self.conn.their_state is h11.SEND_BODY and self.cycle is not None and not self.cycle.response_complete:
            waits_for = self.cycle
        elif self.conn.their_state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):
            waits_for = "head"
        if waits_for == self._waits_for:
            return
        self._drop_deadline()
        self._waits_for = waits_for
        if waits_for is not None:
            seconds = self.limits.header_timeout_s if waits_for == "head" else self.limits.body_timeout_s
            self._deadline = self.loop.call_later(seconds, self._timed_out, waits_for == "head")

    def _timed_out(self, is_head: bool) -> None:
        if self.transport.is_closing():
            return
        if is_head and not self.conn.trailing_data[0]:
            self.transport.close()  # it never said anything
            return
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        what, seconds = ("head", self.limits.header_timeout_s) if is_head else ("body", self.limits.body_timeout_s)
        error = ApiError(408, f"the request's {what} was not there after {seconds:g} s")
        path = "" if self.cycle is None or is_head else self.cycle.scope["path"]
        body = json.dumps(error_body(error, path)).encode()
        head = f"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport._transport.close()  # type: ignore[attr-defined]

    def _drop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._waits_for = None

    def _make_room(self) -> None:
        """Close a connection that waits for a request, the one that has been idle longest, when there are too many."""
        if len(self.connections) < self.limits.max_connections:
            return
        idle = [each for each in self.connections if isinstance(each, _Limited) and each.is_idle]
        if idle:
            # First those that never made a request: another's client may be about to use it again.
            oldest = min(idle, key=lambda each: (each.cycle is not None, each.idle_since))
            self.connections.discard(oldest)
            oldest.transport.close()


def limited_protocol(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """A class for uvicorn's ``http``."""
    return type("LimitedProtocol", (_Limited,), {"limits": limits})
