"""Embeddings, against hidden states of each text alone, computed in one pass in this process."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import openai
import pytest
from openai.types import CreateEmbeddingResponse

from mlx_mixtral import Mixtral, load
from mlx_mixtral.server.jobs import PooledPrompt
from mlx_mixtral.server.options import PoolingKind
from mlx_mixtral.server.pooling import pooled_prompts
from tests.server.conftest import Running, Serve

PATH = "/v1/embeddings"
TEXTS = [
    "The sea was calm.",
    "A",
    "One two three four five six seven eight nine ten.",
    "Ein Haus</s>",
    "Das Haus am See.",
]
KINDS: tuple[PoolingKind, ...] = ("mean", "last")


@pytest.fixture(scope="module", params=KINDS)
def pooling(request: pytest.FixtureRequest, serve: Serve) -> Iterator[Running]:
    with serve(pooling=request.param) as found:
        yield found


def _expected(model: Mixtral, tokens: Sequence[int], kind: str) -> np.ndarray:
    module = model.engine.context.model
    with mx.stream(model.engine.stream):
        states = module.norm(module.hidden(mx.array([list(tokens)], mx.int32), module.make_cache()))
        mx.eval(states)
    found = np.asarray(states.astype(mx.float32))[0].astype(np.float64)
    vector = found.mean(axis=0) if kind == "mean" else found[-1]
    return np.asarray(vector / np.sqrt((vector * vector).sum()))


def _vectors(server: Running, given: Any, **fields: Any) -> np.ndarray:
    reply = server.post(PATH, {"input": given} | fields)
    assert reply.status_code == 200, reply.text
    read = CreateEmbeddingResponse.model_validate(reply.json(), strict=True)
    assert [each.index for each in read.data] == list(range(len(read.data)))
    return np.array([each.embedding for each in read.data])


def test_vectors_are_pooled_hidden_states(pooling: Running, short_model: Mixtral) -> None:
    own, kind = short_model.tokenizer, pooling.server.options.pooling
    assert kind is not None
    expected = [_expected(short_model, own.encode(text), kind) for text in TEXTS]
    found = _vectors(pooling, TEXTS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(_vectors(pooling, TEXTS[2]), expected[2:3], rtol=0, atol=1e-5)


def test_token_ids_are_taken(pooling: Running) -> None:
    own = pooling.model.tokenizer
    ids = [own.encode(text) for text in TEXTS]
    np.testing.assert_array_equal(_vectors(pooling, ids), _vectors(pooling, TEXTS))
    np.testing.assert_array_equal(_vectors(pooling, ids[0]), _vectors(pooling, TEXTS[0]))


def test_base64_is_the_same_numbers(pooling: Running) -> None:
    reply = pooling.post(PATH, {"input": TEXTS, "encoding_format": "base64"}).json()
    found = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in reply["data"]]
    np.testing.assert_array_equal(found, _vectors(pooling, TEXTS).astype(np.float32))


def test_the_openai_package_reads_it(pooling: Running) -> None:
    """It asks for base64 unless it is told otherwise."""
    with openai.OpenAI(base_url=f"{pooling.url}/v1", api_key="none", max_retries=0) as client:
        found = client.embeddings.create(model="tiny", input=TEXTS)
        np.testing.assert_allclose([each.embedding for each in found.data], _vectors(pooling, TEXTS), atol=1e-7)
        tokens = sum(len(pooling.model.tokenizer.encode(text)) for text in TEXTS)
        assert (found.usage.prompt_tokens, found.usage.total_tokens) == (tokens, tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_tokens", [16, 64, 4096])
def test_chunks_and_neighbours_change_nothing(short: Path, kind: PoolingKind, chunk_tokens: int) -> None:
    """Texts from one token to several chunks, computed in turn, together, and in pieces."""
    rng = np.random.default_rng(3)
    lengths = [1, 2, 2, 5, 16, 17, 18, 18, 40, 41, 47, 130, 131]
    with load(short) as model:
        prompts = [[int(token) for token in rng.integers(3, 300, length)] for length in lengths]
        context = dataclasses.replace(model.engine.context, chunk_tokens=chunk_tokens)
        steps = list(pooled_prompts(context, prompts, kind))
        found: list[PooledPrompt] = sorted((event for step in steps for event in step), key=lambda event: event.index)
        assert [event.index for event in found] == list(range(len(prompts)))
        expected = [_expected(model, prompt, kind) for prompt in prompts]
    np.testing.assert_allclose([event.vector for event in found], expected, rtol=0, atol=1e-5)
    if chunk_tokens == 4096:
        assert len(steps) < len(prompts)


def test_rope_scalings_that_turn_by_length_are_kept(short: Path) -> None:
    """Beyond the declared context each length has frequencies of its own."""
    rng = np.random.default_rng(5)
    with load(short, rope_scaling="dynamic=2") as model:
        prompts = [[int(token) for token in rng.integers(3, 300, length)] for length in (1100, 1110, 1110)]
        context = dataclasses.replace(model.engine.context, chunk_tokens=4096)
        steps = list(pooled_prompts(context, prompts, "last"))
        found = {event.index: event.vector for step in steps for event in step}
        expected = [_expected(model, prompt, "last") for prompt in prompts]
    assert len(steps) == 2
    np.testing.assert_allclose([found[index] for index in range(3)], expected, rtol=0, atol=1e-5)


def test_a_window_is_kept(short: Path) -> None:
    rng = np.random.default_rng(4)
    with load(short, kv_size=16) as model:
        prompts = [[int(token) for token in rng.integers(3, 300, length)] for length in (20, 24, 28, 60)]
        found = {
            event.index: event.vector
            for step in pooled_prompts(model.engine.context, prompts, "mean")
            for event in step
        }
        expected = [_expected(model, prompt, "mean") for prompt in prompts]
    np.testing.assert_allclose([found[index] for index in range(4)], expected, rtol=0, atol=1e-5)


def test_replies_are_as_described(pooling: Running) -> None:
    described = pooling.client.get("/openapi.json").json()
    schema = {"$ref": "#/components/schemas/Embeddings", "components": described["components"]}
    for encoding in ("float", "base64"):
        jsonschema.validate(pooling.post(PATH, {"input": "Hi", "encoding_format": encoding}).json(), schema)


def test_it_is_off_unless_the_server_was_told(server: Running) -> None:
    reply = server.post(PATH, {"input": "Hi"})
    assert reply.status_code == 501
    assert "--pooling mean" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", 5]}, "input[1]"),
        ({"input": [[]]}, "input[0]"),
        ({"input": [10**8]}, "input[0]"),
        ({"input": [[5], [10**8]]}, "input[1][0]"),
        ({"input": {"a": 1}}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "word " * 1100}, "input"),
        ({"input": ["a", "word " * 1100]}, "input[1]"),
        ({"dimensions": 8}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"model": "ada"}, "model"),
    ],
)
def test_a_wrong_field_is_named(pooling: Running, fields: dict[str, Any], param: str) -> None:
    reply = pooling.post(PATH, {"input": "Hi"} | fields)
    assert reply.status_code == (404 if param == "model" else 400), reply.text
    assert reply.json()["error"]["param"] == param, reply.text


def test_a_whole_context_is_taken(pooling: Running) -> None:
    most = pooling.server.service.served.context_tokens
    assert _vectors(pooling, [5] * most).shape[0] == 1


def test_a_waiting_time_does_not_end_what_is_computed(serve: Serve) -> None:
    """A job that only reads has begun, too, when its first chunk is computed."""
    with serve(pooling="mean") as server:
        _vectors(server, TEXTS)
        text = server.client.get("/metrics").text
    assert "mlx_mixtral_queue_seconds_count 1\n" in text
