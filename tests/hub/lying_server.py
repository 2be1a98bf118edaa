"""A hub on this machine that lies: each repository of ``owner`` is a lie of its own, everything else in it is true."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ETAG = "f" * 40
CONFIG = b'{"model_type": "mixtral"}'
WEIGHTS = b"w" * 5000
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
OUTSIDE = "../../../../outside"


def listing(**changes: Any) -> bytes:
    siblings = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
    return json.dumps({"id": "owner/x", "sha": COMMIT, "siblings": siblings} | changes).encode()


def siblings(*files: Any) -> bytes:
    """A listing with these files besides."""
    true = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
    return listing(siblings=[*true, *files])


def sized(nbytes: Any, name: str = "model.safetensors") -> bytes:
    return listing(siblings=[{"rfilename": "config.json", "size": len(CONFIG)}, {"rfilename": name, "size": nbytes}])


# What the list of files is, as bytes of the answer.
LISTINGS: dict[str, tuple[bytes, str]] = {
    "html": (b"<!doctype html><title>Please log in</title>", "is not JSON"),
    "nothing": (b"", "is not JSON"),
    "list": (b"[1, 2]", "is a JSON list, not an object"),
    "null": (b"null", "is a JSON NoneType"),
    "deep": (b"[" * 200_000 + b"]" * 200_000, "is not JSON"),
    "deep-inside": (listing(siblings=None).replace(b"null", b"[" * 900 + b"]" * 900), "a file a list"),
    "large": (b'"' + b"x" * (17 * 2**20) + b'"', "has more than 16.8 MB"),
    "large-number": (b"9" * 10_000, "is not JSON"),
    "not-utf8": (b'{"sha": "\xff\xfe"}', "is not JSON"),
    "no-files": (listing(siblings=None), "has no list of files"),
    "files-object": (listing(siblings={"a": 1}), "has no list of files"),
    "file-number": (siblings(7), "lists a file 7"),
    "file-nameless": (siblings({"size": 7}), "lists a file None"),
    "file-up": (siblings({"rfilename": "../../x.json", "size": 1}), "lists a file '../../x.json'"),
    "file-absolute": (siblings({"rfilename": "/etc/x", "size": 1}), "lists a file '/etc/x'"),
    "file-dots": (siblings({"rfilename": "..", "size": 1}), "lists a file '..'"),
    "no-commit": (listing(sha=None), "the commit is None, which is not 40"),
    "commit-up": (listing(sha=OUTSIDE), f"the commit is '{OUTSIDE}'"),
    "commit-list": (listing(sha=[COMMIT]), "the commit is a list"),
    "commit-newline": (listing(sha=COMMIT + "\n"), "which is not 40 hexadecimal digits"),
    "size-text": (sized("5000"), "has '5000' bytes, which is no size"),
    "size-less": (sized(-1), "has -1 bytes"),
    "size-half": (sized(0.5), "has 0.5 bytes"),
    "size-true": (sized(True), "has True bytes"),
    "size-huge": (sized(10**300), "no file of a model is that large"),
    "size-other": (sized(4000), "has 4000 bytes and then 5000"),
    "hash-text": (siblings({"rfilename": "x", "size": 1, "lfs": {"sha256": OUTSIDE}}), "the sha256 of x is"),
}
# What the hub says of config.json before it is fetched: headers in place of the true ones, and status.
HEADS: dict[str, tuple[dict[str, str], int, str]] = {
    "etag-up": ({"ETag": f'"{OUTSIDE}"'}, 200, "which is no name of a file"),
    "linked-etag-up": ({"X-Linked-Etag": OUTSIDE}, 200, "which is no name of a file"),
    "etag-dots": ({"ETag": ".."}, 200, "which is no name of a file"),
    "etag-absolute": ({"ETag": "/tmp/outside"}, 200, "which is no name of a file"),
    "etag-long": ({"ETag": "e" * 5000}, 200, "which is no name of a file"),
    "etag-none": ({"ETag": ""}, 200, "which is no name of a file"),
    "head-commit": ({"X-Repo-Commit": OUTSIDE}, 200, "was asked for at commit 0123"),
    "head-size-text": ({"X-Linked-Size": "many"}, 200, "has 'many' bytes, which is no size"),
    "head-size-huge": ({"X-Linked-Size": "1" + "0" * 30}, 200, "which is no size"),
    "head-loop": ({"Location": "/owner/head-loop/resolve/0/config.json"}, 302, "more than 8 redirects"),
    "head-file": ({"Location": "file:///etc/passwd"}, 302, "config.json"),
    "head-nowhere": ({"Location": "http://["}, 302, ""),
    "head-gone": ({}, 404, "status 404 for config.json"),
    "head-teapot": ({}, 418, "status 418 for config.json"),
    "head-trouble": ({}, 500, "8 attempts failed (status 500)"),
}
Write = Callable[[BaseHTTPRequestHandler], None]


def forever(data: bytes, pause_s: float = 0.0, most: int = 10**9) -> Write:
    def write(handler: BaseHTTPRequestHandler) -> None:
        for _ in range(most):
            handler.wfile.write(data)
            time.sleep(pause_s)

    return write


def head(handler: BaseHTTPRequestHandler, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    handler.send_header("ETag", ETAG)
    handler.send_header("X-Repo-Commit", COMMIT)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.close_connection = True


def body(write: Write, status: int = 200, **headers: str) -> Write:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        head(handler, status, **headers)
        write(handler)

    return answer


def silent(handler: BaseHTTPRequestHandler) -> None:
    handler.server.let_go.wait(60)  # type: ignore[attr-defined]


def redirected(handler: BaseHTTPRequestHandler) -> None:
    """In a circle, each redirect with a body that does not end."""
    head(handler, 302, Location=handler.path)
    forever(b"x" * 65536)(handler)


def raw(data: bytes) -> Write:
    def write(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(data)
        handler.close_connection = True

    return write


BLOCK = b"x" * 65536
# How config.json itself is answered.
BODIES: dict[str, tuple[Write, str]] = {
    "file-silent": (silent, "attempts failed"),
    "file-endless": (body(forever(BLOCK)), ""),
    "file-longer": (body(forever(BLOCK), Content_Length="900000000"), "has 25 bytes, the hub serves 900000000"),
    "file-shorter": (body(raw(b"{}"), Content_Length="25"), "8 attempts failed"),
    "file-empty": (body(raw(b"")), "8 attempts failed (25 bytes did not arrive)"),
    "file-zipped": (body(forever(BLOCK), Content_Encoding="gzip"), "sent it as gzip"),
    "file-range": (body(raw(b"x"), 206, Content_Range="bytes 5-9/10"), "the hub served 'bytes 5-9/10'"),
    "file-loop": (redirected, "more than 8 redirects"),
    "file-refused": (body(forever(BLOCK), 403), "status 403"),
    "file-drip": (body(forever(b"x", 0.1)), "attempts failed"),
    "file-no-http": (raw(b"SSH-2.0-OpenSSH_9.6\r\n"), "attempts failed"),
    "file-heads": (raw(b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 100_000), "attempts failed"),
    "file-continues": (forever(b"HTTP/1.1 100 Continue\r\n\r\n", 0.001), "attempt failed (no answer"),
}
# How the list of files is answered, where that is not one answer with a length.
APIS: dict[str, tuple[Write, str]] = {
    "api-silent": (silent, "the hub cannot be reached"),
    "api-endless": (body(forever(BLOCK)), "has more than 16.8 MB"),
    "api-drip": (body(forever(b" ", 0.05)), "was not complete after"),
    "api-slow-head": (forever(b"H", 0.05), "the hub cannot be reached"),
    "api-loop": (redirected, "more than 8 redirects"),
    "api-refused": (body(forever(BLOCK), 403), "status 403"),
    "api-trouble": (body(forever(BLOCK), 500), "the hub cannot be reached"),
    "api-no-http": (raw(b"220 ftp\r\n"), "the hub cannot be reached"),
    "api-zipped": (body(forever(BLOCK), Content_Encoding="br"), "sent it as br"),
}


@dataclass
class LyingHub:
    url: str = ""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of answers to each repository."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.let_go = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """The client gives up the connection: that is what it should do."""


def _handler(hub: LyingHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            parts = path.split("/")
            is_api = path.startswith("/api/models/")
            lie = parts[4] if is_api else parts[2]
            self.count(lie)
            if is_api and lie in APIS:
                APIS[lie][0](self)
            elif is_api:
                self.answer(LISTINGS[lie][0] if lie in LISTINGS else listing(), {}, 200)
            elif parts[-1] == "config.json" and self.command == "HEAD" and lie in HEADS:
                headers, status, _ = HEADS[lie]
                self.answer(CONFIG, {"ETag": ETAG, "X-Repo-Commit": COMMIT} | headers, status)
            elif parts[-1] == "config.json" and self.command == "GET" and lie in BODIES:
                BODIES[lie][0](self)
            else:
                data = FILES[parts[-1]]
                self.answer(data, {"ETag": f"{ETAG}{len(data)}", "X-Repo-Commit": COMMIT}, 200)

        def answer(self, data: bytes, headers: dict[str, str], status: int) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def count(self, lie: str) -> None:
            write = self.wfile.write

            def counted(data: Any) -> int:
                written = write(data)
                hub.sent[lie] += len(data)
                return written

            self.wfile.write = counted  # type: ignore[method-assign]

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextlib.contextmanager
def serve() -> Iterator[LyingHub]:
    hub = LyingHub()
    server = _Server(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.let_go.set()
        server.shutdown()
        thread.join()
        server.server_close()
