"""Clients that go away, wait too long or are too many: their rows are free soon, and nobody else notices."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
from typing import Any

import pytest

from mlx_mixtral.generation.scheduler import Scheduler
from tests.server.conftest import PATIENCE_S, Running, Serve, wait_until

CHAT = "/v1/chat/completions"
# Its end is never drawn: it goes on to the last token, or until somebody ends it.
LONG: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Go on."}],
    "max_tokens": 900,
    "temperature": 1,
    "seed": 1,
    "logit_bias": {"2": -100},
}


def _request(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


def _open(server: Running, **fields: Any) -> socket.socket:
    return server.raw(_request(LONG | fields))


def _generating(server: Running, rows: int) -> bool:
    return bool(server.status()["rows"]["running"] >= rows)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each step that the engine took: a row that nobody ends takes as many as it was asked for tokens."""
    taken: list[None] = []
    step = Scheduler.step

    def counted(self: Scheduler) -> Any:
        taken.append(None)
        return step(self)

    monkeypatch.setattr(Scheduler, "step", counted)
    return taken


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_a_row_is_free_when_its_client_goes(server: Running, stream: bool, steps: list[None]) -> None:
    """900 tokens were asked for; of these few are generated."""
    connection = _open(server, stream=stream)
    wait_until(lambda: _generating(server, 1), "it generates")
    connection.close()
    wait_until(server.is_idle, "the row is free")
    wait_until(lambda: "outcome=disconnected" in server.log.getvalue(), "its line is written")
    assert len(steps) < 700
    assert "Traceback" not in server.log.getvalue()


def test_eight_cut_streams_leave_nothing(server: Running, steps: list[None]) -> None:
    connections = [_open(server, stream=True, seed=seed) for seed in range(8)]
    wait_until(lambda: _generating(server, 8), "all generate")
    for connection in connections:
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.close()
    wait_until(server.is_idle, "all rows are free")
    assert len(steps) < 700
    assert server.chat("Hello", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_a_client_that_goes_takes_nobody_along(server: Running) -> None:
    """Of one that generates, and of one that waits, the neighbours' texts stay to the letter."""
    body = LONG | {"max_tokens": 60}
    alone = server.post(CHAT, body).json()["choices"][0]["message"]["content"]
    texts: list[str] = []
    neighbours = [
        threading.Thread(
            target=lambda: texts.append(server.post(CHAT, body).json()["choices"][0]["message"]["content"])
        )
        for _ in range(4)
    ]
    for neighbour in neighbours:
        neighbour.start()
    cut = [_open(server, stream=stream, seed=5) for stream in (True, False, True, False, True, False, True)]
    for connection in cut:
        connection.close()
    for neighbour in neighbours:
        neighbour.join()
    assert texts == [alone] * 4
    wait_until(server.is_idle, "all rows are free")


def test_one_that_waits_leaves_the_queue(serve: Serve) -> None:
    """The row that runs goes on, and the next in the queue gets its place."""
    with serve(rows=1) as server:
        running = _open(server, stream=True)
        wait_until(lambda: _generating(server, 1), "one generates")
        waiting = _open(server, stream=True)
        wait_until(lambda: server.status()["requests_open"] == 2, "one waits")
        waiting.close()
        wait_until(lambda: server.status()["requests_open"] == 1, "the queue is empty")
        assert server.status()["rows"]["running"] == 1
        running.close()
        wait_until(server.is_idle, "all is free")


def test_one_that_is_computed_as_a_prompt_can_be_cut(server: Running) -> None:
    long = server.model.tokenizer.decode(list(range(300, 1150)))
    connection = _open(server, messages=[{"role": "user", "content": long[:2500]}], stream=True)
    connection.close()
    wait_until(server.is_idle, "it is gone")


def test_too_many_are_told_to_come_back(serve: Serve) -> None:
    with serve(rows=1, queue=2) as server:
        connections = [_open(server, stream=True) for _ in range(3)]
        wait_until(lambda: server.status()["requests_open"] == 3, "the queue is full")
        for stream in (True, False):
            reply = server.post(CHAT, LONG | {"stream": stream})
            assert reply.status_code == 429
            assert 1 <= int(reply.headers["retry-after"]) <= 60
            assert reply.json()["error"]["code"] == "queue_full"
        assert server.post(CHAT, LONG | {"n": 4}).status_code == 429
        assert server.client.get("/health").status_code == 200
        for connection in connections:
            connection.close()
        wait_until(server.is_idle, "the queue is empty")
        assert server.chat("Hello", max_tokens=1)["choices"]


def test_one_that_waited_too_long_is_answered_503(serve: Serve) -> None:
    with serve(rows=1) as server:
        running = _open(server, stream=True)
        wait_until(lambda: _generating(server, 1), "one generates")
        # Only now: on a busy machine the first one would wait too long as well.
        admission = server.server.service.admission
        admission._options = dataclasses.replace(admission._options, queue_timeout_s=0.1)
        late = server.post(CHAT, LONG | {"max_tokens": 1})
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "queue_timeout"
        events = server.client.post(CHAT, json=LONG | {"max_tokens": 1, "stream": True}).text
        assert '"queue_timeout"' in events
        assert events.endswith("data: [DONE]\n\n")
        assert server.status()["rows"]["running"] == 1
        running.close()
        wait_until(server.is_idle, "all is free")


def test_a_stream_has_its_head_at_once_and_comments_while_it_waits(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    step = Scheduler.step

    def held(self: Scheduler) -> Any:
        gate.wait(PATIENCE_S)
        return step(self)

    with serve(comment_s=0.05) as server:
        monkeypatch.setattr(Scheduler, "step", held)
        connection = _open(server, stream=True, max_tokens=2)
        received = b""
        while received.count(b": waiting\n\n") < 3:
            received += connection.recv(10_000)
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"text/event-stream" in received
        assert b"data:" not in received
        gate.set()
        while b"[DONE]" not in received:
            received += connection.recv(10_000)
        connection.close()


def test_a_plain_reply_is_not_padded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent before it is whole."""
    with serve(comment_s=0.01) as server:
        reply = server.post(CHAT, LONG | {"max_tokens": 40})
        assert reply.status_code == 200
        assert reply.content.startswith(b"{")
        assert reply.content.endswith(b"}")
        assert int(reply.headers["content-length"]) == len(reply.content)


def test_a_reader_that_is_too_slow_loses_its_row(serve: Serve) -> None:
    with serve(max_unsent_bytes=20_000) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.settimeout(PATIENCE_S)
        connection.connect(server.address)
        connection.sendall(_request(LONG | {"stream": True, "n": 8, "logprobs": True, "top_logprobs": 20}))
        wait_until(lambda: "slow_reader" in server.log.getvalue(), "it is given up")
        wait_until(server.is_idle, "its rows are free")
        assert server.chat("Hello", max_tokens=1)["choices"]
        connection.close()
