"""Chat completions: their shapes by the openai package's own types, and what they say by the library in this process."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from mlx_mixtral import SamplingParams
from tests.server.conftest import Running

PATH = "/v1/chat/completions"
ASK: list[dict[str, Any]] = [{"role": "user", "content": "Say something."}]


def _body(**fields: Any) -> dict[str, Any]:
    return {"messages": ASK, "max_tokens": 12, "temperature": 0} | fields


def _texts(events: list[Any], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def test_an_answer_is_what_the_library_generates(server: Running) -> None:
    expected = server.model.tokenizer.encode_chat(ASK)
    reply = server.chat(ASK, max_tokens=12)
    with_library = server.server.engine.exclusive(
        lambda model: model.chat(ASK, max_tokens=12, sampling=SamplingParams())
    ).result(60)
    assert reply["choices"][0]["message"]["content"] == with_library.text  # type: ignore[attr-defined]
    assert reply["usage"]["prompt_tokens"] == len(expected)
    assert reply["usage"]["completion_tokens"] == 12
    assert reply["model"] == "tiny"


@pytest.mark.parametrize("fields", [{}, {"n": 3, "temperature": 1}, {"logprobs": True, "top_logprobs": 3}])
def test_bodies_are_of_the_openai_packages_type(server: Running, fields: dict[str, Any]) -> None:
    reply = server.post(PATH, _body(**fields))
    read = ChatCompletion.model_validate(reply.json(), strict=True)
    assert len(read.choices) == fields.get("n", 1)
    assert [choice.index for choice in read.choices] == list(range(len(read.choices)))


@pytest.mark.parametrize("fields", [{}, {"n": 3, "temperature": 1}, {"logprobs": True, "top_logprobs": 3}])
def test_chunks_are_of_the_openai_packages_type(server: Running, fields: dict[str, Any]) -> None:
    events = server.events(PATH, _body(**fields, stream_options={"include_usage": True}))
    chunks = [ChatCompletionChunk.model_validate(event, strict=True) for event in events]
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1
    first = {choice.index: choice.delta.role for chunk in reversed(chunks) for choice in chunk.choices}
    assert first == dict.fromkeys(range(fields.get("n", 1)), "assistant")


def test_a_stream_says_what_the_plain_reply_says(server: Running) -> None:
    body = _body(seed=11, temperature=1, n=2, logprobs=True, top_logprobs=2)
    plain, events = server.post(PATH, body).json(), server.events(PATH, body)
    for choice in plain["choices"]:
        assert _texts(events, choice["index"]) == choice["message"]["content"]
        own = [each for event in events for each in event["choices"] if each["index"] == choice["index"]]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        assert own[-1]["delta"] == {}
        entries = [entry for each in own if each["logprobs"] for entry in each["logprobs"]["content"]]
        assert entries == choice["logprobs"]["content"]


def test_the_last_event_before_done_is_the_usage(server: Running) -> None:
    """Its `choices` are empty; every other chunk has a null."""
    events = server.events(PATH, _body(stream_options={"include_usage": True}))
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == server.post(PATH, _body()).json()["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    assert all("usage" not in event for event in server.events(PATH, _body()))


def test_finish_reasons(server: Running) -> None:
    """Length by max_tokens, stop by a text and by a token id."""
    assert server.chat(ASK, max_tokens=1)["choices"][0]["finish_reason"] == "length"
    whole = server.chat(ASK, max_tokens=12)["choices"][0]["message"]["content"]
    stopped = server.chat(ASK, max_tokens=12, stop=[whole[3:5]])["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["message"]["content"] == whole[: whole.index(whole[3:5])]
    generated = server.server.engine.exclusive(
        lambda model: model.chat(ASK, max_tokens=12, sampling=SamplingParams())
    ).result(60)
    ids = generated.token_ids  # type: ignore[attr-defined]
    by_id = server.chat(ASK, max_tokens=12, stop_token_ids=[ids[6]])
    assert by_id["choices"][0]["finish_reason"] == "stop"
    assert by_id["usage"]["completion_tokens"] == ids.index(ids[6]) + 1


def test_a_stop_text_across_tokens_is_never_shown(server: Running) -> None:
    """In the plain reply and in the stream."""
    whole = server.chat(ASK, max_tokens=30)["choices"][0]["message"]["content"]
    stop = whole[4:12]
    events = server.events(PATH, _body(max_tokens=30, stop=stop))
    assert _texts(events) == whole[: whole.index(stop)]


def test_tokens_of_logprobs_joined_are_the_text(server: Running) -> None:
    """With bytes; also where characters are spread over several tokens."""
    bias = {str(token): 30 for token in server.model.tokenizer.encode_plain("🙂é")}
    body = _body(max_tokens=40, temperature=1, seed=5, logit_bias=bias, logprobs=True, top_logprobs=2)
    reply = server.post(PATH, body).json()["choices"][0]
    data = b"".join(bytes(entry["bytes"] or b"") for entry in reply["logprobs"]["content"])
    assert data.decode("utf-8", "replace").replace("\ufffd", "") == reply["message"]["content"].replace("\ufffd", "")
    assert all(len(entry["top_logprobs"]) == 2 for entry in reply["logprobs"]["content"])
    events = server.events(PATH, body)
    assert _texts(events) == reply["message"]["content"]


def test_logprobs_of_a_text_cut_by_a_stop_end_with_it(server: Running) -> None:
    whole = server.chat(ASK, max_tokens=12, logprobs=True)["choices"][0]
    tokens = [entry["token"] for entry in whole["logprobs"]["content"]]
    stop = tokens[5] + tokens[6]
    cut = server.chat(ASK, max_tokens=12, logprobs=True, stop=stop)["choices"][0]
    joined = "".join(entry["token"] for entry in cut["logprobs"]["content"])
    assert joined == cut["message"]["content"] == "".join(tokens)[: "".join(tokens).index(stop)]


def test_a_seed_gives_the_same_text_among_seven_others(server: Running) -> None:
    import threading

    alone = server.chat(ASK, seed=3, temperature=1, max_tokens=12)["choices"][0]["message"]["content"]
    together: list[str] = []
    bodies = [{"seed": 3}] * 4 + [{"seed": seed} for seed in range(20, 24)]
    threads = [
        threading.Thread(
            target=lambda fields: together.append(
                server.chat(ASK, temperature=1, max_tokens=12, **fields)["choices"][0]["message"]["content"]
                if fields["seed"] == 3
                else server.chat(ASK, temperature=1, max_tokens=12, **fields)["id"]
            ),
            args=(fields,),
        )
        for fields in bodies
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [text for text in together if not text.startswith("chatcmpl-")] == [alone] * 4


def test_answers_of_one_request_differ_and_the_first_is_the_seeds(server: Running) -> None:
    one = server.chat(ASK, seed=8, temperature=1)["choices"][0]["message"]["content"]
    texts = [choice["message"]["content"] for choice in server.chat(ASK, seed=8, temperature=1, n=4)["choices"]]
    assert texts[0] == one
    assert len(set(texts)) > 1


ASSISTANT = {"role": "assistant", "content": "Well."}
USER = {"role": "user", "content": "Go on."}
CALL = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}


@pytest.mark.parametrize(
    "messages",
    [
        [USER, USER],
        [{"role": "developer", "content": "Be short."}, USER],
        [{"role": "system", "content": "Be short."}, USER],
        [USER, ASSISTANT, {"role": "system", "content": "Be long."}, USER],
        [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
         {"role": "tool", "tool_call_id": "call_1", "content": "noon"}, USER],
        [USER, {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
         {"role": "tool", "tool_call_id": "call_1", "content": "noon"}],
        [{"role": "user", "content": [{"type": "text", "text": "Go"}, {"type": "text", "text": "on."}]}],
        [USER, ASSISTANT],
        [ASSISTANT, USER],
        [ASSISTANT],
        [USER, ASSISTANT, ASSISTANT, USER],
        [{"role": "system", "content": "Be short."}],
        [USER, {"role": "assistant", "content": ""}, USER],
    ],
    ids=["user-user", "developer", "system", "late system", "tool-user", "text and calls", "parts", "assistant last",
         "assistant first", "assistant alone", "assistant twice", "system alone", "empty answer"],
)  # fmt: skip
def test_any_order_of_roles_is_answered(server: Running, messages: list[dict[str, Any]]) -> None:
    assert server.chat(messages, max_tokens=2)["usage"]["completion_tokens"] == 2


def test_an_answer_that_was_begun_goes_on(server: Running) -> None:
    whole = server.chat(ASK, max_tokens=10, logprobs=True)["choices"][0]
    text = whole["message"]["content"]
    begun = "".join(entry["token"] for entry in whole["logprobs"]["content"][:5])
    rest = server.chat([*ASK, {"role": "assistant", "content": begun}], max_tokens=4)["choices"][0]["message"][
        "content"
    ]
    assert rest
    assert not rest.startswith(begun), text


def test_the_model_may_be_called_by_its_names_only(server: Running) -> None:
    for name in ("tiny", "small", "", None):
        assert server.chat(ASK, model=name, max_tokens=1)["choices"]
    refused = server.post(PATH, _body(model="/etc/passwd"))
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "model_not_found"


def test_unknown_fields_are_ignored(server: Running) -> None:
    assert server.chat(ASK, max_tokens=1, nonsense={"a": [1]}, service_tier="auto", reasoning_effort="low")["choices"]


def test_an_answer_ends_where_the_context_is_full(server: Running) -> None:
    long = server.model.tokenizer.decode(list(range(300, 1250)))
    tokens = server.post("/tokenize", {"messages": [{"role": "user", "content": long}]}).json()["count"]
    while tokens >= 1020:
        long = long[:-40]
        tokens = server.post("/tokenize", {"messages": [{"role": "user", "content": long}]}).json()["count"]
    reply = server.chat(long, max_tokens=5000)
    assert reply["usage"]["total_tokens"] <= 1024
    assert reply["choices"][0]["finish_reason"] in ("length", "stop")
