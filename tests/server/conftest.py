"""Servers for the tests, in this process: a thread each, a free port, the log in memory."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_mixtral import Mixtral, load
from mlx_mixtral.server.log import RequestLog
from mlx_mixtral.server.options import ServerOptions
from mlx_mixtral.server.serving import ModelServer
from tests.server.browser import READY, Browser, Page, chromium

PATIENCE_S = 60.0
"""Until something that must happen soon counts as never: no measurement."""


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Until ``condition`` holds."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"{what}: not after {PATIENCE_S} s"
        time.sleep(0.005)


@dataclass
class Running:
    """A server that runs."""

    server: ModelServer
    model: Mixtral
    log: io.StringIO
    client: httpx.Client
    thread: threading.Thread | None = None
    statuses: list[int] = field(default_factory=list)
    connections: list[socket.socket] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.rpartition("/")[2].rpartition(":")
        return host, int(port)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options) if body is not None else self.client.post(path, **options)

    def line_of(self, reply: httpx.Response) -> str:
        """The one line of log that a request left; it is written behind the reply."""
        own = f"id={reply.headers['x-request-id']}"
        wait_until(lambda: own in self.log.getvalue(), "the line is written")
        (line,) = [line for line in self.log.getvalue().splitlines() if own in line]
        return line

    def chat(self, content: Any = "Hello", **fields: Any) -> Any:
        """The reply to one user's message, which must be a 200."""
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        reply = self.post("/v1/chat/completions", {"messages": messages, "max_tokens": 8, "temperature": 0} | fields)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """Data of a stream's events, the last ``[DONE]`` left out."""
        with self.client.stream("POST", path, json=body | {"stream": True}) as reply:
            assert reply.status_code == 200, reply.read()
            assert reply.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in reply.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def named_events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """Data of a stream whose events have their type as a name; comments and pings left out."""
        with self.client.stream("POST", path, json=body | {"stream": True}) as reply:
            assert reply.status_code == 200, reply.read()
            parts = [part for part in reply.read().decode().split("\n\n") if part]
        events = []
        for name, data in (part.split("\n") for part in parts if not part.startswith(":")):
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
        return [event for event in events if event["type"] != "ping"]

    def status(self) -> Any:
        return self.client.get("/v1/status").json()

    def is_idle(self) -> bool:
        """Whether no row is open or computed."""
        status = self.status()
        return not status["requests_open"] and not status["rows"]["running"]

    def raw(self, request: bytes = b"") -> socket.socket:
        """A connection on which ``request`` was sent; closed with the server at the latest."""
        connection = socket.create_connection(self.address, timeout=PATIENCE_S)
        self.connections.append(connection)
        connection.sendall(request)
        return connection

    def stop(self) -> None:
        self.server.stop()
        if self.thread is not None:
            self.thread.join(PATIENCE_S)
            assert not self.thread.is_alive()


Serve = Callable[..., contextlib.AbstractContextManager[Running]]


@contextlib.contextmanager
def running(folder: Path, loading: Callable[[], Mixtral] | None = None, **options: Any) -> Iterator[Running]:
    """A server of ``folder``; ``options`` as of ``ServerOptions``."""
    log = io.StringIO()
    given = ServerOptions(**{"port": 0, "name": "tiny", "aliases": ("small",), "grace_s": 5.0} | options)
    server = ModelServer(loading or (lambda: load(folder)), given, log=RequestLog(given.log_format, log))
    model = server.start()
    headers = {"authorization": f"Bearer {given.api_keys[0]}"} if given.api_keys else {}
    verify = not given.tls_cert
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S, headers=headers, verify=verify) as client:
        found = Running(server, model, log, client)
        found.thread = threading.Thread(target=lambda: found.statuses.append(server.run()))
        found.thread.start()
        try:
            # It listens already: the first answer comes as soon as it runs.
            client.get("/health")
            yield found
        finally:
            for connection in found.connections:
                connection.close()
            server.stop()
            server.stop()
            found.thread.join(PATIENCE_S)
            if found.thread.is_alive():
                faulthandler.dump_traceback(sys.__stderr__)  # what it waits for
            assert not found.thread.is_alive()


@pytest.fixture(scope="session")
def serve(short: Path) -> Serve:
    """Starts a server of its own: ``with serve(queue=2) as server``."""

    def start(folder: Path = short, **options: Any) -> contextlib.AbstractContextManager[Running]:
        return running(folder, **options)

    return start


@pytest.fixture(scope="session")
def shared_server(short: Path) -> Iterator[Running]:
    """One that all tests ask which leave nothing behind."""
    with running(short) as found:
        yield found


@pytest.fixture
def server(shared_server: Running) -> Running:
    """The shared one, its log empty but for what earlier requests still write."""
    wait_until(shared_server.is_idle, "what an earlier test asked is done")
    shared_server.log.seek(0)
    shared_server.log.truncate()
    return shared_server


OpenPage = Callable[..., Page]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for all tests that have one."""
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def opened(browser: Browser) -> Iterator[OpenPage]:
    """Opens the page of a server: ``opened(server, width=390, is_phone=True)``, each time as a user of its own."""
    pages: list[Page] = []

    def open_page(server: Running, beside: Page | None = None, ready: str = READY, **screen: Any) -> Page:
        page = Page(browser, beside)
        pages.append(page)
        page.show(**{"width": 1280, "height": 800} | screen)
        page.open(f"{server.url}/")
        page.wait(ready)
        return page

    yield open_page
    for user in {page.user for page in pages}:
        browser.call("Target.disposeBrowserContext", browserContextId=user)
