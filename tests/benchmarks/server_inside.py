"""A server in the process of the benchmark, beside the same model without HTTP."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from server_clients import stream, together

sys.path.insert(0, str(Path(__file__).parents[2]))
from mlx_mixtral import Mixtral, load
from mlx_mixtral.server.options import ServerOptions
from mlx_mixtral.server.serving import ModelServer

__all__ = ["Inside", "inside"]


class Inside:
    """A server in this process whose model is used without HTTP as well, and its clients in another."""

    def __init__(self, folder: Path, options: ServerOptions, clients: ProcessPoolExecutor) -> None:
        self._server = ModelServer(lambda: load(folder, device="cpu"), options)
        self._clients = clients
        self.model = self._server.start()
        host, _, port = self._server.url.rpartition("/")[2].rpartition(":")
        self._address = (host, int(port))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()

    def alone(self, work: Callable[[Mixtral], float]) -> float:
        """``work`` on the server's model, while it serves nobody."""
        found = self._server.engine.exclusive(work).result()
        assert isinstance(found, float)
        return found

    def asked(self, body: dict[str, Any]) -> float:
        """Tokens a second of a stream."""
        answer = self._clients.submit(stream, self._address, body).result()
        return answer.tokens / answer.seconds

    def asked_together(self, bodies: list[dict[str, Any]]) -> float:
        return self._clients.submit(together, self._address, bodies).result()[0]

    def close(self) -> None:
        self._server.stop()
        self._thread.join()


@contextlib.contextmanager
def inside(folder: Path, rows: int, max_stall_s: float) -> Iterator[Inside]:
    """A server of ``folder``, which is gone afterwards."""
    options = ServerOptions(port=0, rows=rows, max_stall_s=max_stall_s, log_format="none")
    # Another thread's locks would be copied by a fork.
    with ProcessPoolExecutor(1, get_context("spawn")) as clients:
        found = Inside(folder, options, clients)
        try:
            yield found
        finally:
            found.close()
