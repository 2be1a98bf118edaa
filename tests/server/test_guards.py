"""Who may use the server: Host, Origin, key, method and path."""

from __future__ import annotations

import json

import pytest

from mlx_mixtral.server.guards import is_loopback
from tests.server.conftest import Running, Serve, wait_until

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("localhost:8080", 200), ("127.0.0.1:1", 200), ("[::1]:8080", 200), ("127.5.5.5", 200),
        ("app.localhost", 200), ("LOCALHOST", 200), ("evil.example", 403), ("localhost.evil.example", 403), ("", 403),
        ("127.0.0.1.evil.example", 403), ("192.168.1.7", 403), ("[", 403), ("localhost@evil.example", 403),
    ],
)  # fmt: skip
def test_only_names_of_this_machine_are_answered(server: Running, host: str, status: int) -> None:
    """A page of another site can have its own name point here; its requests say so in Host."""
    reply = server.client.get("/v1/models", headers={"host": host})
    assert reply.status_code == status
    if status == 403:
        assert reply.json()["error"]["code"] == "forbidden"


def test_other_names_can_be_allowed(serve: Serve) -> None:
    with serve(allowed_hosts=("box.lan",)) as server:
        assert server.client.get("/health", headers={"host": "box.lan:8080"}).status_code == 200
        assert server.client.get("/health", headers={"host": "other.lan"}).status_code == 403


def test_pages_of_others_may_not_post(server: Running) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://localhost.evil.example"):
        reply = server.post(CHAT, BODY, headers={"origin": origin})
        assert reply.status_code == 403, origin
        assert "access-control-allow-origin" not in reply.headers
    assert server.post(CHAT, BODY, headers={"origin": server.url}).status_code == 200
    read = server.client.get("/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in read.headers


def test_allowed_origins_get_their_headers(serve: Serve) -> None:
    page = "https://chat.example"
    with serve(cors_origins=(page,), api_keys=("secret",)) as server:
        asked = server.client.options(
            CHAT,
            headers={
                "origin": page,
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization,content-type,x-stainless-os",
            },
        )
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-origin"] == page
        assert "x-stainless-os" in asked.headers["access-control-allow-headers"]
        assert "POST" in asked.headers["access-control-allow-methods"]
        reply = server.post(CHAT, BODY, headers={"origin": page})
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == page
        wanted = {"access-control-request-method": "POST"}
        other = server.client.options(CHAT, headers=wanted | {"origin": "https://other.example"})
        assert other.status_code == 403
        assert "--cors-origin" in other.json()["error"]["message"]
        assert not [name for name in other.headers if name.startswith("access-control-")]
        assert server.client.options("/nowhere", headers=wanted | {"origin": page}).status_code == 404
        # An error can be read by the page as well.
        assert server.post(CHAT, {}, headers={"origin": page}).headers["access-control-allow-origin"] == page


def test_options_are_answered_without_a_key(serve: Serve) -> None:
    with serve(api_keys=("secret",)) as server:
        reply = server.client.options(CHAT, headers={"authorization": ""})
        assert reply.status_code == 204
        assert reply.headers["allow"] == "POST, OPTIONS"
        assert server.client.options("/nowhere", headers={"authorization": ""}).status_code == 404


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        (CHAT, "POST, OPTIONS"), ("/chat/completions/", "POST, OPTIONS"), ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/v1/models/small", "GET, HEAD, OPTIONS"), ("/", "GET, HEAD, OPTIONS"), ("/health", "GET, HEAD, OPTIONS"),
        ("*", "GET, HEAD, POST, OPTIONS"),
    ],
)  # fmt: skip
def test_options_tell_the_methods_of_the_path(server: Running, path: str, methods: str) -> None:
    head = f"OPTIONS {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    connection = server.raw(head.encode())
    received = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    assert received.startswith("HTTP/1.1 204 ")
    assert f"\r\nallow: {methods}\r\n" in received
    assert "access-control-" not in received


@pytest.mark.parametrize("path", ["/nowhere", "/v1/chat", "/v1/chat/completions/more", "/models2"])
def test_options_of_an_unknown_path_are_404(server: Running, path: str) -> None:
    reply = server.client.options(path)
    assert reply.status_code == 404
    assert "allow" not in reply.headers


