"""An engine that fails, a server that is told to end, weights that were released."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_mixtral import Mixtral, load
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.generation.scheduler import Scheduler
from mlx_mixtral.server.engine_thread import EngineState, EngineThread
from tests.processes import PYTHONPATH
from tests.server.conftest import PATIENCE_S, Running, Serve, running, wait_until
from tests.server.test_cancel import CHAT, LONG, _generating, _open

FailNext = Callable[[int], None]


@pytest.fixture
def fail_next(monkeypatch: pytest.MonkeyPatch) -> FailNext:
    """Makes so many of the engine's next steps fail."""
    left = [0]
    step = Scheduler.step

    def failing(self: Scheduler) -> Any:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("[metal::Device] the command buffer failed with words of a prompt")
        return step(self)

    monkeypatch.setattr(Scheduler, "step", failing)
    return lambda count: left.__setitem__(0, count)


def test_open_requests_end_when_the_engine_fails_and_the_next_is_answered(serve: Serve, fail_next: FailNext) -> None:
    """Streams by an event, plain replies by a status; the model is loaded once more."""
    loads: list[None] = []

    def loading(folder: Path) -> Mixtral:
        loads.append(None)
        return load(folder)

    with serve(rows=2) as server:
        folder_load = server.server.engine._load
        server.server.engine._load = lambda: (loads.append(None), folder_load())[1]  # type: ignore[method-assign]
        stream = _open(server, stream=True)
        plain: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: plain.append(server.post(CHAT, LONG)))
        asking.start()
        queued = _open(server, stream=True)
        wait_until(lambda: server.status()["requests_open"] == 3, "all are open")
        fail_next(1)
        asking.join(PATIENCE_S)
        assert plain[0].status_code == 500
        assert plain[0].json()["error"]["code"] == "engine_failed"
        for connection in (stream, queued):
            text = b""
            while b"[DONE]" not in text:
                text += connection.recv(100_000)
            assert b'"engine_failed"' in text
            connection.close()
        assert server.chat("Hello", max_tokens=2)["usage"]["completion_tokens"] == 2
        assert server.client.get("/health").status_code == 200
        assert server.status()["engine_failures"] == 1
        assert len(loads) == 1
        assert "words of a prompt" not in server.log.getvalue()


def test_health_is_503_while_the_engine_is_built_again(serve: Serve, fail_next: FailNext) -> None:
    gate = threading.Event()
    with serve() as server:
        own = server.server.engine._load

        def held() -> Mixtral:
            gate.wait(PATIENCE_S)
            return own()

        server.server.engine._load = held  # type: ignore[method-assign]
        fail_next(1)
        assert server.post(CHAT, LONG).status_code == 500
        health = server.client.get("/health")
        assert health.status_code == 503
        assert health.json()["engine"] == "rebuilding"
        gate.set()
        assert server.chat("Hello", max_tokens=1)["choices"]
        assert server.client.get("/health").status_code == 200


def test_the_third_failure_ends_the_server(short: Path, fail_next: FailNext) -> None:
    """With a status that says so."""
    with running(short) as server:
        for _ in range(3):
            fail_next(1)
            assert server.post(CHAT, LONG).status_code == 500
        assert server.thread is not None
        server.thread.join(PATIENCE_S)
        assert server.statuses == [1]


def test_a_model_that_cannot_be_loaded_again_ends_the_server(short: Path, fail_next: FailNext) -> None:
    with running(short) as server:

        def gone() -> Mixtral:
            raise CheckpointError("the file is gone")

        server.server.engine._load = gone  # type: ignore[method-assign]
        fail_next(1)
        assert server.post(CHAT, LONG).status_code == 500
        assert server.thread is not None
        server.thread.join(PATIENCE_S)
        assert server.statuses == [1]


def test_a_model_that_cannot_be_loaded_at_all_is_the_callers_error() -> None:
    def missing() -> Mixtral:
        raise CheckpointError("there is no model")

    engine = EngineThread(missing, 1, lambda deliveries: None)
    with pytest.raises(CheckpointError, match="there is no model"):
        engine.start().result(PATIENCE_S)
    assert engine.state is EngineState.DEAD


