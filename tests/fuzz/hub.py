"""The part of ``make fuzz`` that is a hub: each case a repository whose list of files, heads or bodies are bent by its number.

A case ends in the true files or in one HubError line, within its limits, and writes to the cache alone.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from tests.fuzz.mutate import BENDS
from tests.fuzz.mutate_json import NUMBERS, TRAVERSALS, bend_json
from tests.hub.asking import ask_all
from tests.hub.lying_server import BLOCK, COMMIT, FILES, forever, listing, serve

__all__ = ["bent", "wrong_results"]

BATCH = 48
# Of a file, when its size in the list was bent too.
MOST_BYTES = 2 * max(map(len, FILES.values()))
HEADERS = (
    "Content-Length", "Content-Range", "Content-Encoding", "Content-Type", "Transfer-Encoding", "Connection", "ETag",
    "Location", "Retry-After", "X-Error-Code", "X-Linked-Etag", "X-Linked-Size", "X-Repo-Commit", "X-Xet-Hash", "Set-Cookie",
    "Accept-Ranges",
)  # fmt: skip
VALUES = (
    "", " ", "0", "-1", "gzip", "br", "chunked", "close", "bytes 0-24/25", "bytes 5-9/10", "bytes */*", "GatedRepo",
    "RepoNotFound", "http://[", "file:///etc/passwd", "//", "?", "x" * 70_000, "é", "a: b",
)  # fmt: skip
STATUSES = (200, 200, 200, 200, 206, 204, 301, 302, 307, 400, 401, 403, 404, 416, 418, 429, 500, 503, 600, 999)


def bent(handler: BaseHTTPRequestHandler, lie: str, *, is_api: bool, file: str) -> None:
    """Answer a request to the repository ``lie``: one of the answers is bent, always the same one in the same way."""
    rng = random.Random(f"hub:{lie}")
    place = rng.choice(("api", "api", *FILES))
    data = listing() if is_api else FILES.get(file, b"")
    true = {"ETag": f"{'f' * 40}{len(data)}", "X-Repo-Commit": COMMIT}
    if (place == "api") != is_api or (not is_api and place != file):
        _answer(handler, 200, {"Content-Length": str(len(data)), **true}, data)
        return
    if is_api and rng.random() < 0.7:
        data = bend_json(rng, data)
    elif rng.random() < 0.5:
        data = rng.choice(BENDS)(rng, data)
    headers: dict[str, str] = {"Content-Length": str(len(data)), **true}
    status = 200
    if not is_api or rng.random() < 0.3:
        for _ in range(rng.choice((1, 1, 2, 3))):
            value = rng.choice((*VALUES, *map(str, NUMBERS), *(text for text in TRAVERSALS if text.isprintable())))
            headers[rng.choice(HEADERS)] = value
        status = rng.choice(STATUSES)
    _answer(handler, status, headers, data)
    if rng.random() < 0.1:
        forever(BLOCK, most=200)(handler)


def _answer(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes) -> None:
    head = f"HTTP/1.1 {status} x\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    handler.wfile.write(head.encode("latin-1", "replace") + data)
    handler.close_connection = True


def wrong_results(numbers: range, outcomes: Counter[str] | None = None) -> dict[str, str]:
    """The cases of ``numbers`` that end otherwise than they may, with what they did; ``outcomes`` counts all."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="mlx-mixtral-fuzz-") as folder, serve(bent) as hub:
        home = Path(folder, "a", "b", "c", "home")
        try:
            said = ask_all(hub.url, home, [f"case-{number}" for number in numbers])
        except AssertionError as error:
            return {"all": str(error)[-2000:]}
        if said["peak"] > 1_000_000:
            found["all"] = f"{said['peak']} kB of memory"
        for name, result in said["results"].items():
            if (problem := _problem(result)) is not None:
                found[name] = problem
            if outcomes is not None:
                outcomes["files" if "folder" in result else "HubError" if "message" in result else "wrong"] += 1
        beside = [str(path) for path in Path(folder).rglob("*") if not path.is_dir() and not path.is_relative_to(home)]
        if beside:
            found["all"] = f"files beside the cache: {beside[:5]}"
    return found


def _problem(result: dict[str, Any]) -> str | None:
    if "wrong" in result:
        return f"{result['wrong'][:500]}"
    if result["seconds"] > 60:
        return f"{result['seconds']:.0f} s"
    if "message" in result:
        message = result["message"]
        return None if message.isprintable() and len(message) <= 520 else f"no short line: {message[:300]!r}"
    # A list of other files may be true as well.
    read = [path.stat().st_size for path in Path(result["folder"]).iterdir()]
    return None if all(size <= MOST_BYTES for size in read) else f"{read} bytes"


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz-hub", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    args = parser.parse_args()
    started, outcomes, found = time.perf_counter(), Counter[str](), dict[str, str]()
    for first in range(args.first, args.first + args.cases, BATCH):
        found |= wrong_results(range(first, min(first + BATCH, args.first + args.cases)), outcomes)
    counted = ", ".join(f"{name} {count}" for name, count in outcomes.most_common())
    print(f"hub: {args.cases} cases, {len(found)} failures, {time.perf_counter() - started:.0f} s: {counted}")
    for name, problem in found.items():
        print(f"\n{name} {problem}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
