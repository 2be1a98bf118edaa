"""Clients of a server for its benchmark: streams with the time of each piece, many at once, and ones that misbehave."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

__all__ = ["Answer", "ask", "at_once", "median_gap", "mlx_lm_server", "post_bytes", "send_body", "stream", "together"]

Address = tuple[str, int]
PATIENCE_S = 300.0


@dataclass
class Answer:
    """A stream: seconds from the request to each piece of text, and to the end."""

    tokens: int
    pieces: list[float]
    seconds: float
    text: str

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.pieces)]


def _path(body: dict[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


def stream(address: Address, body: dict[str, Any], on_piece: Callable[[], None] = lambda: None) -> Answer:
    """Raises AssertionError for another status than 200."""
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE_S)
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    started = time.perf_counter()
    connection.request("POST", _path(body), json.dumps(body), {"content-type": "application/json"})
    reply = connection.getresponse()
    assert reply.status == 200, (reply.status, reply.read())
    pieces: list[float] = []
    text, tokens = "", 0
    for line in reply:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        for choice in event["choices"]:
            piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
            if piece:
                pieces.append(time.perf_counter() - started)
                text += piece
                on_piece()
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    seconds = time.perf_counter() - started
    connection.close()
    return Answer(tokens, pieces, seconds, text)


def together(address: Address, bodies: Sequence[dict[str, Any]]) -> tuple[float, list[Answer]]:
    """All at once; tokens a second of all, and each."""
    answers: list[Answer | None] = [None] * len(bodies)
    barrier = threading.Barrier(len(bodies) + 1)

    def one(index: int) -> None:
        barrier.wait()
        answers[index] = stream(address, bodies[index])

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(bodies))]
    for thread in threads:
        thread.start()
    barrier.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    done = [answer for answer in answers if answer is not None]
    assert len(done) == len(bodies)
    return sum(answer.tokens for answer in done) / seconds, done


def ask(address: Address, body: dict[str, Any]) -> int | str:
    """The status of a plain request, or what became of it."""
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE_S)
    try:
        connection.request("POST", _path(body), json.dumps(body), {"content-type": "application/json"})
        reply = connection.getresponse()
        reply.read()
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()
    return reply.status


def at_once(address: Address, body: dict[str, Any], count: int) -> list[int | str]:
    """What became of so many plain requests, each on a connection of its own."""
    found: list[int | str] = []
    barrier = threading.Barrier(count)

    def one() -> None:
        barrier.wait()
        found.append(ask(address, body))

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def post_bytes(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    lines = (
        f"POST {_path(body)} HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {len(data)}",
    )
    return "\r\n".join([*lines, "", ""]).encode() + data


def send_body(address: Address, size: int, *, is_chunked: bool) -> tuple[str, int]:
    """Send so many bytes as a body; the status line, and how many were on their way when it came."""
    length = "transfer-encoding: chunked" if is_chunked else f"content-length: {size}"
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{length}\r\n\r\n"
    block = b" " * 65536
    piece = f"{len(block):x}\r\n".encode() + block + b"\r\n" if is_chunked else block
    sent = 0
    with socket.create_connection(address, timeout=PATIENCE_S) as connection:
        # Small buffers: what the server has not read would count as sent.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        connection.sendall(head.encode())
        connection.setblocking(False)
        received, end = b"", time.monotonic() + PATIENCE_S
        while not received and time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                received = connection.recv(4096)
            if received or sent >= size:
                continue
            try:
                connection.setblocking(True)
                connection.settimeout(0.2)
                connection.sendall(piece)
                sent += len(block)
            except OSError:
                pass
            finally:
                connection.setblocking(False)
    return received.partition(b"\r\n")[0].decode(), sent


def median_gap(answers: Sequence[Answer]) -> float:
    return statistics.median(gap for answer in answers for gap in answer.gaps)


@contextlib.contextmanager
def mlx_lm_server(folder: Path) -> Iterator[Address]:
    """mlx-lm's server of ``folder``, in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm.server", "--model", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    assert process.stderr is not None
    threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True).start()
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, "".join(lines[-5:])
            time.sleep(0.1)
        yield "127.0.0.1", port
    finally:
        process.kill()
        process.wait()
