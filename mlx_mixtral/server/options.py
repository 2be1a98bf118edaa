"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlx_mixtral.generation.scheduler import DEFAULT_MAX_STALL_S

__all__ = ["MAX_CHOICES", "PoolingKind", "ServerOptions"]

PoolingKind = Literal["mean", "last"]

MAX_CHOICES = 8
"""Most continuations of one prompt."""


@dataclass(frozen=True)
class ServerOptions:
    """Limits, guards and names of a server. Seconds are wall-clock.

    Args:
        host, port: where it listens; port 0 takes a free one.
        api_keys: one of them is needed for every path but /health; none: no key is asked for.
        name, aliases: what requests may call the model.
        rows: generations at once; what the plan in force allows when None.
        queue: generations that may wait beside them; a request beyond is answered 429.
        queue_timeout_s: a generation that waited so long is answered 503.
        max_tokens: tokens of an answer when the request says nothing.
        max_stall_s: how long a chunk of a prompt may hold up the tokens of others.
        cors_origins: origins of other pages that may use the server from a browser; "*" for all.
        allowed_hosts: names beside the loopback ones by which it may be called.
        max_body_bytes: a longer body is answered 413.
        idle_unload_s: the weights are released after so long without a request, and loaded again at the next; None: never.
        tls_cert, tls_key: PEM files; both or neither.
        grace_s: at SIGTERM open requests have so long to finish.
        tools: how calls are written: see ``ToolChat``.
        pooling: how /v1/embeddings makes a vector of a text: "mean" or "last"; None: not at all.
        header_timeout_s: a connection must have sent its request's head after so long, and again for each request.
        body_timeout_s: a request's body must be there after so long.
        keep_alive_s: a connection without a request is kept so long.
        max_connections: beyond it the longest idle connection is closed for a new one.
        comment_s: a stream without news gets a comment so often.
        max_unsent_bytes: a stream's text that may wait for a slow reader; beyond it the generation ends.
        has_page: whether there is a page at / to talk with the model.
        log_format: "text", "json" or "none".
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    name: str = "mixtral"
    aliases: tuple[str, ...] = ()
    rows: int | None = None
    queue: int = 64
    queue_timeout_s: float = 120.0
    max_tokens: int = 2048
    max_stall_s: float = DEFAULT_MAX_STALL_S
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 2_000_000
    idle_unload_s: float | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    grace_s: float = 10.0
    tools: str = "auto"
    pooling: PoolingKind | None = None
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    keep_alive_s: float = 75.0
    max_connections: int = 1000
    comment_s: float = 5.0
    max_unsent_bytes: int = 1_000_000
    has_page: bool = True
    log_format: str = "text"

    @property
    def scheme(self) -> str:
        return "https" if self.tls_cert else "http"
