"""Completions: shapes by the openai package's own types; scores by the library's logits in this process."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from openai.types import Completion

from mlx_mixtral import Mixtral, SamplingParams
from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.server import rows
from mlx_mixtral.server.jobs import PromptScores
from mlx_mixtral.server.scoring import prompt_scores
from tests.server.conftest import Running, Serve, wait_until

PATH = "/v1/completions"
PROMPT = "The quick brown fox"


def _reply(server: Running, **fields: Any) -> Any:
    reply = server.post(PATH, {"prompt": PROMPT, "max_tokens": 6, "temperature": 0} | fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def _scores(server: Running, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Log-probabilities ``[L, V]`` of the library, computed where the server computes."""

    def work(model: Mixtral) -> np.ndarray[Any, Any]:
        logits = model.logits(tokens).astype(mx.float32)
        return np.asarray(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    return server.server.engine.exclusive(work).result(60)  # type: ignore[return-value]


def test_a_continuation_is_what_the_library_generates(server: Running) -> None:
    expected = server.server.engine.exclusive(
        lambda model: model.generate(PROMPT, max_tokens=6, sampling=SamplingParams()).text
    ).result(60)
    assert _reply(server)["choices"][0]["text"] == expected
    tokens = server.model.tokenizer.encode(PROMPT)
    assert _reply(server, prompt=tokens)["choices"][0]["text"] == expected


@pytest.mark.parametrize("fields", [{}, {"n": 2, "temperature": 1}, {"logprobs": 2}, {"echo": True}])
def test_bodies_and_chunks_are_of_the_openai_packages_type(server: Running, fields: dict[str, Any]) -> None:
    Completion.model_validate(_reply(server, **fields), strict=True)
    body = {"prompt": PROMPT, "max_tokens": 4, "stream_options": {"include_usage": True}} | fields
    events = server.events(PATH, body)
    for event in events:
        for choice in event["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"  # its type knows no unfinished chunks
        Completion.model_validate(event, strict=True)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["prompt_tokens"] > 0


def test_echoed_scores_are_the_librarys(server: Running) -> None:
    """Within 1e-4, for text and for ids; and what follows the prompt is scored in the same place."""
    tokens = server.model.tokenizer.encode(PROMPT)
    expected = _scores(server, tokens)
    for prompt in (PROMPT, tokens):
        choice = _reply(server, prompt=prompt, echo=True, logprobs=3, max_tokens=2)["choices"][0]
        found = choice["logprobs"]
        assert choice["text"].startswith(PROMPT)
        assert len(found["tokens"]) == len(tokens) + 2
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        for place in range(1, len(tokens)):
            row = expected[place - 1]
            assert abs(found["token_logprobs"][place] - row[tokens[place]]) < 1e-4
            likeliest = found["top_logprobs"][place]
            assert abs(max(likeliest.values()) - row.max()) < 1e-4
            assert found["tokens"][place] in likeliest


def test_offsets_and_tokens_are_those_of_the_text(server: Running) -> None:
    choice = _reply(server, echo=True, logprobs=0, max_tokens=5)["choices"][0]
    found = choice["logprobs"]
    shown = [each for each in zip(found["tokens"], found["text_offset"], found["bytes"], strict=True) if each[2]]
    for token, offset, _ in shown:
        assert choice["text"][offset : offset + len(token)] == token
    assert "".join(token for token, _, _ in shown) == choice["text"]


def test_a_stream_says_what_the_plain_reply_says(server: Running) -> None:
    fields: dict[str, Any] = {"echo": True, "logprobs": 2, "n": 2, "seed": 4, "temperature": 1, "max_tokens": 8}
    plain = _reply(server, **fields)
    events = server.events(PATH, {"prompt": PROMPT, **fields})
    for choice in plain["choices"]:
        own = [each for event in events for each in event["choices"] if each["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"]
        for key in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert [value for each in own for value in each["logprobs"][key]] == choice["logprobs"][key], key


def test_a_prompt_may_be_scored_alone(server: Running) -> None:
    choice = _reply(server, echo=True, logprobs=1, max_tokens=0)
    assert choice["choices"][0]["text"] == PROMPT
    assert choice["usage"]["completion_tokens"] == 0
    assert len(choice["choices"][0]["logprobs"]["tokens"]) == choice["usage"]["prompt_tokens"]
    streamed = server.events(PATH, {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 0})
    assert "".join(each["text"] for event in streamed for each in event["choices"]) == PROMPT


def test_several_prompts_have_their_answers_in_order(server: Running) -> None:
    prompts = [PROMPT, "Once upon a time", "def main():"]
    alone = [_reply(server, prompt=prompt)["choices"][0]["text"] for prompt in prompts]
    together = _reply(server, prompt=prompts)
    assert [choice["text"] for choice in together["choices"]] == alone
    pairs = _reply(server, prompt=[server.model.tokenizer.encode(prompt) for prompt in prompts], n=2)
    assert [choice["text"] for choice in pairs["choices"]] == [text for text in alone for _ in range(2)]
    assert pairs["usage"]["prompt_tokens"] == together["usage"]["prompt_tokens"]


def test_a_long_prompt_is_scored_beside_generations(server: Running) -> None:
    tokens = [1, *range(300, 1100, 2)]
    expected = _scores(server, tokens)
    results: list[Any] = []
    beside = threading.Thread(target=lambda: results.append(_reply(server, max_tokens=30)))
    beside.start()
    found = _reply(server, prompt=tokens, echo=True, logprobs=1, max_tokens=1)["choices"][0]["logprobs"]
    beside.join()
    wanted = expected[np.arange(len(tokens) - 1), tokens[1:]]
    assert np.abs(np.array(found["token_logprobs"][1 : len(tokens)]) - wanted).max() < 1e-4
    assert results[0]["choices"][0]["text"] == _reply(server, max_tokens=30)["choices"][0]["text"]


def test_a_prompt_that_is_scored_waits_no_longer(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be given up as one whose turn never came."""
    gate = threading.Event()

    def held(
        context: DecodeContext, tokens: Sequence[int], top: int, adapter: int | None
    ) -> Generator[None, None, PromptScores]:
        while not gate.wait(0.01):
            yield
        return (yield from prompt_scores(context, tokens, top, adapter))

    monkeypatch.setattr(rows, "prompt_scores", held)
    with serve() as server:
        body = {"prompt": PROMPT, "echo": True, "logprobs": 0, "max_tokens": 0}
        asking = threading.Thread(target=lambda: server.post(PATH, body))
        asking.start()
        wait_until(
            lambda: server.status()["requests_open"] == 1 and not server.status()["rows"]["waiting"], "it is scored"
        )
        gate.set()
        asking.join()


def test_control_tokens_in_a_prompt_can_stay_text(server: Running) -> None:
    with_token = _reply(server, prompt="a</s>b")["usage"]["prompt_tokens"]
    as_text = _reply(server, prompt="a</s>b", special=False)["usage"]["prompt_tokens"]
    own = server.model.tokenizer
    assert with_token == len(own.encode("a</s>b", special=True))
    assert as_text == len(own.encode("a</s>b"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"suffix": "the end"}, "suffix"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": [[1], [99999]]}, "prompt[1][0]"),
        ({"prompt": [5, -1]}, "prompt[1]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": [1] * 1024}, "prompt"),
        ({"logit_bias": {"4096": 1}}, "logit_bias.4096"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"stop_token_ids": [70000]}, "stop_token_ids[0]"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(server: Running, fields: dict[str, Any], param: str) -> None:
    reply = server.post(PATH, {"prompt": PROMPT} | fields)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
