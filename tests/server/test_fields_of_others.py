"""Fields that clients of vLLM, llama.cpp and mlx-lm send: kept, or refused by name where they would change the answer."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk

from mlx_mixtral import SamplingParams
from mlx_mixtral.server.wire.chat import CHAT_BODY
from mlx_mixtral.server.wire.completions import COMPLETION_BODY
from mlx_mixtral.server.wire.embeddings import EMBEDDINGS_BODY
from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.server.wire.fields import BodyTable
from mlx_mixtral.server.wire.responses import RESPONSES_BODY
from tests.server.conftest import Running

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER, ASSISTANT = {"role": "user", "content": "Say something."}, {"role": "assistant", "content": "Well,"}
ASK: dict[str, Any] = {"messages": [USER], "max_tokens": 6, "temperature": 0}

# What these servers' own schemas have as defaults: a client that sends all of them asks for nothing.
DEFAULTS: dict[str, dict[str, Any]] = {
    "vllm": {
        "prompt_logprobs": None, "skip_special_tokens": True, "spaces_between_special_tokens": True, "ignore_eos": False,
        "include_stop_str_in_output": False, "min_tokens": 0, "bad_words": [], "allowed_token_ids": None, "priority": 0,
        "truncate_prompt_tokens": None, "add_generation_prompt": True, "continue_final_message": False, "echo": False,
        "add_special_tokens": False, "chat_template": None, "chat_template_kwargs": None, "documents": None,
        "return_tokens_as_token_ids": None, "return_token_ids": None, "best_of": None, "use_beam_search": False,
        "length_penalty": 1.0, "repetition_penalty": 1.0, "min_p": 0.0, "top_k": 0, "include_reasoning": True,
    },
    "llama.cpp": {
        "n_predict": -1, "repeat_penalty": 1.0, "repeat_last_n": 64, "typical_p": 1.0, "mirostat": 0, "dynatemp_range": 0.0,
        "dry_multiplier": 0.0, "top_n_sigma": -1.0, "n_probs": 0, "post_sampling_probs": False, "return_tokens": False,
        "n_indent": 0, "t_max_predict_ms": -1, "lora": [], "grammar": "", "xtc_probability": 0.0, "xtc_threshold": 0.1,
        "cache_prompt": True, "ignore_eos": False,
    },
    "mlx-lm": {
        "repetition_penalty": 1.0, "repetition_context_size": 20, "xtc_probability": 0.0, "xtc_threshold": 0.0,
        "logit_bias": None, "adapters": None, "role_mapping": None, "min_p": 0.0, "top_k": 0, "presence_context_size": 20,
    },
}  # fmt: skip

ASKED_FOR: list[tuple[str, Any, str]] = [
    ("prompt_logprobs", 0, "echo"), ("prompt_logprobs", 5, "echo"), ("allowed_token_ids", [5], "logit_bias"),
    ("bad_words", ["x"], "logit_bias"), ("skip_special_tokens", False, "leave it out"), ("n_predict", 5, "max_tokens"),
    ("include_stop_str_in_output", True, "leave it out"), ("truncate_prompt_tokens", 10, "shorten"),
    ("return_token_ids", True, "/tokenize"), ("repeat_penalty", 1.1, "repetition_penalty"), ("typical_p", 0.9, "top_p"),
    ("mirostat", 2, "top_p"), ("dynatemp_range", 0.5, "temperature"), ("dry_multiplier", 0.8, "repetition_penalty"),
    ("samplers", ["top_k"], "fixed"), ("n_probs", 3, "logprobs"), ("lora", [{"id": 0, "scale": 1}], "loads nothing"),
    ("adapters", "/etc", "loads nothing"), ("t_max_predict_ms", 100, "max_tokens"),
]  # fmt: skip


@pytest.mark.parametrize("table", [CHAT_BODY, COMPLETION_BODY, RESPONSES_BODY], ids=lambda table: table.name)
@pytest.mark.parametrize(("name", "value", "way_out"), ASKED_FOR)
def test_what_would_change_the_answer_is_refused(table: BodyTable, name: str, value: Any, way_out: str) -> None:
    body = {"messages": [USER], "prompt": None if table is RESPONSES_BODY else "Hi", "input": "Hi", name: value}
    with pytest.raises(ApiError, match=f"^{name} is not supported here; .*{way_out}") as refused:
        table.read(body)
    assert (refused.value.status, refused.value.param) == (400, name)


@pytest.mark.parametrize("given", DEFAULTS.values(), ids=DEFAULTS)
def test_what_asks_for_nothing_changes_nothing(server: Running, given: dict[str, Any]) -> None:
    plain, asked = server.post(CHAT, ASK), server.post(CHAT, ASK | given)
    assert asked.status_code == 200, asked.text
    assert asked.json()["choices"] == plain.json()["choices"]


def test_true_is_not_one_and_one_is_one_however_it_is_written() -> None:
    for off in (1, 1.0):
        COMPLETION_BODY.read({"prompt": "Hi", "best_of": off})
    with pytest.raises(ApiError, match="best_of is not supported"):
        COMPLETION_BODY.read({"prompt": "Hi", "best_of": True})


@pytest.mark.parametrize(
    ("window", "penalty", "value"),
    [
        ("repetition_context_size", "repetition_penalty", 1.1), ("repeat_last_n", "repetition_penalty", 1.1),
        ("presence_context_size", "presence_penalty", 0.5), ("frequency_context_size", "frequency_penalty", -0.5),
    ],
)  # fmt: skip
def test_a_penalty_looks_at_all_tokens(server: Running, window: str, penalty: str, value: float) -> None:
    refused = server.post(CHAT, ASK | {window: 20, penalty: value})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == (window, "unsupported_parameter")
    assert penalty in error["message"]
    for fields in ({window: -1, penalty: value}, {window: 20}, {window: 0}, {penalty: value}):
        assert server.post(CHAT, ASK | fields).status_code == 200, fields


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.parametrize("goes_on", [True, False])
def test_whether_an_answer_begins_is_said_by_the_last_message(server: Running, path: str, goes_on: bool) -> None:
    body = {"messages": [USER, ASSISTANT] if goes_on else [USER]} | ({} if path == "/tokenize" else {"max_tokens": 1})
    for name, kept in (("continue_final_message", goes_on), ("add_generation_prompt", not goes_on)):
        assert server.post(path, body | {name: kept}).status_code == 200
        refused = server.post(path, body | {name: not kept})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == name
        assert f"{name} is {str(not kept).lower()}" in refused.json()["error"]["message"]


def test_a_template_cannot_be_sent(server: Running) -> None:
    for path in (CHAT, "/tokenize"):
        for name, value in (("chat_template", "{{ x }}"), ("chat_template_kwargs", {"enable_thinking": True})):
            assert server.post(path, {"messages": [USER], name: value}).json()["error"]["param"] == name
        off = {"chat_template_kwargs": {"enable_thinking": False}}
        assert server.post(path, {"messages": [USER], **off} | ({"max_tokens": 1} if path == CHAT else {})).is_success


@pytest.mark.parametrize("name", ["whitespace_pattern", "structural_tag", "disable_any_whitespace"])
def test_what_a_structure_cannot_be_is_refused(server: Running, name: str) -> None:
    given = {"json": {"type": "object"}, name: True}
    assert (
        server.post(CHAT, ASK | {"structured_outputs": given}).json()["error"]["param"] == f"structured_outputs.{name}"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("truncate_prompt_tokens", 5), ("add_special_tokens", False), ("normalize", False), ("embd_normalize", -1)],
)
def test_vectors_of_another_kind_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ApiError, match=f"{name} is not supported here"):
        EMBEDDINGS_BODY.read({"input": "Hi", name: value})


def test_a_text_can_be_continued_without_bos(server: Running) -> None:
    body = {"prompt": "the the the", "max_tokens": 3, "temperature": 0}
    ids = server.model.tokenizer.encode("the the the", bos=False)
    without = server.post(TEXT, body | {"add_special_tokens": False}).json()
    assert without["usage"]["prompt_tokens"] == len(ids)
    assert without["choices"] == server.post(TEXT, body | {"prompt": ids}).json()["choices"]
    assert server.post(TEXT, body).json()["usage"]["prompt_tokens"] == len(ids) + 1


def test_xtc_is_the_librarys(server: Running) -> None:
    fields = {"temperature": 1, "seed": 7, "xtc_probability": 1.0, "xtc_threshold": 0.0}
    expected = server.server.engine.exclusive(
        lambda model: model.chat(
            [USER],
            max_tokens=12,
            sampling=SamplingParams(temperature=1, top_p=0.95, seed=7, xtc_probability=1.0, xtc_threshold=0.0),
        )
    ).result(60)
    text = server.chat([USER], max_tokens=12, **fields)["choices"][0]["message"]["content"]
    assert text == expected.text  # type: ignore[attr-defined]
    assert (
        text
        != server.chat([USER], max_tokens=12, **fields | {"xtc_probability": 0})["choices"][0]["message"]["content"]
    )


CONTINUOUS = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, ASK), (CHAT, ASK | {"n": 3, "temperature": 1}), (TEXT, {"prompt": ["the the", "a"], "max_tokens": 5, "n": 2}),
        (TEXT, {"prompt": "the the", "max_tokens": 4, "echo": True, "logprobs": 1}),
    ],
)  # fmt: skip
def test_usage_can_be_told_in_each_chunk(server: Running, path: str, body: dict[str, Any]) -> None:
    *events, last = server.events(path, body | CONTINUOUS)
    assert last["choices"] == []
    final = last["usage"]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == final["completion_tokens"]
    for event in events:
        used = event["usage"]
        assert used["prompt_tokens"] == final["prompt_tokens"]
        assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
        if path == CHAT:
            ChatCompletionChunk.model_validate(event, strict=True)


def test_usage_in_each_chunk_needs_usage(server: Running) -> None:
    refused = server.post(CHAT, ASK | {"stream": True, "stream_options": {"continuous_usage_stats": True}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "stream_options.continuous_usage_stats"


def test_the_first_delta_is_the_role_with_no_text(server: Running) -> None:
    """As OpenAI's and vLLM's are."""
    events = server.events(CHAT, ASK | {"n": 2})
    for index in range(2):
        deltas = [choice["delta"] for event in events for choice in event["choices"] if choice["index"] == index]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert not any("role" in delta for delta in deltas[1:])
