"""/v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.types import Send

from mlx_mixtral.calls.chat import ChatPrompt
from mlx_mixtral.calls.definitions import ToolUse, read_tools
from mlx_mixtral.constraints.specs import ConstraintSpec
from mlx_mixtral.errors import MixtralError
from mlx_mixtral.runtime.chat import CHAT_SAMPLING
from mlx_mixtral.server.bodies import read_json_body
from mlx_mixtral.server.constraining import compiled_constraint, wanted_constraint
from mlx_mixtral.server.endpoints.generating import generate, reply_head
from mlx_mixtral.server.jobs import RowSpec
from mlx_mixtral.server.service import Service
from mlx_mixtral.server.wire.answers import AnswerReader
from mlx_mixtral.server.wire.chat import CHAT_BODY, ChatReply
from mlx_mixtral.server.wire.errors import ApiError, placed
from mlx_mixtral.server.wire.logprobs import AnswerLogprobs
from mlx_mixtral.server.wire.sampling import check_stream, sampling_params, stops

__all__ = ["LONG_CHARACTERS", "chat_completions", "chat_prompt", "tools_of"]

LONG_CHARACTERS = 20_000
"""Texts beyond it are tokenized on another thread, so that streams go on meanwhile."""


async def chat_completions(service: Service, request: Request, send: Send) -> None:
    """Answer one request. Raises ApiError."""
    given = await read_json_body(request, service.options.max_body_bytes)
    body = CHAT_BODY.read(given)
    served = service.served
    model = served.check_name(body["model"])
    check_stream(body)
    if body["top_logprobs"] is not None and not body["logprobs"]:
        raise ApiError.field("top_logprobs", "needs logprobs: true")
    logprobs = (body["top_logprobs"] or 0) if body["logprobs"] else None
    use = tools_of(given)
    service.admission.check(body["n"])
    wanted = wanted_constraint(body)
    prompt = await chat_prompt(service, given["messages"], use, None if wanted is None else wanted.spec)
    room = served.check_room(len(prompt.tokens), "messages")
    max_tokens = min(body["max_completion_tokens"] or body["max_tokens"] or service.options.max_tokens, room)
    continues = bool(prompt.begun)
    param = "tools" if wanted is None else wanted.param
    constraint = await compiled_constraint(service, prompt.constraint, param, max_tokens, from_start=not continues)
    end = served.tokenizer.end_of_turn_text
    rows = [
        RowSpec(
            prompt.tokens,
            max_tokens,
            sampling_params(
                body, row, temperature=CHAT_SAMPLING.temperature, top_p=CHAT_SAMPLING.top_p, logprobs=logprobs
            ),
            [*([end] if end else []), *stops(body)],
            served.check_ids(body["stop_token_ids"], "stop_token_ids"),
            is_answer=not continues,
            constraint=constraint,
            parser=prompt.parser if use.callable_tools else None,
        )
        for row in range(body["n"])
    ]
    served.check_biases(rows[0].sampling.logit_bias)
    ends = served.eos_token_ids | {*body["stop_token_ids"]}
    reply = ChatReply(
        reply_head(service, "chatcmpl", model),
        [AnswerReader(is_legacy=use.is_legacy) for _ in rows],
        [
            None if logprobs is None else AnswerLogprobs(served.tokenizer, ends, logprobs, continues=continues)
            for _ in rows
        ],
        has_usage=bool(body["stream"] and (body["stream_options"] or {}).get("include_usage")),
        warnings=() if constraint is None else constraint.warnings,
    )
    await generate(service, request, send, rows, reply, prompts=[len(prompt.tokens)], is_stream=body["stream"])


def tools_of(body: Mapping[str, Any]) -> ToolUse:
    """What a body says of tools. Raises ApiError 400."""
    try:
        return read_tools(
            body.get("tools"),
            body.get("tool_choice"),
            body.get("parallel_tool_calls"),
            functions=body.get("functions"),
            function_call=body.get("function_call"),
        )
    except MixtralError as error:
        raise placed(error, "tools") from None


async def chat_prompt(
    service: Service, messages: Sequence[Mapping[str, Any]], use: ToolUse, answer: ConstraintSpec | None = None
) -> ChatPrompt:
    """What the answer to ``messages`` is generated from.

    Raises:
        ApiError: 400, with the message it is about.
    """
    size = len(str(messages))
    try:
        if size > LONG_CHARACTERS:
            return await asyncio.to_thread(service.chat.prompt, messages, use, answer)
        return service.chat.prompt(messages, use, answer)
    except MixtralError as error:
        raise placed(error, "messages") from None
