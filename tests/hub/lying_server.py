"""A hub on this machine that lies: each repository of ``owner`` is a lie of its own, everything else in it is true."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ETAG = "f" * 40
CONFIG = b'{"model_type": "mixtral"}'
WEIGHTS = b"w" * 5000
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
OUTSIDE = "../../../../outside"
ABSOLUTE = "/ABSOLUTE"
"""Stands for the path that ``serve`` is given: a place where nothing must be written."""


def entry(name: str, data: bytes) -> dict[str, Any]:
    git_hash = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return {"rfilename": name, "size": len(data), "blobId": git_hash}


def listing(**changes: Any) -> bytes:
    true = [entry(name, data) for name, data in FILES.items()]
    return json.dumps({"id": "owner/x", "sha": COMMIT, "siblings": true} | changes).encode()


def siblings(*files: Any) -> bytes:
    """A listing with these files besides."""
    return listing(siblings=[*(entry(name, data) for name, data in FILES.items()), *files])


def changed(**changes: Any) -> bytes:
    """A listing in which config.json is another file."""
    return listing(siblings=[entry("config.json", CONFIG) | changes, entry("model.safetensors", WEIGHTS)])


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
    "size-text": (changed(size="25"), "has '25' bytes, which is no size"),
    "size-less": (changed(size=-1), "has -1 bytes"),
    "size-half": (changed(size=0.5), "has 0.5 bytes"),
    "size-true": (changed(size=True), "has True bytes"),
    "size-huge": (changed(size=10**300), "no file of a model is that large"),
    "size-other": (changed(size=20), "has 20 bytes, the hub serves 25"),
    "size-none": (changed(size=None), "does not say how large config.json is"),
    "size-large": (changed(size=10**10), "config.json has 10 GB; the limit is 268 MB for what is not weights"),
    "hash-text": (siblings({"rfilename": "x", "size": 1, "lfs": {"sha256": OUTSIDE}}), "a hash of x is"),
    "hash-up": (changed(blobId=OUTSIDE), f"a hash of config.json is '{OUTSIDE}', which is not 40"),
    "hash-dots": (changed(blobId=".."), "a hash of config.json is '..'"),
    "hash-absolute": (changed(blobId=ABSOLUTE), "a hash of config.json is '/"),
    "hash-newline": (changed(blobId=ETAG + "\n"), "a hash of config.json is"),
    "hash-list": (changed(blobId=[ETAG]), "a hash of config.json is a list"),
    "hash-long": (changed(blobId="e" * 5000), "a hash of config.json is 'eee"),
    "hash-none": (changed(blobId=None), "does not say the hash of config.json"),
}
# What the hub says as it sends config.json: headers in place of the true ones, and status.
HEADS: dict[str, tuple[dict[str, str], int, str]] = {
    "etag-up": ({"ETag": f'"{OUTSIDE}"'}, 200, ""),
    "linked-etag-up": ({"X-Linked-Etag": OUTSIDE}, 200, ""),
    "etag-dots": ({"ETag": ".."}, 200, ""),
    "etag-absolute": ({"ETag": ABSOLUTE}, 200, ""),
    "etag-long": ({"ETag": "e" * 5000}, 200, ""),
    "etag-none": ({"ETag": ""}, 200, ""),
    "head-commit": ({"X-Repo-Commit": OUTSIDE}, 200, "was asked for at commit 0123"),
    "head-size-text": ({"X-Linked-Size": "many"}, 200, ""),
    "head-size-huge": ({"X-Linked-Size": "1" + "0" * 30}, 200, ""),
    "head-length-huge": ({"Content-Length": "1" + "0" * 30}, 200, "config.json cannot be fetched"),
    "head-xet": ({"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": "http://192.0.2.1/"}, 200, ""),
    "head-loop": ({"Location": "/owner/head-loop/resolve/0/config.json"}, 302, "more than 8 redirects"),
    "head-file": ({"Location": "file:///etc/passwd"}, 302, "config.json"),
    "head-nowhere": ({"Location": "http://["}, 302, "config.json cannot be fetched"),
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


def _handler(hub: LyingHub, bent: Callable[..., None] | None, outside: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            parts = path.split("/")
            is_api = path.startswith("/api/models/")
            lie = parts[4] if is_api else parts[2]
            self.count(lie)
            if bent is not None:
                bent(self, lie, is_api=is_api, file=parts[-1])
                return
            if is_api and lie in APIS:
                APIS[lie][0](self)
            elif is_api:
                self.answer(LISTINGS[lie][0] if lie in LISTINGS else listing(), {}, 200)
            elif parts[-1] == "config.json" and lie in HEADS:
                headers, status, _ = HEADS[lie]
                self.answer(CONFIG, {"ETag": ETAG, "X-Repo-Commit": COMMIT} | headers, status)
            elif parts[-1] == "config.json" and lie in BODIES:
                BODIES[lie][0](self)
            elif (data := FILES.get(parts[-1])) is None:
                forever(BLOCK)(self)
            else:
                self.answer(data, {"ETag": f"{ETAG}{len(data)}", "X-Repo-Commit": COMMIT}, 200)

        def answer(self, data: bytes, headers: dict[str, str], status: int) -> None:
            data = data.replace(ABSOLUTE.encode(), os.fsencode(outside))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value.replace(ABSOLUTE, str(outside)))
            self.end_headers()
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
def serve(bent: Callable[..., None] | None = None, outside: Path = Path(ABSOLUTE)) -> Iterator[LyingHub]:
    """The hub.

    Args:
        bent: answers all requests in place of the lies of this file.
        outside: the absolute path that lies name, beside the cache.
    """
    hub = LyingHub()
    server = _Server(("127.0.0.1", 0), _handler(hub, bent, outside))
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
