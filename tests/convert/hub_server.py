"""A hub on this machine that serves one folder as ``owner/model``, by byte range, and breaks on purpose.

``run`` converts from it in a process of its own: huggingface_hub reads its settings when it is imported.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.forks import run_python
from tests.processes import PYTHONPATH

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BREAKS = ("drop", "503", "short", "429")
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pth", ".pt", ".npz")
# Pieces are small so that there are many. ``home`` is all this process may write to beside the destination.
SCRIPT = """
import json, os, signal, sys, threading, time
from pathlib import Path
from mlx_mixtral import AdapterSource
from mlx_mixtral.errors import MixtralError
from mlx_mixtral_convert import Recipe, convert
from mlx_mixtral.hub import ranges
from mlx_mixtral_convert.sources.storage import remote
ranges.PIECE_BYTES, ranges.WAIT_S, home = 12000, 0.001, Path(sys.argv[1])
ranges.TIMEOUT_S = float(os.environ.get("MLX_MIXTRAL_TEST_TIMEOUT_S", "5"))
remote.RemoteStorage.ahead_bytes = 30000
readers, stop_at, sizes, reading = [], int(sys.argv[4]), [], threading.Event()
signal.signal(signal.SIGINT, signal.default_int_handler)
class Counted(ranges.RangeReader):
    def __init__(self, listing):
        super().__init__(listing)
        readers.append(self)
    def read_into(self, *arguments):
        reading.set()
        super().read_into(*arguments)
remote.RangeReader = Counted
def interrupt():
    reading.wait()
    time.sleep(float(os.environ["MLX_MIXTRAL_TEST_INTERRUPT_S"]))
    os.kill(os.getpid(), signal.SIGINT)
if "MLX_MIXTRAL_TEST_INTERRUPT_S" in os.environ:
    threading.Thread(target=interrupt, daemon=True).start()
def size(path):
    # The client's threads make and remove files meanwhile.
    try:
        return 0 if os.path.islink(path) else os.path.getsize(path)
    except FileNotFoundError:
        return 0
def watch(at):
    sizes.append(sum(size(os.path.join(folder, name)) for folder, _, names in os.walk(home) for name in names))
    if stop_at and len(sizes) == stop_at + 1:
        raise KeyboardInterrupt
for options in json.loads(sys.argv[3]):
    sizes.clear(), readers.clear(), watch(None)
    options["recipe"] = Recipe(**options.get("recipe", {}))
    options["adapters"] = [AdapterSource(path) for path in options.get("adapters", ())]
    try:
        report = convert(options.pop("source", sys.argv[2]), **options, progress=watch)
        result = {"resumed": report.resumed_layers, "source_bytes": report.source_bytes}
    except KeyboardInterrupt as error:
        result = {"error": "KeyboardInterrupt", "message": "", "notes": getattr(error, "__notes__", [])}
    except MixtralError as error:
        result = {"error": type(error).__name__, "message": str(error), "notes": getattr(error, "__notes__", [])}
    result["retries"] = sum(reader.retries for reader in readers)
    result["received"] = sum(reader.received_bytes for reader in readers)
    print(json.dumps(result | {"peak": max(sizes) - sizes[0]}))
