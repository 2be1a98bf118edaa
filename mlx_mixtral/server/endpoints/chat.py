"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.types import Send

from mlx_mixtral.calls.definitions import ToolUse, read_tools
from mlx_mixtral.errors import MixtralError
from mlx_mixtral.runtime.chat import CHAT_SAMPLING
from mlx_mixtral.server.bodies import read_json_body
from mlx_mixtral.server.constraining import wanted_constraint
from mlx_mixtral.server.endpoints.answering import answers
from mlx_mixtral.server.endpoints.generating import generate, reply_head
from mlx_mixtral.server.service import Service
from mlx_mixtral.server.wire.answers import AnswerReader
from mlx_mixtral.server.wire.chat import CHAT_BODY, ChatReply, check_continuation
from mlx_mixtral.server.wire.errors import ApiError, placed
from mlx_mixtral.server.wire.given_chat import GivenChat
from mlx_mixtral.server.wire.logprobs import AnswerLogprobs
from mlx_mixtral.server.wire.sampling import check_stream, sampling_params, stops, usage_so_far

__all__ = ["chat_completions", "tools_of"]


async def chat_completions(service: Service, request: Request, send: Send) -> None:
    """Answer one request. Raises ApiError."""
    given = await read_json_body(request, service.options.max_body_bytes)
    body = CHAT_BODY.read(given)
    served = service.served
    model = served.check_name(body["model"])
    check_stream(body)
    check_continuation(body)
    if body["top_logprobs"] is not None and not body["logprobs"]:
        raise ApiError.field("top_logprobs", "needs logprobs: true")
    logprobs = (body["top_logprobs"] or 0) if body["logprobs"] else None
    use = tools_of(given)
    sampling = [
        sampling_params(body, row, temperature=CHAT_SAMPLING.temperature, top_p=CHAT_SAMPLING.top_p, logprobs=logprobs)
        for row in range(body["n"])
    ]
    asked = await answers(
        service,
        GivenChat(given["messages"]),
        use,
        wanted_constraint(body),
        sampling,
        max_tokens=body["max_completion_tokens"] or body["max_tokens"],
        stops=stops(body),
        stop_token_ids=body["stop_token_ids"],
        adapter=served.adapter_of(model),
    )
    ends = served.eos_token_ids | {*body["stop_token_ids"]}
    reply = ChatReply(
        reply_head(service, "chatcmpl", model),
        [AnswerReader(is_legacy=use.is_legacy) for _ in sampling],
        [
            None if logprobs is None else AnswerLogprobs(served.tokenizer, ends, logprobs, continues=asked.continues)
            for _ in sampling
        ],
        used=usage_so_far(body, asked.prompt_tokens),
        warnings=asked.warnings,
    )
    prompts = [asked.prompt_tokens]
    await generate(service, request, send, asked.rows, reply, prompts=prompts, is_stream=body["stream"])


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
