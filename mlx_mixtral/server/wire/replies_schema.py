"""Schemas of replies for /openapi.json."""

from __future__ import annotations

from typing import Any

__all__ = ["REPLY_SCHEMAS"]

_TEXT: dict[str, Any] = {"type": "string"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_NUMBER: dict[str, Any] = {"type": "number"}
_FLAG: dict[str, Any] = {"type": "boolean"}
_OBJECT: dict[str, Any] = {"type": "object"}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    """An object that has all of ``properties``."""
    return {"type": "object", "properties": properties, "required": sorted(properties)}


def _list(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


def _maybe(kind: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [kind, {"type": "null"}]}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _is(word: str) -> dict[str, Any]:
    return {"const": word}


_BYTES = _maybe(_list(_COUNT))
_LIKELY = {"token": _TEXT, "logprob": _NUMBER, "bytes": _BYTES}
_HEAD = {"id": _TEXT, "created": _COUNT, "model": _TEXT, "system_fingerprint": _TEXT}
_USAGE = {"usage": _ref("Usage")}

REPLY_SCHEMAS: dict[str, dict[str, Any]] = {
    "Error": _object(error=_object(message=_TEXT, type=_TEXT, param=_maybe(_TEXT), code=_maybe(_TEXT))),
    "AnthropicError": {
        "type": "object",
        "properties": {
            "type": _is("error"),
            "error": _object(type=_TEXT, message=_TEXT, param=_maybe(_TEXT)),
            "request_id": _TEXT,
        },
        "required": ["type", "error"],
    },
    "Message": _object(
        id=_TEXT,
        type=_is("message"),
        role=_is("assistant"),
        model=_TEXT,
        content=_list(
            {
                "anyOf": [
                    _object(type=_is("text"), text=_TEXT),
                    _object(type=_is("tool_use"), id=_TEXT, name=_TEXT, input=_OBJECT),
                ]
            }
        ),
        stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]},
        stop_sequence=_maybe(_TEXT),
        usage=_object(
            input_tokens=_COUNT,
            cache_creation_input_tokens=_COUNT,
            cache_read_input_tokens=_COUNT,
            output_tokens=_COUNT,
        ),
    ),
    "Response": _object(
        id=_TEXT,
        object=_is("response"),
        created_at=_COUNT,
        completed_at=_maybe(_COUNT),
        status={"enum": ["completed", "incomplete"]},
        error={"type": "null"},
        incomplete_details=_maybe(_object(reason=_is("max_output_tokens"))),
        model=_TEXT,
        instructions=_maybe(_TEXT),
        metadata={"type": "object", "additionalProperties": _TEXT},
        output=_list(
            {
                "anyOf": [
                    _object(
                        id=_TEXT,
                        type=_is("message"),
                        role=_is("assistant"),
                        status=_TEXT,
                        content=_list(
                            _object(
                                type=_is("output_text"),
                                text=_TEXT,
                                annotations=_list(_OBJECT),
                                logprobs=_list(_ref("TokenLogprob")),
                            )
                        ),
                    ),
                    _object(
                        id=_TEXT, type=_is("function_call"), call_id=_TEXT, name=_TEXT, arguments=_TEXT, status=_TEXT
                    ),
                ]
            }
        ),
        parallel_tool_calls=_FLAG,
        store={"const": False},
        temperature=_NUMBER,
        top_p=_NUMBER,
        text=_OBJECT,
        tool_choice={},
        tools=_list(_OBJECT),
        usage=_object(
            input_tokens=_COUNT,
            input_tokens_details=_object(cached_tokens=_COUNT, cache_write_tokens=_COUNT),
            output_tokens=_COUNT,
            output_tokens_details=_object(reasoning_tokens=_COUNT),
            total_tokens=_COUNT,
        ),
    ),
    "Embeddings": _object(
        object=_is("list"),
        data=_list(
            _object(object=_is("embedding"), index=_COUNT, embedding={"anyOf": [_list(_NUMBER), _TEXT]}),
        ),
        model=_TEXT,
        usage=_object(prompt_tokens=_COUNT, total_tokens=_COUNT),
    ),
    "MessageTokens": _object(input_tokens=_COUNT),
    "Usage": _object(
        prompt_tokens=_COUNT,
        completion_tokens=_COUNT,
        total_tokens=_COUNT,
        prompt_tokens_details=_object(cached_tokens=_COUNT),
    ),
    "TokenLogprob": _object(**_LIKELY, top_logprobs=_list(_object(**_LIKELY))),
    "AssistantMessage": {
        "type": "object",
        "properties": {
            "role": _is("assistant"),
            "content": _maybe(_TEXT),
            "refusal": {"type": "null"},
            "tool_calls": _list(_ref("ToolCall")),
            "function_call": _OBJECT,
        },
        "required": ["role", "content"],
    },
    "ChatCompletion": _object(
        **_HEAD,
        object=_is("chat.completion"),
        choices=_list(
            _object(
                index=_COUNT,
                message=_ref("AssistantMessage"),
                logprobs=_maybe(_object(content=_list(_ref("TokenLogprob")), refusal={"type": "null"})),
                finish_reason={"enum": ["stop", "length", "tool_calls", "function_call"]},
            )
        ),
        **_USAGE,
    ),
    "CompletionLogprobs": _object(
        tokens=_list(_TEXT),
        token_logprobs=_list(_maybe(_NUMBER)),
        top_logprobs=_list(_maybe({"type": "object", "additionalProperties": _NUMBER})),
        text_offset=_list(_COUNT),
        bytes=_list(_BYTES),
    ),
    "Completion": _object(
        **_HEAD,
        object=_is("text_completion"),
        choices=_list(
            _object(
                index=_COUNT,
                text=_TEXT,
                logprobs=_maybe(_ref("CompletionLogprobs")),
                finish_reason={"enum": ["stop", "length"]},
            )
        ),
        **_USAGE,
    ),
    "Tokens": _object(count=_COUNT, max_model_len=_COUNT, tokens=_list(_COUNT), token_strs=_maybe(_list(_TEXT))),
    "Detokenized": _object(prompt=_TEXT),
    "TokenizerInfo": _object(
        tokenizer_class=_TEXT,
        vocab_size=_COUNT,
        model_max_length=_COUNT,
        bos_token=_maybe(_TEXT),
        eos_token=_maybe(_TEXT),
        pad_token={"type": "null"},
        add_bos_token=_FLAG,
        eos_token_ids=_list(_COUNT),
        chat_format=_TEXT,
        chat_template=_maybe(_TEXT),
    ),
    "Model": _object(
        id=_TEXT, object=_is("model"), created=_COUNT, owned_by=_TEXT, max_model_len=_COUNT, parent=_maybe(_TEXT)
    ),
    "ModelList": _object(object=_is("list"), data=_list(_ref("Model"))),
    "Health": _object(status=_TEXT, engine=_TEXT),
    "Status": _object(
        version=_TEXT,
        model=_TEXT,
        aliases=_list(_TEXT),
        adapters=_list(_TEXT),
        engine=_TEXT,
        engine_failures=_COUNT,
        uptime_seconds=_NUMBER,
        is_draining=_FLAG,
        context_tokens=_COUNT,
        chat_format=_TEXT,
        tool_format=_TEXT,
        rows=_object(most=_COUNT, running=_COUNT, waiting=_COUNT),
        queue=_object(most=_COUNT, timeout_seconds=_NUMBER),
        requests_open=_COUNT,
        memory=_object(weights_bytes=_COUNT, active_bytes=_COUNT, peak_bytes=_COUNT),
        prefix_cache=_object(entries=_COUNT, bytes=_COUNT),
    ),
}
"""By name."""