"""


@dataclass
class Hub:
    """``failures`` of all range requests that begin at ``failures_from`` or after it fail, in one of four ways; ``served``
    has (file, start, bytes) of each answer.

    ``revisions`` are those files were asked for at; ``listed`` sizes the listing says in place of the true ones; ``large``
    whether it knows the weights' sha256. The first pieces are answered when ``together`` of them are asked for at once.
    """

    folder: Path
    url: str = ""
    commit: str = COMMIT
    failures: float = 0.0
    failures_from: int = 0
    ranges: bool = True
    status: int | None = None
    hangs: threading.Event = field(default_factory=threading.Event)
    random: random.Random = field(default_factory=lambda: random.Random(3))
    served: list[tuple[str, int, int]] = field(default_factory=list)
    broken: Counter[str] = field(default_factory=Counter)
    whole: list[str] = field(default_factory=list)
    revisions: set[str] = field(default_factory=set)
    listed: dict[str, int] = field(default_factory=dict)
    large: bool = True
    together: int = 1
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Condition = field(default_factory=threading.Condition)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@functools.cache
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def _git_hash(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what some tests are about."""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith("/api/models/owner/model/revision/no-such"):
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif path.startswith("/api/models/owner/model"):
                self._send(200, json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": self._siblings()}).encode())
            elif path.startswith("/owner/model/resolve/"):
                with hub.lock:
                    hub.in_flight += 1
                    hub.most_in_flight = max(hub.most_in_flight, hub.in_flight)
                    hub.lock.notify_all()
                    if "Range" in self.headers:
                        hub.lock.wait_for(lambda: hub.most_in_flight >= hub.together, timeout=30)
                try:
                    revision, name = path.removeprefix("/owner/model/resolve/").split("/", 1)
                    hub.revisions.add(revision)
                    self._file(name)
                finally:
                    with hub.lock:
                        hub.in_flight -= 1
            else:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

        def _siblings(self) -> list[dict[str, object]]:
            made = []
            for name in hub.names():
                file = hub.folder / name
                entry: dict[str, object] = {"rfilename": name, "size": file.stat().st_size, "blobId": _git_hash(file)}
                entry["size"] = hub.listed.get(name, entry["size"])
                if hub.large and name.endswith(WEIGHTS):
                    entry["lfs"] = {"sha256": _sha256(file), "size": file.stat().st_size, "pointerSize": 134}
                made.append(entry)
            return made

        def _file(self, name: str) -> None:
            data = (hub.folder / name).read_bytes()
            headers = {"X-Repo-Commit": hub.commit if name.endswith(WEIGHTS) else COMMIT}
            headers["ETag"] = f'"{_sha256(hub.folder / name)}"'
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked is None or not hub.ranges or not name.endswith(WEIGHTS):
                hub.whole.append(name)
                self._send(200, data, headers)
                return
            if hub.status is not None:
                self._send(hub.status, b"", {})
                return
            if hub.hangs.is_set():
                # Longer than any test; the client goes away first.
                time.sleep(3)
                return
            start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            with hub.lock:
                fails = start >= hub.failures_from and hub.random.random() < hub.failures
                way = hub.random.choice(BREAKS) if fails else ""
                part = hub.random.randint(0, stop - start - 1)
                hub.broken[way] += bool(way)
            if way in ("503", "429"):
                self._send(int(way), b"", {"Retry-After": "0"})
                return
            if way:
                # The length of all of it, and a part of it: "drop" closes at once, "short" after some bytes.
                self._head(206, headers | {"Content-Length": str(stop - start)})
                self.wfile.write(data[start : start + (part if way == "short" else 0)])
                self.close_connection = True
                return
            hub.served.append((name, start, stop - start))
            self._send(206, data[start:stop], headers)

        def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
            self._head(status, {"Content-Length": str(len(data)), **(headers or {})})
            self.wfile.write(data)

        def _head(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """A running hub for ``folder``."""
    hub = Hub(folder)
    with listening(_Server(("127.0.0.1", 0), _handler(hub))) as hub.url:
        yield hub


@contextlib.contextmanager
def listening(server: ThreadingHTTPServer) -> Iterator[str]:
    """A server at work, and its address."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run_all(
    home: Path,
    hub: Hub,
    conversions: list[dict[str, Any]],
    *,
    source: str = "owner/model",
    stop_at: int = 0,
    settings: dict[str, str] | None = None,
) -> list[Any]:
    """``convert(…)`` with each of the options, one after another, in a process that knows only this hub.

    ``peak`` of each result is the most its disk grew outside of the destination; ``retries`` counts requests made again.
    """
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hub"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_ETAG_TIMEOUT": "2", "NO_PROXY": "*", "PYTHONPATH": PYTHONPATH,
        "TMPDIR": str(home / "tmp"),
    }  # fmt: skip
    arguments = [str(home), source, json.dumps(conversions, default=str), str(stop_at)]
    done = run_python(SCRIPT, arguments, environment | (settings or {}))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def run(
    home: Path, hub: Hub, dest: Path, stop_at: int = 0, settings: dict[str, str] | None = None, **options: Any
) -> Any:
    """One conversion, streamed unless ``options`` say otherwise."""
    return run_all(home, hub, [{"dest": dest, "stream": True, **options}], stop_at=stop_at, settings=settings)[0]
