"""A hub on this machine that takes one repository: https://huggingface.co/docs/hub/api and the Git LFS batch API."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.convert.hub_server import listening
from tests.forks import run_python
from tests.processes import PYTHONPATH

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "me/model"
SCRIPT = """
import json, sys
from mlx_mixtral.errors import MixtralError
from mlx_mixtral_convert.upload import upload
for options in json.loads(sys.argv[1]):
    try:
        print(json.dumps(upload(**options).to_dict()))
    except MixtralError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


@dataclass
class UploadHub:
    """``files`` of the repository (None: there is none) as they were committed; ``blobs`` by sha256, ``sent`` bytes of them.

    ``status`` answers everything that writes; ``breaks_after`` blobs no more are taken. ``bases`` are the cards of others.
    """

    url: str = ""
    files: dict[str, bytes] | None = None
    private: bool | None = None
    blobs: dict[str, bytes] = field(default_factory=dict)
    sent: int = 0
    status: int | None = None
    breaks_after: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    writes: list[str] = field(default_factory=list)
    bases: dict[str, dict[str, str]] = field(default_factory=lambda: {"mistralai/Base": {"license": "apache-2.0"}})


def _handler(hub: UploadHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            name = urlsplit(self.path).path.removeprefix("/api/models/")
            if name in hub.bases:
                self._send({"id": name, "cardData": hub.bases[name], "siblings": []})
            elif name.startswith(REPOSITORY) and hub.files is not None and "/tree/" in name:
                self._send([{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in hub.files.items()])
            elif name.startswith(REPOSITORY) and hub.files is not None:
                siblings = [{"rfilename": name} for name in hub.files]
                self._send({"id": REPOSITORY, "sha": COMMIT, "private": hub.private, "siblings": siblings})
            else:
                self._send({}, 404, {"X-Error-Code": "RepoNotFound"})

        def do_PUT(self) -> None:
            data = self._body()
            with hub.lock:
                # A status that the client does not try again after seconds of waiting.
                if broken := hub.breaks_after is not None and len(hub.blobs) >= hub.breaks_after:
                    self._send({}, 400)
                else:
                    hub.blobs[hashlib.sha256(data).hexdigest()] = data
                    hub.sent += len(data)
            if broken:
                return
            self._send({})

        def do_POST(self) -> None:
            body, path = self._body(), urlsplit(self.path).path
            hub.writes.append(path)
            if hub.status is not None:
                self._send({"error": "no"}, hub.status)
            elif path == "/api/repos/create":
                if hub.files is not None:
                    self._send({"url": f"{hub.url}/{REPOSITORY}"}, 409)
                    return
                asked = json.loads(body)
                hub.files = {}
                hub.private = asked.get("visibility") == "private" or asked.get("private") is True
                self._send({"url": f"{hub.url}/{REPOSITORY}"})
            elif path == "/api/validate-yaml":
                self._send({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                names = [file["path"] for file in json.loads(body)["files"]]
                kinds = ["lfs" if name.endswith((".safetensors", ".gguf")) else "regular" for name in names]
                self._send(
                    {
                        "files": [
                            {"path": n, "uploadMode": k, "shouldIgnore": False}
                            for n, k in zip(names, kinds, strict=True)
                        ]
                    }
                )
            elif path.endswith("/info/lfs/objects/batch"):
                self._send(
                    {"transfer": "basic", "objects": [self._object(item) for item in json.loads(body)["objects"]]}
                )
            elif "/commit/" in path:
                self._commit(body)
                self._send(
                    {"commitUrl": f"{hub.url}/{REPOSITORY}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
                )
            else:
                self._send({})

        def _object(self, item: dict[str, Any]) -> dict[str, Any]:
            found = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] in hub.blobs:
                return found
            return found | {"actions": {"upload": {"href": f"{hub.url}/blob/{item['oid']}", "header": {}}}}

        def _commit(self, body: bytes) -> None:
            assert hub.files is not None
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.blobs[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del hub.files[value["path"]]

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def _send(self, answer: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **(headers or {}),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that breaks is what a test is about."""


@contextlib.contextmanager
def serve_uploads() -> Iterator[UploadHub]:
    """A running hub with no repository."""
    hub = UploadHub()
    with listening(_Quiet(("127.0.0.1", 0), _handler(hub))) as hub.url:
        yield hub


def run_uploads(home: Path, hub: UploadHub, *uploads: dict[str, Any], token: str | None = "hf_token") -> list[Any]:
    """``upload(…)`` with each of the options, in a process that knows only this hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*", "PYTHONPATH": PYTHONPATH,
        **({} if token is None else {"HF_TOKEN": token}),
    }  # fmt: skip
    done = run_python(SCRIPT, [json.dumps(list(uploads), default=str)], environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
