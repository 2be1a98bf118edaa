"""/v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.types import Send

from mlx_mixtral.runtime.mixtral import CHAT_SAMPLING
from mlx_mixtral.server.bodies import read_json_body
from mlx_mixtral.server.calls.base import ToolUse
from mlx_mixtral.server.constraining import constraint_for
from mlx_mixtral.server.conversations import encode_conversation, plain_messages
from mlx_mixtral.server.endpoints.generating import generate, reply_head
from mlx_mixtral.server.jobs import RowSpec
from mlx_mixtral.server.service import Service
from mlx_mixtral.server.wire.chat import CHAT_BODY, ChatReply
from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.server.wire.logprobs import AnswerLogprobs
from mlx_mixtral.server.wire.sampling import check_stream, sampling_params, stops

__all__ = ["LONG_CHARACTERS", "chat_completions", "tool_use"]

LONG_CHARACTERS = 20_000
"""Texts beyond it are tokenized on another thread, so that streams go on meanwhile."""


async def chat_completions(service: Service, request: Request, send: Send) -> None:
    """Answer one request. Raises ApiError."""
    body = CHAT_BODY.read(await read_json_body(request, service.options.max_body_bytes))
    model = service.served.check_name(body["model"])
    check_stream(body)
    if body["top_logprobs"] is not None and not body["logprobs"]:
        raise ApiError.field("top_logprobs", "needs logprobs: true")
    logprobs = (body["top_logprobs"] or 0) if body["logprobs"] else None
    use = tool_use(body)
    service.admission.check(body["n"])
    messages = plain_messages(body["messages"])
    prepared = service.calls.prepare(messages, use)
    size = sum(len(message["content"] or "") for message in messages)
    encode = (service.served.tokenizer, prepared.messages, prepared.tools)
    tokens = await asyncio.to_thread(encode_conversation, *encode) if size > LONG_CHARACTERS else encode_conversation(*encode)
    room = service.served.check_room(len(tokens), "messages")
    constraint = await constraint_for(service, body, prepared.constraint)
    served = service.served
    end = served.tokenizer.end_of_turn_text
    continues = body["messages"][-1]["role"] == "assistant"
    rows = [
        RowSpec(
            tokens,
            min(body["max_completion_tokens"] or body["max_tokens"] or service.options.max_tokens, room),
            sampling_params(
                body, row, temperature=CHAT_SAMPLING.temperature, top_p=CHAT_SAMPLING.top_p, logprobs=logprobs
            ),
            [*([end] if end else []), *stops(body), *prepared.stop],
            served.check_ids(body["stop_token_ids"], "stop_token_ids"),
            is_answer=not continues,
            constraint=constraint,
        )
        for row in range(body["n"])
    ]
    for token in rows[0].sampling.logit_bias or ():
        served.check_ids([token], "logit_bias")
    is_told = bool(body["stream"] and (body["stream_options"] or {}).get("include_usage"))
    reply = ChatReply(
        reply_head(service, "chatcmpl", model),
        [service.calls.reader(use) for _ in rows],
        [
            None
            if logprobs is None
            else AnswerLogprobs(
                served.tokenizer, served.eos_token_ids | {*body["stop_token_ids"]}, logprobs, continues=continues
            )
            for _ in rows
        ],
        has_usage=is_told,
    )
    await generate(service, request, send, rows, reply, prompts=[len(tokens)], is_stream=body["stream"])


def tool_use(body: Mapping[str, Any]) -> ToolUse:
    """What a body says of tools.

    Raises:
        ApiError: 400: a choice of what is not there.
    """
    tools, given = body["tools"], body["tool_choice"]
    names = [tool["function"]["name"] for tool in tools]
    choice: str | tuple[str, str] = given if isinstance(given, str) else "auto"
    if isinstance(given, dict):
        name = (given["function"] or {}).get("name") or given["name"]
        if given["type"] in ("function", "tool"):
            if name not in names:
                raise ApiError.field("tool_choice", f"names {name!r}, which is not among tools ({', '.join(names) or 'none'})")
            choice = ("function", name)
        else:
            choice = given["type"]
    if choice == "any":
        choice = "required"
    if choice == "required" and not tools:
        raise ApiError.field("tool_choice", "is required, and there are no tools; give some")
    return ToolUse(tools, choice, body["parallel_tool_calls"])
