"""Thousands of requests to a server, many of them cut: what it takes of the machine must not grow.

    python -m tests.soak.server                     10,000 requests
    python -m tests.soak.server --requests 300 --seed 3

Eight clients send chats and completions of all lengths, streamed and plain, some with a schema, some too long; every tenth goes
away in the middle. The server runs in a process of its own. After each tenth of the requests, once it is idle, its resident
memory, MLX's active memory beside the kept prompts, open files and threads are noted; what they are at the first of these
(1,000 of 10,000) they must still be at the last, but for what ``check`` allows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.served import ServedProcess, served
from tests.shared import short_checkpoint

__all__ = ["Sample", "ServerSoakReport", "soak_server"]

CLIENTS, SAMPLES = 8, 10
CUT_SHARE = 0.1
MAX_GROWTH_BYTES, MAX_ACTIVE_GROWTH_BYTES = 16_000_000, 64_000
SETTLE_S = 10.0
PATHS = {"chat": "/v1/chat/completions", "text": "/v1/completions"}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Sample:
    """An idle server."""

    requests: int
    seconds: float
    resident_bytes: int
    active_bytes: int
    """MLX's, without the prompts that are kept."""
    open_files: int | None
    threads: int | None


@dataclass
class ServerSoakReport:
    """What happened; ``problems`` is empty when all is well."""

    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def check(self) -> None:
        """Compare the last sample with the first."""
        first, last = self.samples[0], self.samples[-1]
        for what, before, after, most in (
            ("resident memory", first.resident_bytes, last.resident_bytes, MAX_GROWTH_BYTES),
            ("MLX's active memory", first.active_bytes, last.active_bytes, MAX_ACTIVE_GROWTH_BYTES),
            ("open files", first.open_files or 0, last.open_files or 0, 0),
            ("threads", first.threads or 0, last.threads or 0, 0),
        ):
            if after > before + most:
                self.problems.append(f"{what} grew from {before} to {after}")


def soak_server(
    requests: int, seed: int, folder: Path, noted: Callable[[Sample], None] = lambda sample: None
) -> ServerSoakReport:
    """Run it on a short model made in ``folder``; ``noted`` is called with each sample."""
    short_checkpoint(folder / "model")
    report, started = ServerSoakReport(), time.perf_counter()
    with served(folder / "model", "--prefix-cache", "4MB", "--log-format", "none", "--queue", "64") as server:
        _fill_pools(server)
        for part in range(SAMPLES):
            numbers = iter(range(part * requests // SAMPLES, (part + 1) * requests // SAMPLES))
            _clients(server, numbers, seed, report)
            report.samples.append(_sample(server, (part + 1) * requests // SAMPLES, started, report))
            noted(report.samples[-1])
        if "Traceback" in server.log:
            report.problems.append(f"the server's log has a traceback: {server.log[-2000:]}")
    report.check()
    return report


def _fill_pools(server: ServedProcess) -> None:
    """Ask so many things at once that every thread there may be is there: a pool makes one when the others are busy."""
    long = {"prompt": "again and " * 8000}
    # Each is another schema: one that was compiled is not compiled again.
    schemas = [SCHEMA | {"description": f"{number} " * 5000} for number in range(CLIENTS)]
    forms = [{"type": "json_schema", "json_schema": {"name": "it", "schema": schema}} for schema in schemas]
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}

    def post(body: dict[str, Any]) -> None:
        httpx.post(f"{server.url}{PATHS['chat' if 'messages' in body else 'text']}", json=body, timeout=120)

    for bodies in ([long] * CLIENTS, [chat | {"response_format": form} for form in forms]):
        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(post, bodies))


def _clients(server: ServedProcess, numbers: Any, seed: int, report: ServerSoakReport) -> None:
    lock = threading.Lock()

    def work() -> None:
        with httpx.Client(base_url=server.url, timeout=120) as client:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                # What is asked depends on the number alone, whichever client sends it.
                chance = random.Random(seed * 1_000_003 + number)
                try:
                    outcome = _request(server, client, chance)
                except Exception as error:
                    outcome = "failed"
                    with lock:
                        report.problems.append(f"request {number}: {type(error).__name__}: {error}")
                with lock:
                    report.outcomes[outcome] += 1

    threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _request(server: ServedProcess, client: httpx.Client, chance: random.Random) -> str:
    kind, body = _body(chance)
    if chance.random() < CUT_SHARE:
        _cut(server, kind, body | {"max_tokens": 400, "n": 1, "logit_bias": {"2": -100}}, chance)
        return "cut"
    if chance.random() < 0.01:
        reply = client.post(PATHS["text"], json={"prompt": "again and " * 8000})
        assert reply.status_code == 400, (reply.status_code, reply.text)
        return "too long"
    reply = client.post(PATHS[kind], json=body)
    if reply.status_code == 429:
        return "429"
    assert reply.status_code == 200, (reply.status_code, reply.text)
    if body["stream"]:
        assert reply.text.endswith("data: [DONE]\n\n"), reply.text[-200:]
        return "streamed"
    choices = reply.json()["choices"]
    assert len(choices) == body["n"], choices
    if "response_format" in body:
        json.loads(choices[0]["message"]["content"])
        return "with a schema"
    return "plain"


def _body(chance: random.Random) -> tuple[str, dict[str, Any]]:
    text = f"{chance.random()} " + "hello " * chance.randint(1, 40)
    body: dict[str, Any] = {
        "max_tokens": chance.randint(1, 24),
        "stream": chance.random() < 0.5,
        "n": chance.choice((1, 1, 1, 2)),
        "temperature": chance.choice((0, 1)),
        "seed": chance.randint(0, 99),
    }
    if chance.random() < 0.3:
        return "text", body | {"prompt": text, "logprobs": chance.choice((None, 3))}
    # Half of the conversations begin alike.
    turns = [{"role": "user", "content": "Who was the first king?"}, {"role": "assistant", "content": "Saul was."}]
    messages = [*(turns if chance.random() < 0.5 else []), {"role": "user", "content": text}]
    if chance.random() < 0.1:
        body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}}
        body |= {"max_tokens": 60, "stream": False}
    return "chat", body | {"messages": messages}


