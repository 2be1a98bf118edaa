"""The server against the same work in this process, against mlx-lm's server, under load and with clients that fail.

    python tests/benchmarks/server.py [FOLDER] [--only LIST] [--repeats 5] [--tokens 128] [--mlx-lm]
    python tests/benchmarks/server.py --make bench-data/served --layers 4

Each line has a goal and a figure. Ratios are medians over pairs that alternate, so that a busy machine slows both alike; the
load average is printed beside them. What is compared with work in this process is served by this process too, to a client in
another one: the same weights at the same addresses, since two processes that hold equal weights differ by 8% here.

FOLDER is the bundled checkpoint when left out; ``--make`` writes one that is larger, in float32, with random weights, the
bundled tokenizer and a context of 32k tokens. ``--mlx-lm`` starts ``mlx_lm.server`` on the same folder. ``--only`` takes names
of parts: one, eight, constrained, load, turns, prefill, cuts, half-open, body, sigterm and mlx-lm.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
from make_served import make_served
from server_clients import Answer, ask, at_once, median_gap, mlx_lm_server, post_bytes, send_body, stream, together
from server_inside import Inside, inside

sys.path.insert(0, str(Path(__file__).parents[2]))
from mlx_mixtral import Mixtral
from mlx_mixtral.demo import checkpoint_path
from tests.served import ServedProcess, served

ROWS, MAX_STALL_S, GRACE_S = 8, 0.25, 2.0
OPENINGS = ("Once upon a time", "And God said", "Au commencement", "def main(", "The king", "Y dijo", "Und er", "It is")
PROMPTS = [f"{opening} there was something small that nobody had seen before, and" for opening in OPENINGS]
SCHEMA = {
    "type": "array",
    "items": {"type": "string", "minLength": 20, "maxLength": 40},
    "minItems": 12,
    "maxItems": 40,
}
# Never drawn: rows go on to their last token.
ENDLESS = {"logit_bias": {"2": -100}}
# Nor those without a text of their own, which wait for the next one: bytes of longer characters, and control tokens.
SHOWN = {"logit_bias": {str(token): -100 for token in (0, 1, 2, *range(3 + 0x80, 3 + 0x100))}}


class Benchmark:
    """Parts by name; each prints its lines.

    Args:
        here: what is compared with the same work without HTTP.
        tokens: of each answer.
        repeats: pairs of what is compared.
    """

    def __init__(self, folder: Path, here: Inside, server: ServedProcess, tokens: int, repeats: int) -> None:
        self.folder, self.here, self.server = folder, here, server
        self.tokens, self.repeats = tokens, repeats
        self.bodies = [{"prompt": prompt, "max_tokens": tokens, "temperature": 0} for prompt in PROMPTS]
        self.missed = 0

    def say(self, what: str, goal: str, figure: str, *, is_met: bool) -> None:
        self.missed += not is_met
        load = f"load {os.getloadavg()[0]:.1f}"
        print(f"{what:46} {goal:30} {figure:44} {'ok' if is_met else 'MISSED':7} {load}", flush=True)

    def ratio(self, what: str, least: float, one: Callable[[], float], other: Callable[[], float]) -> None:
        """Of two rates that are measured in turn, after once of each to warm up."""
        one(), other()
        pairs = []
        for index in range(self.repeats):
            # Whoever is first differs, too.
            both = [one(), other()] if index % 2 == 0 else [other(), one()][::-1]
            pairs.append(both)
        found = statistics.median(a / b for a, b in pairs)
        rates = [statistics.median(rate) for rate in zip(*pairs, strict=True)]
        self.say(
            what, f">= {least:g}x", f"{found:.3f}x ({rates[0]:.1f} : {rates[1]:.1f} tokens/s)", is_met=found >= least
        )

    def one_over_http(self, address: tuple[str, int] | None = None) -> float:
        answer = stream(address or self.server.address, self.bodies[0])
        return answer.tokens / answer.seconds

    def eight_over_http(self, address: tuple[str, int] | None = None) -> float:
        return together(address or self.server.address, self.bodies)[0]

    def one(self) -> None:
        def alone(model: Mixtral) -> float:
            started = time.perf_counter()
            count = sum(1 for _ in model.stream(PROMPTS[0], max_tokens=self.tokens))
            return count / (time.perf_counter() - started)

        here = self.here
        self.ratio("a stream, beside stream()", 0.97, lambda: here.asked(self.bodies[0]), lambda: here.alone(alone))

    def eight(self) -> None:
        def batch(model: Mixtral) -> float:
            started = time.perf_counter()
            found = model.generate_batch(PROMPTS, max_tokens=self.tokens)
            return sum(len(each.token_ids) for each in found) / (time.perf_counter() - started)

        here = self.here
        self.ratio(
            "eight, beside generate_batch()", 0.95, lambda: here.asked_together(self.bodies), lambda: here.alone(batch)
        )

    def constrained(self) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}

        def rate(**fields: Any) -> float:
            chats = [{"messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
            return together(
                self.server.address, [chat | {"max_tokens": self.tokens, "temperature": 0} | fields for chat in chats]
            )[0]

        self.ratio(
            "eight with a schema, beside without", 0.9, lambda: rate(response_format=form), lambda: rate(**ENDLESS)
        )

    def load(self) -> None:
        for count in (64, 200):
            started = time.perf_counter()
            found = Counter(at_once(self.server.address, self.bodies[0] | {"max_tokens": 16}, count))
            seconds = time.perf_counter() - started
            told = ", ".join(f"{status}: {times}" for status, times in found.items())
            goal = "all 200" if count <= 72 else "all 200 or 429"
            allowed = {200} if count <= 72 else {200, 429}
            self.say(f"{count} at once", goal, f"{told} in {seconds:.1f} s", is_met=found.keys() <= allowed)

    def long_text(self, tokens: int, start: int = 0) -> str:
        """A text of so many tokens that begins like no other."""
        words = [f"{start + index} sheep and" for index in range(tokens)]
        low, high = 1, tokens
        while high - low > 1:
            middle = (low + high) // 2
            if len(self.here.model.tokenizer.encode(" ".join(words[:middle]))) <= tokens:
                low = middle
            else:
                high = middle
        return " ".join(words[:low])

    def turns(self) -> None:
        context, ratios, shown = self.here.model.config.max_position_embeddings, list[float](), list[str]()
        for index in range(self.repeats):
            text = self.long_text(min(4000, context - 150), 1000 * index)
            messages = [{"role": "user", "content": text}]
            options = {"max_tokens": 16, "temperature": 0} | ENDLESS
            cold = stream(self.server.address, {"messages": messages} | options)
            messages += [{"role": "assistant", "content": cold.text}, {"role": "user", "content": "And then?"}]
            warm = stream(self.server.address, {"messages": messages} | options)
            ratios.append(warm.pieces[0] / cold.pieces[0])
            shown.append(f"{warm.pieces[0] * 1e3:.0f}/{cold.pieces[0] * 1e3:.0f}")
        found = statistics.median(ratios)
        self.say(
            "first token of a second turn, of the first's",
            "<= 0.1x",
            f"{found:.3f}x of {', '.join(shown)} ms",
            is_met=found <= 0.1,
        )

    def prefill(self) -> None:
        """Four streams, and a long prompt that comes when all of them run."""
        context = self.here.model.config.max_position_embeddings
        tokens = min(16_000, context - 50)
        text = self.long_text(tokens, 70_000)
        most = min(2000, context - 100)
        streams = [body | {"max_tokens": most} | SHOWN for body in self.bodies[:4]]
        alone = together(self.server.address, [body | {"max_tokens": 64} for body in streams])[1]
        step = median_gap(alone)
        answers: list[Answer] = []
        stamps: list[list[float]] = [[] for _ in streams]
        connections = [socket.create_connection(self.server.address, timeout=300) for _ in streams]

        def read(index: int) -> None:
            with contextlib.suppress(OSError):
                while connections[index].recv(65536):
                    stamps[index].append(time.perf_counter())

        threads = [threading.Thread(target=read, args=(index,)) for index in range(len(streams))]
        for connection, body, thread in zip(connections, streams, threads, strict=True):
            connection.sendall(post_bytes(body | {"stream": True}))
            thread.start()
        while not all(len(each) > 10 for each in stamps):
            time.sleep(0.01)
        started = time.perf_counter()
        answers.append(stream(self.server.address, {"prompt": text, "max_tokens": 2, "temperature": 0} | ENDLESS))
        ended = started + (answers[0].pieces[0] if answers[0].pieces else answers[0].seconds)
        for connection in connections:
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for thread in threads:
            thread.join()
        gaps = [
            (after - before, before - started)
            for each in stamps
            for before, after in pairwise(each)
            if after > started and before < ended
        ]
        goal = step + MAX_STALL_S
        over = sum(gap > goal for gap, _ in gaps)
        longest, at = max(gaps)
        usual = max(gap for answer in alone for gap in answer.gaps)
        self.say(
            f"gap beside a prompt of {tokens} ({ended - started:.1f} s)",
            f"<= {goal * 1e3:.0f} ms (a step {step * 1e3:.0f})",
            f"most {longest * 1e3:.0f} ms after {at:.1f} s, {over} of {len(gaps)} over, alone {usual * 1e3:.0f}",
            is_met=not over,
        )

    def cuts(self) -> None:
        bodies = [body | ENDLESS | {"max_tokens": 800, "stream": True} for body in self.bodies]
        step = median_gap(
            together(self.server.address, [body | ENDLESS | {"max_tokens": 64} for body in self.bodies])[1]
        )
        times = []
        status = http.client.HTTPConnection(*self.server.address)

        def running() -> int:
            status.request("GET", "/v1/status")
            return int(json.loads(status.getresponse().read())["rows"]["running"])

        for _ in range(self.repeats):
            connections = [socket.create_connection(self.server.address, timeout=300) for _ in bodies]
            for connection, body in zip(connections, bodies, strict=True):
                connection.sendall(post_bytes(body))
            for connection in connections:
                received = b""
                while received.count(b"data: ") < 3:
                    received += connection.recv(65536)
            assert running() == ROWS
            started = time.perf_counter()
            for connection in connections:
                connection.close()
            while running():
                time.sleep(0.001)
            times.append(time.perf_counter() - started)
        goal, found = step + 0.05, statistics.median(times)
        self.say(
            "8 cuts until their rows are free",
            f"<= {goal * 1e3:.0f} ms (a step {step * 1e3:.0f})",
            f"{found * 1e3:.0f} ms, of {', '.join(f'{each * 1e3:.0f}' for each in times)}",
            is_met=found <= goal,
        )

    def half_open(self) -> None:
        started = time.perf_counter()
        connections = [socket.create_connection(self.server.address, timeout=60) for _ in range(110)]
        for connection in connections:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: loc")
        begun = time.perf_counter()
        status = ask(self.server.address, self.bodies[0] | {"max_tokens": 4})
        answered = time.perf_counter() - begun
        for connection in connections:
            while connection.recv(4096):
                pass
            connection.close()
        closed = time.perf_counter() - started
        self.say(
            "a request beside 110 half-open connections",
            "200 within 10 s",
            f"{status} in {answered:.2f} s; all closed after {closed:.1f} s",
            is_met=status == 200 and answered <= 10,
        )

    def body(self) -> None:
        for is_chunked in (False, True):
            status, sent = send_body(self.server.address, 100_000_000, is_chunked=is_chunked)
            kind = "chunked" if is_chunked else "with its length"
            is_met = " 413 " in status and sent <= 4_000_000
            self.say(
                f"a body of 100 MB, {kind}",
                "413 after about 2 MB",
                f"{status}, {sent / 1e6:.1f} MB sent",
                is_met=is_met,
            )

    def sigterm(self) -> None:
        with served(self.folder, "--grace", str(GRACE_S), "--log-format", "none") as server:
            connections = [socket.create_connection(server.address, timeout=60) for _ in range(ROWS)]
            for connection, each in zip(connections, self.bodies, strict=True):
                connection.sendall(post_bytes(each | ENDLESS | {"max_tokens": 900, "stream": True, "n": 4}))
            for connection in connections[:2]:
                connection.recv(4096)
            seconds = server.terminate()
        goal = GRACE_S + 1
        self.say(
            "SIGTERM while 32 rows are open", f"<= grace + 1 = {goal:g} s", f"{seconds:.2f} s", is_met=seconds <= goal
        )

    def mlx_lm(self) -> None:
        with mlx_lm_server(self.folder) as address:
            self.ratio("a stream, beside mlx-lm's server", 1.0, self.one_over_http, lambda: self.one_over_http(address))
            self.ratio(
                "eight, beside mlx-lm's server", 1.0, self.eight_over_http, lambda: self.eight_over_http(address)
            )


PARTS = {name.replace("_", "-"): getattr(Benchmark, name) for name in (
    "one", "eight", "constrained", "load", "turns", "prefill", "cuts", "half_open", "body", "sigterm", "mlx_lm",
)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=checkpoint_path())
    parser.add_argument("--only", default=",".join(name for name in PARTS if name != "mlx-lm"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--mlx-lm", action="store_true")
    parser.add_argument("--make", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.make:
        make_served(arguments.make, arguments.layers)
        return
    mx.set_default_device(mx.cpu)
    options = ("--max-stall", str(MAX_STALL_S), "--log-format", "none", "--rows", str(ROWS))
    with inside(arguments.folder, ROWS, MAX_STALL_S) as here, served(arguments.folder, *options) as server:
        benchmark = Benchmark(arguments.folder, here, server, arguments.tokens, arguments.repeats)
        for name in [*arguments.only.split(","), *(["mlx-lm"] if arguments.mlx_lm else [])]:
            PARTS[name](benchmark)
    print(f"{benchmark.missed} goals missed")


if __name__ == "__main__":
    main()
