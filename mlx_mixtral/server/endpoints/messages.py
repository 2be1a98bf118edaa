"""/v1/messages and /v1/messages/count_tokens: Anthropic's protocol."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.types import Send

from mlx_mixtral.arguments import shown
from mlx_mixtral.calls.definitions import ToolUse, read_tools
from mlx_mixtral.errors import MixtralError
from mlx_mixtral.runtime.chat import CHAT_SAMPLING
from mlx_mixtral.server.bodies import read_json_body
from mlx_mixtral.server.constraining import constraint_of
from mlx_mixtral.server.endpoints.answering import answers, chat_prompt
from mlx_mixtral.server.endpoints.generating import generate
from mlx_mixtral.server.replies import send_json
from mlx_mixtral.server.service import Service
from mlx_mixtral.server.wire.errors import ApiError, placed, renamed
from mlx_mixtral.server.wire.messages import (
    COUNT_TOKENS_BODY,
    MESSAGES_BODY,
    VERSIONS,
    messages_chat,
    messages_structure,
    tools_as_functions,
)
from mlx_mixtral.server.wire.messages_reply import MessagesReply
from mlx_mixtral.server.wire.sampling import sampling_params

__all__ = ["count_tokens", "messages"]

VERSION_HEADER = "anthropic-version"


async def messages(service: Service, request: Request, send: Send) -> None:
    """Answer one request. Raises ApiError."""
    _check_version(request)
    body = MESSAGES_BODY.read(await read_json_body(request, service.options.max_body_bytes))
    model = service.served.check_name(body["model"])
    use = _tools_of(body)
    wanted = constraint_of(messages_structure(body))
    sampling = sampling_params(body, 0, temperature=CHAT_SAMPLING.temperature, top_p=CHAT_SAMPLING.top_p, logprobs=None)
    chat = messages_chat(body)
    stops, adapter = body["stop_sequences"], service.served.adapter_of(model)
    try:
        asked = await answers(
            service, chat, use, wanted, [sampling], max_tokens=body["max_tokens"], stops=stops, adapter=adapter
        )
    except ApiError as error:
        raise _in_own_words(error) from None
    reply = MessagesReply(
        f"msg_{secrets.token_hex(12)}",
        model,
        prompt_tokens=asked.prompt_tokens,
        stop_sequences=stops,
        is_limited_by_context=(body["max_tokens"] or service.options.max_tokens) > asked.room,
        warnings=asked.warnings,
    )
    prompts = [asked.prompt_tokens]
    await generate(service, request, send, asked.rows, reply, prompts=prompts, is_stream=body["stream"])


async def count_tokens(service: Service, request: Request, send: Send) -> None:
    """How many tokens a conversation is, tools included. Raises ApiError."""
    _check_version(request)
    body = COUNT_TOKENS_BODY.read(await read_json_body(request, service.options.max_body_bytes))
    service.served.check_name(body["model"])
    wanted = constraint_of(messages_structure(body))
    spec = None if wanted is None else wanted.spec
    prompt = await chat_prompt(service, messages_chat(body), _tools_of(body), spec)
    await send_json({"input_tokens": len(prompt.tokens)}, send)


def _check_version(request: Request) -> None:
    given = request.headers.get(VERSION_HEADER)
    if given is not None and given not in VERSIONS:
        raise ApiError.field(VERSION_HEADER, f"is {shown(given)}; this server speaks {' and '.join(VERSIONS)}")


def _tools_of(body: Mapping[str, Any]) -> ToolUse:
    """What a body says of tools. Raises ApiError 400."""
    try:
        return read_tools(**tools_as_functions(body))
    except MixtralError as error:
        raise _in_own_words(placed(error, "tools")) from None


def _in_own_words(error: ApiError) -> ApiError:
    """An error of a tool's schema with this protocol's name of it."""
    found = re.match(r"(tools\[\d+\])\.parameters", error.param or "")
    return error if found is None else renamed(error, found.group(), f"{found.group(1)}.input_schema")
