"""A server from its start to its end: sockets, uvicorn, signals, and what becomes of open requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import uvicorn

from mlx_mixtral.calls.chat import ToolChat
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.runtime.mixtral import Mixtral
from mlx_mixtral.server.admission import Admission
from mlx_mixtral.server.app import make_app
from mlx_mixtral.server.engine_thread import EngineState, EngineThread
from mlx_mixtral.server.jobs import JobEvent, ServerJob
from mlx_mixtral.server.log import RequestLog
from mlx_mixtral.server.metrics import Metrics
from mlx_mixtral.server.options import ServerOptions
from mlx_mixtral.server.protocol import ConnectionLimits, limited_protocol
from mlx_mixtral.server.served import ServedModel
from mlx_mixtral.server.service import Service
from mlx_mixtral.server.wire.errors import ApiError

__all__ = ["ModelServer"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAST_WORDS_S = 0.7
"""How long replies may take that end with an error at shutdown."""
CLOSE_S = 5.0
WORKER_THREADS = 2
"""For bodies and texts so long that reading them would hold up the loop."""


class ModelServer:
    """Loads a model on a thread of its own, and serves it until it is told to end.

    Args:
        load: makes the model; called on the engine's thread.
        log: one for each request; from the options when None.

    Example:
        >>> server = ModelServer(lambda: load("mixtral-4bit"), ServerOptions(port=8080))
        >>> server.start()
        >>> server.run()
    """

    def __init__(
        self,
        load: Callable[[], Mixtral],
        options: ServerOptions,
        *,
        log: RequestLog | None = None,
    ) -> None:
        self.options = options
        self.engine = EngineThread(
            load,
            options.rows,
            self._post,
            self._state_changed,
            max_stall_s=options.max_stall_s,
            idle_unload_s=options.idle_unload_s,
        )
        self._log = log or RequestLog(options.log_format)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket: socket.socket | None = None
        self._address = (options.host, options.port)
        self._uvicorn: _Uvicorn | None = None
        self._service: Service | None = None
        self.exit_status = 0

    @property
    def service(self) -> Service:
        """What the endpoints share, once ``start`` has returned."""
        assert self._service is not None
        return self._service

    @property
    def url(self) -> str:
        """Where it listens, once ``bind`` has returned."""
        host, port = self._address
        return f"{self.options.scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def bind(self) -> None:
        """Take the port.

        Raises:
            InvalidRequestError: it is taken, or the host is not this machine's.
        """
        options = self.options
        try:
            family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
            self._socket = socket.create_server((options.host, options.port), family=family, backlog=1024)
            self._address = self._socket.getsockname()[:2]
        except OSError as error:
            raise InvalidRequestError(
                f"port {options.port} of {options.host} cannot be had: {error.strerror or error}; choose another with --port"
            ) from None

    def start(self) -> Mixtral:
        """Take the port and load the model; returns it, for its facts.

        Raises:
            MixtralError: the model cannot be loaded, or has no tokenizer.
        """
        if self._socket is None:
            self.bind()
        loaded = self.engine.start()
        try:
            model = loaded.result()
            options, metrics = self.options, Metrics()
            served = ServedModel.of(model, options.name, options.aliases)
            admission = Admission(self.engine, options, metrics)
            self._service = Service(
                served,
                self.engine,
                options,
                admission,
                metrics,
                self._log,
                ToolChat(served.tokenizer, options.tools),
                connections=self._connections,
            )
        except BaseException:
            self.close()
            raise
        return model

    def run(self) -> int:
        """Serve until a signal, ``stop`` or a dead engine; the exit status: 0, or 1 for the latter."""
        try:
            asyncio.run(self._serve())
        finally:
            self.close()
        return self.exit_status

    def stop(self) -> None:
        """End as at SIGTERM; the second time at once. Any thread."""
        if self._uvicorn is not None:
            self._uvicorn.stop()

    def close(self) -> None:
        """Give the port and the model back."""
        # Where a machine of its group was lost, the thread may wait inside MLX for good.
        self.engine.close(CLOSE_S if self.engine.group_error is None else LAST_WORDS_S)
        if self._service is not None:
            self._service.grammars.shutdown(wait=False, cancel_futures=True)
        if self._socket is not None:
            self._socket.close()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        # asyncio's own would have more threads the more cores there are, each made at the first moment when all are busy.
        self._loop.set_default_executor(ThreadPoolExecutor(WORKER_THREADS, "mlx-mixtral-worker"))
        options = self.options
        limits = ConnectionLimits(
            options.header_timeout_s, options.body_timeout_s, options.max_connections, options.max_body_bytes
        )
        config = uvicorn.Config(
            make_app(self.service),
            http=limited_protocol(limits),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=round(options.keep_alive_s),
            ssl_certfile=options.tls_cert,
            ssl_keyfile=options.tls_key,
        )
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._uvicorn = _Uvicorn(config, self)
        assert self._socket is not None
        await self._uvicorn.serve(sockets=[self._socket])

    def _connections(self) -> int:
        return 0 if self._uvicorn is None else len(self._uvicorn.server_state.connections)

    def _post(self, deliveries: Sequence[tuple[ServerJob, list[JobEvent]]]) -> None:
        """On the engine's thread: one call into the loop for all events of a step."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self.service.admission.deliver, deliveries)

    def _state_changed(self, state: EngineState) -> None:
        if state is EngineState.DEAD:
            self.exit_status = 1
            if self._loop is not None and self._uvicorn is not None:
                self._uvicorn.stop()


class _Uvicorn(uvicorn.Server):
    """uvicorn with an orderly end: no new connections, a time of grace, an error for what is still open, the end."""

    def __init__(self, config: uvicorn.Config, owner: ModelServer) -> None:
        super().__init__(config)
        self._owner = owner

    def stop(self) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again at the end; a server that was asked to end has ended well.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in SIGNALS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        admission = self._owner.service.admission
        admission.is_draining = True
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        is_dead = self._owner.engine.state is EngineState.DEAD
        deadline = time.monotonic() + (0 if is_dead else self._owner.options.grace_s)
        while self.server_state.tasks and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        admission.fail_all(ApiError(503, "the server is shutting down; send the request again when it is back"))
        deadline = time.monotonic() + LAST_WORDS_S
        while self.server_state.tasks and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for task in self.server_state.tasks:
            task.cancel()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
