"""``serve`` on several machines: the answers of a server on one, and an end that leaves nobody waiting."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.distributed.launching import Rank, ended, ranks
from tests.served import served

PATIENCE_S = 60.0
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = "And it was so. " * 12
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
OPTIONS = ("--pooling", "mean", "--log-format", "none")


@contextlib.contextmanager
def served_together(folder: Path, split: str, *options: str) -> Iterator[tuple[httpx.Client, list[Rank]]]:
    """A server on two machines, once it listens."""
    command = ("-m", "mlx_mixtral", "serve", folder, "--port", "0", "--device", "cpu", "--split", split)
    with ranks(2, *command, *OPTIONS, *options) as found:
        leader, end = found[0], time.monotonic() + PATIENCE_S
        while not (said := re.search(r"listening at (\S+)/v1 ", leader.said)):
            assert leader.process.poll() is None, [each.said for each in found]
            assert time.monotonic() < end, "it does not listen"
            time.sleep(0.02)
        with httpx.Client(base_url=said[1], timeout=PATIENCE_S) as client:
            yield client, found


def ask(client: httpx.Client, path: str, **fields: Any) -> Any:
    reply = client.post(path, json={"temperature": 0, "max_tokens": 8} | fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def streamed(client: httpx.Client, content: str) -> str:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0, "stream": True}
    with client.stream("POST", CHAT, json=body) as reply:
        events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])


def cut(client: httpx.Client) -> None:
    """A stream that its reader leaves."""
    body = {"prompt": LONG, "max_tokens": 400, "temperature": 0, "stream": True, "logit_bias": {"2": -100}}
    with client.stream("POST", COMPLETIONS, json=body) as reply:
        next(reply.iter_lines())


def answers(client: httpx.Client) -> dict[str, Any]:
    """What is to be the same on one machine and on several, and numbers that are nearly."""
    found: dict[str, Any] = {}
    reply = ask(client, CHAT, messages=[{"role": "user", "content": "Who are you?"}], n=2, max_tokens=12)
    found["chat"] = [choice["message"]["content"] for choice in reply["choices"]]
    found["stream"] = streamed(client, "Once upon a time")
    cut(client)
    prompts = [LONG * 2, "Once", "And God said", "def main(", "It is"]
    with ThreadPoolExecutor(len(prompts)) as pool:
        replies = pool.map(
            lambda prompt: ask(client, COMPLETIONS, prompt=prompt, max_tokens=4 + len(prompt) % 9), prompts
        )
        found["at once"] = [each["choices"][0]["text"] for each in replies]
    time.sleep(1.2)
    again = [ask(client, COMPLETIONS, prompt=f"{LONG}{LONG}{LONG}") for _ in range(2)]
    found["again"] = [each["choices"][0]["text"] for each in again]
    found["cached"] = again[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    reply = ask(client, CHAT, messages=[{"role": "user", "content": "n?"}], response_format=form, max_tokens=24)
    found["json"] = reply["choices"][0]["message"]["content"]
    reply = ask(client, COMPLETIONS, prompt=LONG, max_tokens=0, echo=True, logprobs=2)
    scores = reply["choices"][0]["logprobs"]
    found["tokens"] = scores["tokens"]
    vectors = ask(client, "/v1/embeddings", input=[LONG, "Once"])["data"]
    found["numbers"] = [*scores["token_logprobs"][1:], *(x for each in vectors for x in each["embedding"])]
    return found


@pytest.fixture(scope="module")
def alone(short: Path) -> dict[str, Any]:
    with served(short, *OPTIONS) as process, httpx.Client(base_url=process.url, timeout=PATIENCE_S) as client:
        return answers(client)


@pytest.mark.parametrize(("split", "number"), [("experts", signal.SIGTERM), ("layers", signal.SIGINT)])
def test_answers_are_those_of_one_machine_and_the_leaders_end_is_everybodys(
    short: Path, alone: dict[str, Any], split: str, number: signal.Signals
) -> None:
    with served_together(short, split) as (client, found):
        own, expected = answers(client), dict(alone)
        assert own.pop("numbers") == pytest.approx(expected.pop("numbers"), abs=1e-4)
        assert own == expected
        assert own["cached"] > 20
        found[0].process.send_signal(number)
        assert ended(found, 15) == [0, 0]
        assert found[0].said.endswith("ends it\nthe server has ended\n")
        assert found[1].said == ""


def assert_lost(found: list[Rank], started: float) -> None:
    assert ended(found, 5) == [1, -signal.SIGKILL]
    assert time.monotonic() - started < 5
    assert found[0].said.splitlines()[-1].startswith("error: rank 0 of 2: the connection to rank 1 was lost")
    assert "ends it\nerror: " in found[0].said


def test_a_machine_that_is_killed_ends_the_server_with_an_error_for_its_client(short: Path) -> None:
    """MLX may wait for ever then: it depends on the moment who notices."""
    body = {"prompt": "Once", "max_tokens": 900, "temperature": 0, "stream": True, "logit_bias": {"2": -100}}
    with served_together(short, "layers") as (client, found):
        with client.stream("POST", COMPLETIONS, json=body) as reply:
            lines = reply.iter_lines()
            for _ in range(20):
                next(lines)
            found[1].process.kill()
            started = time.monotonic()
            rest = "\n".join(lines)
        assert '"code":"engine_failed"' in rest
        assert_lost(found, started)


def test_an_idle_server_ends_as_well(short: Path) -> None:
    with served_together(short, "experts") as (client, found):
        assert client.get("/health").status_code == 200
        found[1].process.kill()
        assert_lost(found, time.monotonic())


def test_weights_cannot_be_released_and_loaded_again(short: Path) -> None:
    with ranks(2, "-m", "mlx_mixtral", "serve", short, "--port", "0", "--idle-unload", "5") as found:
        assert ended(found, 30) == [2, 2]
        assert all("--idle-unload is not possible on several machines" in each.said for each in found)