def test_weights_are_released_when_idle_and_loaded_for_the_next_request(serve: Serve) -> None:
    with serve(idle_unload_s=0.2) as server:
        before = server.chat("Hello")["choices"][0]["message"]["content"]
        wait_until(lambda: server.status()["engine"] == "unloaded", "the weights are released")
        assert server.status()["memory"]["weights_bytes"] == 0
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/v1/models").status_code == 200
        assert server.post("/tokenize", {"prompt": "Hello"}).json()["count"] > 1
        assert server.chat("Hello")["choices"][0]["message"]["content"] == before


def test_requests_that_are_open_may_finish(short: Path) -> None:
    """A server that ends takes nobody else meanwhile."""
    with running(short) as server:
        replies: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: replies.append(server.post(CHAT, LONG | {"max_tokens": 100})))
        asking.start()
        wait_until(lambda: _generating(server, 1), "it generates")
        server.server.stop()
        asking.join(PATIENCE_S)
        assert replies[0].status_code == 200
        assert replies[0].json()["usage"]["completion_tokens"] == 100
        assert server.thread is not None
        server.thread.join(PATIENCE_S)
        assert server.statuses == [0]
        with pytest.raises(ConnectionError):
            socket.create_connection(server.address, timeout=5)


@pytest.mark.parametrize("grace_s", [0.0, 60.0], ids=["grace is over", "told twice"])
def test_what_is_still_open_ends_with_an_error(short: Path, grace_s: float) -> None:
    with running(short, grace_s=grace_s) as server:
        stream = _open(server, stream=True)
        wait_until(lambda: _generating(server, 1), "it generates")
        server.server.stop()
        if grace_s:
            server.server.stop()
        text = b""
        while data := stream.recv(100_000):
            text += data
        assert b"shutting down" in text
        assert b"[DONE]" in text
        stream.close()
        assert server.thread is not None
        server.thread.join(PATIENCE_S)
        assert server.statuses == [0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_program(short: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_mixtral", "serve", str(short), "--port", "0", "--log-format", "none"],
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": PYTHONPATH, "PATH": "/usr/bin:/bin"},
    )
    assert process.stderr is not None
    try:
        lines = [process.stderr.readline()]
        while "listening at" not in lines[-1]:
            assert lines[-1], lines
            lines.append(process.stderr.readline())
        url = lines[-1].split()[2]
        reply = httpx.post(f"{url}/chat/completions", json=LONG | {"max_tokens": 2}, timeout=PATIENCE_S)
        assert reply.status_code == 200
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 0
        rest = process.stderr.read()
        assert rest == "the server has ended\n"
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_port_that_is_taken_is_an_error_before_the_model_is_loaded(server: Running) -> None:
    from mlx_mixtral.errors import InvalidRequestError
    from mlx_mixtral.server.options import ServerOptions
    from mlx_mixtral.server.serving import ModelServer

    def never() -> Mixtral:
        raise AssertionError("loaded")

    other = ModelServer(never, ServerOptions(port=server.address[1]))
    with pytest.raises(InvalidRequestError, match="--port"):
        other.start()


def test_a_second_signal_ends_it_at_once(short: Path) -> None:
    """Though a stream is open that has a long grace."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_mixtral", "serve", str(short), "--port", "0", "--grace", "600"],
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": PYTHONPATH, "PATH": "/usr/bin:/bin"},
    )
    assert process.stderr is not None
    try:
        line = b""
        while b"listening at" not in line:
            line = process.stderr.readline()
            assert line
        url = line.decode().split()[2]
        with httpx.stream("POST", f"{url}/chat/completions", json=LONG | {"stream": True}, timeout=PATIENCE_S) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            host, _, port = url.removeprefix("http://").removesuffix("/v1").rpartition(":")
            wait_until(lambda: not _takes_connections(host, int(port)), "it takes no more requests")
            process.send_signal(signal.SIGTERM)
            text = "\n".join(lines)
        assert "shutting down" in text
        assert "[DONE]" in text
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def _takes_connections(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=PATIENCE_S).close()
    except ConnectionError:
        return False
    return True
