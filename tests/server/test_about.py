"""Paths that say something of the server and the model: the description, models, tokens, metrics, status."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import openai
import pytest
from openapi_spec_validator import validate

from mlx_mixtral.server.app import PATHS
from mlx_mixtral.server.metrics import METRICS, Metrics
from tests.server.conftest import Running

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}


@pytest.fixture
def description(server: Running) -> Any:
    return server.client.get("/openapi.json").json()


def test_the_description_is_openapi_and_of_every_path(server: Running, description: Any) -> None:
    validate(description)
    told = {(method.upper(), path) for path, methods in description["paths"].items() for method in methods}
    assert told == {(method, path.replace(":path}", "}")) for method, path, _ in PATHS}


def test_replies_are_as_described(server: Running, description: Any) -> None:
    asked = {
        ("post", CHAT): ASK | {"logprobs": True, "top_logprobs": 2, "n": 2},
        ("post", "/v1/completions"): {"prompt": "Hi", "max_tokens": 3, "logprobs": 2, "echo": True},
        ("post", "/v1/responses"): {"input": "Hi", "max_output_tokens": 3, "include": ["message.output_text.logprobs"]},
        ("post", "/v1/embeddings"): {"input": "Hi"},
        ("post", "/v1/messages"): ASK,
        ("post", "/v1/messages/count_tokens"): ASK,
        ("post", "/tokenize"): {"prompt": "Hi", "return_token_strs": True},
        ("post", "/detokenize"): {"tokens": [1, 300]},
        ("get", "/tokenizer_info"): None,
        ("get", "/v1/models"): None,
        ("get", "/v1/models/{model}"): None,
        ("get", "/v1/status"): None,
        ("get", "/health"): None,
    }
    for (method, path), body in asked.items():
        place = path.replace("{model}", "tiny")
        reply = server.post(place, body) if method == "post" else server.client.get(place)
        described = description["paths"][path][method]["responses"]
        for status, value in ((str(reply.status_code), reply.json()),):
            schema = described[status]["content"]["application/json"]["schema"]
            jsonschema.validate(value, schema | {"components": description["components"]})
    for path in (CHAT, "/v1/messages"):
        wrong = server.post(path, {})
        schema = description["paths"][path]["post"]["responses"]["400"]["content"]["application/json"]["schema"]
        jsonschema.validate(wrong.json(), schema | {"components": description["components"]})


def test_streams_are_described_whether_as_text_or_as_events(description: Any) -> None:
    """OpenAPI 3.1 leaves open whether the schema of a stream is that of its text or of each event."""
    paths = {path for path, methods in description["paths"].items() if _streams(methods)}
    assert paths == {CHAT, "/v1/completions", "/v1/responses", "/v1/messages"}
    for path in paths:
        schema = _streams(description["paths"][path])["schema"]
        assert schema["description"]
        for value in ("data: {}\n\n", {"event": "message_stop", "data": "{}"}):
            jsonschema.validate(value, schema)


def _streams(methods: Any) -> Any:
    return methods.get("post", {"responses": {"200": {"content": {}}}})["responses"]["200"]["content"].get(
        "text/event-stream"
    )


def test_the_openai_package_reads_it_all(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1/", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny", "small"]
        assert client.models.retrieve("tiny").object == "model"
        whole = client.chat.completions.create(model="tiny", **ASK)
        assert whole.usage is not None
        with client.chat.completions.create(model="tiny", stream=True, **ASK) as stream:
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("length", "stop")
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt-9", **ASK)
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="tiny", temperature=-1, **ASK)
        assert refused.value.param == "temperature"


def test_tokens_are_the_tokenizers(server: Running) -> None:
    own = server.model.tokenizer
    text = "The 🙂 fox</s>"
    made = server.post("/tokenize", {"prompt": text}).json()
    assert made["tokens"] == own.encode(text, special=True)
    assert made["count"] == len(made["tokens"])
    plain = server.post("/tokenize", {"prompt": text, "special": False, "add_special_tokens": False}).json()["tokens"]
    assert plain == own.encode(text, bos=False)
    assert server.post("/detokenize", {"tokens": plain}).json()["prompt"] == text
    strings = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()["token_strs"]
    assert strings == [own.id_to_piece(token) for token in made["tokens"]]
    messages = ASK["messages"]
    assert server.post("/tokenize", {"messages": messages}).json()["tokens"] == own.encode_chat(messages)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_one_of_prompt_and_messages_is_needed(server: Running, path: str) -> None:
    if path.startswith("/v1"):
        assert server.post(path, {"prompt": "Hi"}).status_code == 404
        return
    for body in ({}, {"prompt": "Hi", "messages": ASK["messages"]}):
        assert server.post(path, body).json()["error"]["param"] == "prompt"


def test_the_tokenizer_tells_what_it_is(server: Running) -> None:
    told = server.client.get("/tokenizer_info").json()
    own = server.model.tokenizer
    assert own.special_id(told["eos_token"]) == own.eos_token_id
    assert own.special_id(told["bos_token"]) == own.bos_token_id
    # As the harness's remote tokenizer asks for them.
    for name, expected in (("eos_token", own.eos_token_id), ("bos_token", own.bos_token_id)):
        body = {"prompt": told[name], "add_special_tokens": False}
        assert server.post("/tokenize", body).json()["tokens"] == [expected]


def _samples(text: str) -> dict[str, float]:
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            assert re.fullmatch(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})?', name), line
            found[name] = float(value)
    return found


def test_metrics_count_what_was_done(server: Running) -> None:
    before = _samples(server.client.get("/metrics").text)
    server.post(CHAT, ASK | {"max_tokens": 7})
    server.post(CHAT, {})
    after = _samples(server.client.get("/metrics").text)
    ok, refused = (f'mlx_mixtral_requests_total{{path="{CHAT}",status="{status}"}}' for status in (200, 400))
    assert after[ok] - before.get(ok, 0) == 1
    assert after[refused] - before.get(refused, 0) == 1
    assert after["mlx_mixtral_generated_tokens_total"] - before["mlx_mixtral_generated_tokens_total"] == 7
    for name in ("request_seconds_count", "time_to_first_token_seconds_count", "queue_seconds_count"):
        assert after[f"mlx_mixtral_{name}"] - before[f"mlx_mixtral_{name}"] == 1
    # The prompt is computed between them.
    queued_s, first_s = (
        after[name] - before[name]
        for name in ("mlx_mixtral_queue_seconds_sum", "mlx_mixtral_time_to_first_token_seconds_sum")
    )
    assert 0 <= queued_s < first_s
    assert after["mlx_mixtral_engine_up"] == 1
    assert after["mlx_mixtral_requests_running"] == after["mlx_mixtral_requests_waiting"] == 0


def test_every_metric_is_described() -> None:
    metrics = Metrics()
    metrics.observe("mlx_mixtral_request_seconds", 0.3)
    text = metrics.text()
    for name, (kind, about) in METRICS.items():
        assert f"# HELP {name} {about}\n# TYPE {name} {kind}\n" in text
    buckets = [line for line in text.splitlines() if line.startswith("mlx_mixtral_request_seconds_bucket")]
    counts = [int(line.rpartition(" ")[2]) for line in buckets]
    assert counts == sorted(counts)
    assert counts[-1] == 1
    assert 'le="0.25"} 0' in buckets[4]
    assert 'le="0.5"} 1' in buckets[5]


def test_the_status_has_no_prompts(server: Running) -> None:
    server.chat("xylophone quartz", max_tokens=1)
    told = server.client.get("/v1/status").text + server.client.get("/metrics").text
    assert "xylophone" not in told


def test_a_second_turn_goes_on_from_the_first(server: Running) -> None:
    """Tokens that are kept are counted as cached; the answer stays what it is without them."""
    long = "There was a town by the sea, and in it lived a clockmaker. " * 12
    first = [{"role": "user", "content": long}]
    answer = server.chat(first, max_tokens=16)
    turns = [*first, answer["choices"][0]["message"], {"role": "user", "content": "And then?"}]
    second = server.chat(turns, max_tokens=8)
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert answer["usage"]["prompt_tokens"] * 0.9 < cached < second["usage"]["prompt_tokens"]
