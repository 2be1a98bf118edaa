"""Adapters of a server: listed beside the model, chosen by ``model``, computed together, and never mixed up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import openai
import pytest

from mlx_mixtral import Mixtral, SamplingParams, load
from mlx_mixtral.adapters.source import AdapterSource
from tests.adapters.made import lora
from tests.server.conftest import Running, running, wait_until
from tests.shared import SharedFolders

NAMES = {"tiny": None, "one": "one", "two": "two"}
PROMPT = "The quick brown fox jumps over the lazy dog, and then"
CONVERSATION = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def loading(short: Path, shared: SharedFolders) -> Callable[[], Mixtral]:
    sources = [
        AdapterSource(
            shared(
                f"served adapter {seed}", partial(lora, model=short, seed=seed, parts=("attention", "expert"), size=0.2)
            ),
            name,
        )
        for seed, name in ((1, "one"), (2, "two"))
    ]
    return lambda: load(short, adapter=sources)


@pytest.fixture(scope="module")
def adapted(short: Path, loading: Callable[[], Mixtral]) -> Iterator[Running]:
    with running(short, loading, pooling="last") as found:
        yield found


@pytest.fixture(scope="module")
def alone(loading: Callable[[], Mixtral]) -> Iterator[Mixtral]:
    """The same model and adapters without a server."""
    with loading() as model:
        yield model


def test_all_of_them_are_listed_with_their_parent(adapted: Running) -> None:
    listed = adapted.client.get("/v1/models").json()["data"]
    assert [(each["id"], each["parent"]) for each in listed] == [
        ("tiny", None), ("small", None), ("one", "tiny"), ("two", "tiny"),
    ]  # fmt: skip
    assert adapted.client.get("/v1/models/two").json() == listed[3]
    assert adapted.status()["adapters"] == ["one", "two"]


def test_another_name_is_refused_with_those_there_are(adapted: Running) -> None:
    reply = adapted.post("/v1/completions", {"model": "three", "prompt": "Hi"})
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert error["code"] == "model_not_found"
    assert "tiny and small and one and two" in error["message"]


def test_requests_at_once_are_answered_as_alone(adapted: Running, alone: Mixtral) -> None:
    texts = {
        (name, prompt): alone.generate(prompt, max_tokens=24, adapter=adapter).text
        for name, adapter in NAMES.items()
        for prompt in (PROMPT, "Once upon a time", "One, two, three")
    }
    assert len({text for (_, prompt), text in texts.items() if prompt == PROMPT}) == 3, "adapters change the text"

    def ask(given: tuple[str, str]) -> Any:
        name, prompt = given
        body = {"model": name, "prompt": prompt, "max_tokens": 24, "temperature": 0}
        return adapted.post("/v1/completions", body).json()

    with ThreadPoolExecutor(len(texts)) as pool:
        replies = list(pool.map(ask, texts))
    assert [reply["choices"][0]["text"] for reply in replies] == list(texts.values())
    assert [reply["model"] for reply in replies] == [name for name, _ in texts]


@pytest.mark.parametrize("name", NAMES)
def test_every_protocol_answers_with_the_adapter_named(adapted: Running, alone: Mixtral, name: str) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "adapter": NAMES[name]}
    text = alone.chat(CONVERSATION, sampling=SamplingParams(), **options).text
    reply = adapted.chat(CONVERSATION, model=name, max_tokens=12)
    assert (reply["model"], reply["choices"][0]["message"]["content"]) == (name, text)
    body = {"model": name, "messages": CONVERSATION, "max_tokens": 12, "temperature": 0}
    chunks = adapted.events("/v1/chat/completions", body)
    assert {chunk["model"] for chunk in chunks} == {name}
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == text
    reply = adapted.post("/v1/messages", body).json()
    assert (reply["model"], reply["content"][0]["text"]) == (name, text)
    reply = adapted.post(
        "/v1/responses", {"model": name, "input": CONVERSATION, "max_output_tokens": 12, "temperature": 0}
    ).json()
    assert (reply["model"], reply["output"][0]["content"][0]["text"]) == (name, text)
    for path, more in (
        ("/tokenize", {"prompt": "Hi"}),
        ("/detokenize", {"tokens": [1, 300]}),
        ("/v1/messages/count_tokens", {"messages": CONVERSATION}),
    ):
        assert adapted.post(path, {"model": name} | more).status_code == 200


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_vectors_are_the_adapters(adapted: Running, alone: Mixtral, name: str) -> None:
    ids = alone.tokenizer.encode(PROMPT)
    alone.adapters.use(NAMES[name])
    logits = alone.logits(ids).astype(mx.float32)
    hidden = alone.module.final_norm(
        alone.module.hidden(mx.array([ids]), cache := alone.make_cache()), cache.adapter
    ).astype(mx.float32)[0, -1]
    alone.adapters.use(None)
    scores = np.asarray(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    wanted = [float(scores[place, token]) for place, token in enumerate(ids[1:])]

    body = {"model": name, "prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0}
    found = adapted.post("/v1/completions", body).json()["choices"][0]["logprobs"]["token_logprobs"]
    np.testing.assert_allclose(found[1:], wanted, atol=2e-5)
    reply = adapted.post("/v1/embeddings", {"model": name, "input": ids}).json()
    assert reply["model"] == name
    np.testing.assert_allclose(reply["data"][0]["embedding"], np.asarray(hidden / mx.linalg.norm(hidden)), atol=2e-6)


def test_a_prompt_is_reused_for_its_own_adapter_only(serve: Callable[..., Any], loading: Callable[[], Mixtral]) -> None:
    with serve(loading=loading) as server:

        def cached(name: str) -> int:
            body = {"model": name, "prompt": PROMPT, "max_tokens": 2}
            usage = server.post("/v1/completions", body).json()["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        assert [cached(name) for name in NAMES] == [0, 0, 0]
        assert min(cached(name) for name in NAMES) > 0


def test_several_answers_to_one_prompt_share_its_adapter(adapted: Running, alone: Mixtral) -> None:
    body = {"model": "two", "prompt": [PROMPT, "One"], "n": 2, "max_tokens": 6, "temperature": 0}
    texts = [choice["text"] for choice in adapted.post("/v1/completions", body).json()["choices"]]
    wanted = [alone.generate(prompt, max_tokens=6, adapter="two").text for prompt in (PROMPT, "One")]
    assert texts == [wanted[0], wanted[0], wanted[1], wanted[1]]


def test_the_log_and_the_metrics_name_it(adapted: Running) -> None:
    def tokens() -> float:
        lines = adapted.client.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith('mlx_mixtral_generated_tokens_total{adapter="one"}')]
        return float(found[0].split()[-1]) if found else 0.0

    before = tokens()
    reply = adapted.post("/v1/completions", {"model": "one", "prompt": PROMPT, "max_tokens": 5})
    assert "adapter=one" in adapted.line_of(reply)
    assert tokens() == before + reply.json()["usage"]["completion_tokens"]
    assert "adapter" not in adapted.line_of(adapted.post("/v1/completions", {"prompt": "Hi", "max_tokens": 2}))


def test_weights_loaded_again_have_their_adapters(short: Path, loading: Callable[[], Mixtral], alone: Mixtral) -> None:
    with running(short, loading, idle_unload_s=0.01) as server:
        wait_until(lambda: server.status()["engine"] == "unloaded", "the weights are released")
        reply = server.post("/v1/completions", {"model": "two", "prompt": PROMPT, "max_tokens": 8, "temperature": 0})
        assert reply.json()["choices"][0]["text"] == alone.generate(PROMPT, max_tokens=8, adapter="two").text


def test_a_model_list_of_openais_client(adapted: Running) -> None:
    with openai.OpenAI(base_url=f"{adapted.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["tiny", "small", "one", "two"]
        assert client.completions.create(model="one", prompt="Hi", max_tokens=2).model == "one"