def _cut(server: ServedProcess, kind: str, body: dict[str, Any], chance: random.Random) -> None:
    data = json.dumps(body).encode()
    lines = (
        f"POST {PATHS[kind]} HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {len(data)}",
    )
    whole = "\r\n".join([*lines, "", ""]).encode() + data
    with socket.create_connection(server.address, timeout=120) as connection:
        # In the request itself, in the queue or the prompt, or in the answer.
        when = chance.choice(("request", "prompt", "answer"))
        connection.sendall(whole[: len(whole) // 2] if when == "request" else whole)
        if when == "answer" and body["stream"]:
            connection.recv(1000)


def _sample(server: ServedProcess, requests: int, started: float, report: ServerSoakReport) -> Sample:
    end = time.monotonic() + SETTLE_S
    expected = report.samples[0].open_files if report.samples else 0
    # Connections that were cut are given up within seconds.
    while time.monotonic() < end and not (server.is_idle() and (server.open_files or 0) <= (expected or 0)):
        time.sleep(0.1)
    status = server.status()
    if status["requests_open"] or status["rows"]["running"]:
        report.problems.append(f"not idle {SETTLE_S:g} s after request {requests}")
    time.sleep(0.2)
    active = status["memory"]["active_bytes"] - status["prefix_cache"]["bytes"]
    return Sample(
        requests, time.perf_counter() - started, server.resident_bytes, active, server.open_files, server.threads
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("requests  resident MB  active MB  files  threads  seconds")

    def show(sample: Sample) -> None:
        print(
            f"{sample.requests:8}  {sample.resident_bytes / 1e6:11.1f}  {sample.active_bytes / 1e6:9.3f}  "
            f"{sample.open_files!s:>5}  {sample.threads!s:>7}  {sample.seconds:7.0f}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        report = soak_server(arguments.requests, arguments.seed, Path(folder), show)
    print(dict(report.outcomes))
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}")
    if report.problems:
        print("\n".join(report.problems[:20]))
        sys.exit(1)
    print("no growth, no request without its answer")


if __name__ == "__main__":
    main()
