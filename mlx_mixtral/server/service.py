"""What all endpoints share."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from mlx_mixtral.calls.chat import ToolChat
from mlx_mixtral.constraints.compiler import Compiler
from mlx_mixtral.constraints.token_table import TokenTable
from mlx_mixtral.server.admission import Admission
from mlx_mixtral.server.engine_thread import EngineThread
from mlx_mixtral.server.guards import notes_of
from mlx_mixtral.server.log import RequestLog
from mlx_mixtral.server.metrics import Metrics
from mlx_mixtral.server.options import ServerOptions
from mlx_mixtral.server.served import ServedModel

__all__ = ["Endpoint", "Service"]

GRAMMAR_THREADS = 2


@dataclass
class Service:
    """A model that is served, and who serves it."""

    served: ServedModel
    engine: EngineThread
    options: ServerOptions
    admission: Admission
    metrics: Metrics
    log: RequestLog
    chat: ToolChat
    grammars: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(GRAMMAR_THREADS, "mlx-mixtral-grammar")
    )
    """Compiles constraints; nothing else runs there."""
    connections: Callable[[], int] = lambda: 0
    """How many are open."""
    started_at: float = field(default_factory=time.monotonic)

    @cached_property
    def compiler(self) -> Compiler:
        """Keeps what it compiled; the vocabulary's table is made at its first use.

        Raises:
            MissingDependencyError: llguidance is not installed.
        """
        served = self.served
        return Compiler(TokenTable(served.tokenizer, served.vocab_size, served.eos_token_ids))


class Endpoint:
    """One path as an ASGI application.

    Args:
        path: as the log and the metrics call it.
        answer: told the request and how to send; its errors become replies.
    """

    def __init__(self, path: str, answer: Callable[[Request, Send], Awaitable[None]]) -> None:
        self._path, self._answer = path, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        notes_of(scope).path = self._path
        await self._answer(Request(scope, receive), send)
