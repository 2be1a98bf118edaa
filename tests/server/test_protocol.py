"""Connections: half requests, long bodies, many of them, TLS."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import PATIENCE_S, Running, Serve, wait_until

CHAT = "/v1/chat/completions"
HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n".encode()
BODY = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


def _all(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    received = b""
    try:
        while data := connection.recv(100_000):
            received += data
    except ConnectionError:
        pass
    finally:
        connection.close()
    return received


def _whole(connection: socket.socket) -> None:
    """One reply, which is a 200."""
    received = b""
    while not received.endswith(b"}"):
        received += connection.recv(10_000)
    assert received.startswith(b"HTTP/1.1 200 OK")


def _told(received: bytes) -> tuple[int, dict[str, str]]:
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_half_open_connections_lock_nobody_out(serve: Serve) -> None:
    """110 of them, as many as uvicorn's own limit would let nobody pass; they are gone after the time for a head."""
    with serve(header_timeout_s=0.3, max_connections=60) as server:
        half = [server.raw(b"POST /v1/chat" if number % 2 else b"") for number in range(110)]
        assert server.post(CHAT, BODY).status_code == 200
        answers = [_all(connection) for connection in half]
        told = [answer for answer in answers if answer]
        assert all(_told(answer)[0] == 408 for answer in told)
        assert server.post(CHAT, BODY).status_code == 200


def test_no_packet_waits_for_the_receipt_of_another(server: Running) -> None:
    assert server.post(CHAT, BODY).status_code == 200
    assert server.server._uvicorn is not None
    (connection, *_) = server.server._uvicorn.server_state.connections
    own = connection.transport.get_extra_info("socket")
    assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_the_connection_that_was_idle_longest_makes_room(serve: Serve) -> None:
    with serve(max_connections=5) as server:
        idle = [server.raw() for _ in range(12)]
        for _ in range(3):
            assert httpx.get(f"{server.url}/health").status_code == 200
        assert (
            int(server.client.get("/metrics").text.partition("\nmlx_mixtral_connections ")[2].partition("\n")[0]) <= 6
        )
        for connection in idle:
            connection.close()


def test_a_connection_is_kept_between_requests(serve: Serve) -> None:
    with serve(header_timeout_s=0.2) as server:
        connection = server.raw(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        _whole(connection)
        # Longer than a head may take: an idle connection is none that began one.
        connection.settimeout(0.6)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(PATIENCE_S)
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        _whole(connection)
        connection.sendall(b"GET /hea")
        assert _told(_all(connection))[0] == 408


def test_a_body_that_does_not_come_is_408(serve: Serve) -> None:
    with serve(body_timeout_s=0.3) as server:
        connection = server.raw(HEAD + b'content-length: 500\r\n\r\n{"messages":')
        status, error = _told(_all(connection))
        assert status == 408
        assert "body" in error["message"]
        connection = server.raw(
            HEAD.replace(CHAT.encode(), b"/v1/messages") + b'content-length: 500\r\n\r\n{"messages":'
        )
        status, error = _told(_all(connection))
        assert (status, error["type"]) == (408, "timeout_error")  # in Anthropic's envelope
        wait_until(lambda: CHAT in server.log.getvalue(), "its line is written")
        assert server.is_idle()
        assert server.log.getvalue().count(CHAT) == 1


def test_a_client_that_leaves_in_its_body_is_no_error(server: Running) -> None:
    connection = server.raw(HEAD + b'content-length: 500\r\n\r\n{"messages":')
    connection.close()
    wait_until(lambda: "outcome=disconnected" in server.log.getvalue(), "its line is written")
    assert "problem" not in server.log.getvalue()


@pytest.mark.parametrize("has_length", [True, False], ids=["length", "chunked"])
def test_a_body_that_is_too_long_is_413_after_the_limit(serve: Serve, has_length: bool) -> None:
    """100 MB were to come: not much more than the limit is taken."""
    with serve(max_body_bytes=100_000) as server:
        size = 100_000_000
        sent = 0
        length = b"content-length: 100000000" if has_length else b"transfer-encoding: chunked"
        connection = server.raw(HEAD + length + b"\r\n\r\n")
        block = b" " * 10_000 if has_length else b"2710\r\n" + b" " * 10_000 + b"\r\n"
        connection.settimeout(0.5)
        try:
            while sent < size:
                sent += connection.send(block)
        except (TimeoutError, ConnectionError):
            pass
        connection.settimeout(PATIENCE_S)
        status, error = _told(_all(connection))
        assert status == 413
        assert "100000 bytes" in error["message"]
        assert sent < 30_000_000  # what the system's buffers hold
        assert server.post(CHAT, BODY).status_code == 200


def test_an_ordinary_client_reads_the_413(serve: Serve) -> None:
    with serve(max_body_bytes=10_000) as server:
        reply = server.post(CHAT, {"messages": [{"role": "user", "content": "x" * 300_000}]})
        assert reply.status_code == 413
        assert reply.json()["error"]["code"] == "body_too_large"
        assert server.post(CHAT, BODY).status_code == 200


def test_a_long_body_within_the_limit_is_answered(serve: Serve) -> None:
    with serve(max_body_bytes=1_500_000) as server:
        ignored = {"metadata": {"key": "x" * 1_000_000}}
        assert server.post(CHAT, BODY | ignored).status_code == 200


@pytest.mark.parametrize(
    "request_",
    [b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00",
     HEAD + b"content-length: -5\r\n\r\n", HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
     b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_http_is_400(server: Running, request_: bytes) -> None:
    connection = server.raw(request_)
    connection.shutdown(socket.SHUT_WR)
    assert _all(connection).startswith((b"HTTP/1.1 400", b"HTTP/1.1 414", b"HTTP/1.1 403")) or request_[:1] == b"\x16"
    assert server.client.get("/health").status_code == 200


def test_two_hundred_at_once_are_answered_or_told_to_come_back(serve: Serve) -> None:
    with serve(queue=40) as server:
        body = json.dumps(BODY).encode()
        request = HEAD + f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        connections = [server.raw(request) for _ in range(200)]
        statuses = [int(_all(connection).split()[1]) for connection in connections]
        assert set(statuses) <= {200, 429}
        assert statuses.count(200) >= 40
        wait_until(server.is_idle, "all is done")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    if shutil.which("openssl") is None:
        pytest.skip("makes a certificate with openssl")
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", str(key), "-out", str(cert), "-subj", "/CN=localhost", "-addext", names],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def test_it_can_speak_tls(serve: Serve, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    with serve(tls_cert=str(cert), tls_key=str(key), header_timeout_s=0.3) as server:
        trusting = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(base_url=server.url, verify=trusting, timeout=PATIENCE_S) as client:
            assert server.url.startswith("https://")
            assert client.post(CHAT, json=BODY).status_code == 200
            with client.stream("POST", CHAT, json=BODY | {"stream": True}) as reply:
                assert reply.read().endswith(b"data: [DONE]\n\n")
            with pytest.raises(httpx.HTTPError):
                httpx.get(server.url.replace("https", "http") + "/health")