def test_a_page_of_the_server_itself_may_ask_first(server: Running) -> None:
    """Of an origin that is none of its own it is told so at once."""
    wanted = {"access-control-request-method": "POST"}
    assert server.client.options(CHAT, headers=wanted | {"origin": server.url}).status_code == 204
    assert server.client.options(CHAT, headers=wanted | {"origin": "https://evil.example"}).status_code == 403


def test_a_key_is_asked_for(serve: Serve) -> None:
    with serve(api_keys=("first-key", "second-key")) as server:
        for headers in (
            {"authorization": "Bearer first-key"}, {"authorization": "bearer second-key"}, {"x-api-key": "first-key"}
        ):  # fmt: skip
            own = {"authorization": ""} | headers
            assert server.client.get("/v1/models", headers=own).status_code == 200, headers
        for wrong in ("", "Bearer", "Bearer first-ke", "Bearer first-keyy", "Basic first-key", "Bearer ключ".encode()):
            reply = server.client.get("/v1/models", headers={"authorization": wrong})  # type: ignore[dict-item]
            assert reply.status_code == 401, wrong
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
        for path in ("/metrics", "/v1/status", "/openapi.json", "/nowhere"):
            assert server.client.get(path, headers={"authorization": ""}).status_code == 401
        assert server.client.get("/health", headers={"authorization": ""}).status_code == 200
        assert "first-key" not in server.log.getvalue()


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/v1//models", "//models", "/models", "//v1///models//"])
def test_slashes_do_not_matter(server: Running, path: str) -> None:
    reply = server.client.get(f"{server.url}{path}")
    assert reply.status_code == 200
    assert [each["id"] for each in reply.json()["data"]] == ["tiny", "small"]


def test_one_model_can_be_asked_for(server: Running) -> None:
    assert server.client.get("/v1/models/small").json()["id"] == "small"
    assert server.client.get("/v1/models/other").status_code == 404


@pytest.mark.parametrize("path", ["/v2/models", "/v1/chat", "/v1/embeddings2", "/etc/passwd", "/v1/../secret"])
def test_an_unknown_path_is_404_in_json(server: Running, path: str) -> None:
    reply = server.client.get(path)
    assert reply.status_code == 404
    assert reply.json()["error"]["type"] == "not_found_error"


def test_a_wrong_method_is_405_in_json(server: Running) -> None:
    assert server.client.get(CHAT).headers["allow"] == "POST, OPTIONS"
    reply = server.client.delete("/v1/models")
    assert reply.status_code == 405
    assert reply.headers["allow"] == "GET, HEAD, OPTIONS"
    assert reply.json()["error"]["code"] == "method_not_allowed"


def test_request_ids_come_back(server: Running) -> None:
    assert server.client.get("/health", headers={"x-request-id": "mine-1.2_3"}).headers["x-request-id"] == "mine-1.2_3"
    for odd in ("a b", "x" * 200, "a;b", ""):
        own = server.client.get("/health", headers={"x-request-id": odd}).headers["x-request-id"]
        assert own.startswith("req-"), odd


def test_a_request_leaves_one_line_without_its_words(server: Running) -> None:
    marker = "xylophone-quartz"
    asked = [
        server.post(CHAT, BODY | {"messages": [{"role": "user", "content": marker}]}),
        server.post(CHAT, {"messages": marker}),
        server.post(CHAT, {"messages": [{"role": "user", "content": marker}], "tools": marker}),
        server.client.get(f"/{marker}"),
        server.client.get("/v1/models", params={"q": marker}),
        server.client.get("/v1/models", headers={"host": f"{marker}.example"}),
    ]
    lines = [server.line_of(reply) for reply in asked]
    assert marker not in server.log.getvalue()
    assert " 200 POST /v1/chat/completions " in lines[0]
    assert "prompt=" in lines[0]
    assert "generated=1" in lines[0]


def test_the_log_can_be_json(serve: Serve) -> None:
    with serve(log_format="json") as server:
        server.post(CHAT, BODY)
        wait_until(lambda: CHAT in server.log.getvalue(), "the line is written")
        lines = [json.loads(line) for line in server.log.getvalue().splitlines()]
    found = lines[-1]
    assert (found["status"], found["path"], found["generated"]) == (200, CHAT, 1)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1", "a.localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.com", "localhost.example.com", ""])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)
