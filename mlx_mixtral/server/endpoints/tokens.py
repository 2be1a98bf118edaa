"""/tokenize, /detokenize and /tokenizer_info."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.types import Send

from mlx_mixtral.server.bodies import read_json_body
from mlx_mixtral.server.endpoints.answering import chat_prompt
from mlx_mixtral.server.endpoints.chat import tools_of
from mlx_mixtral.server.replies import send_json
from mlx_mixtral.server.service import Service
from mlx_mixtral.server.wire.chat import check_continuation
from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.server.wire.given_chat import GivenChat
from mlx_mixtral.server.wire.tokens import DETOKENIZE_BODY, TOKENIZE_BODY

__all__ = ["detokenize", "tokenize", "tokenizer_info"]


async def tokenize(service: Service, request: Request, send: Send) -> None:
    """Token ids of a text or a conversation, and how many there are. Raises ApiError."""
    given = await read_json_body(request, service.options.max_body_bytes)
    body = TOKENIZE_BODY.read(given)
    service.served.check_name(body["model"])
    if (body["prompt"] is None) == (body["messages"] is None):
        raise ApiError(400, "give either prompt or messages", "prompt")
    if body["messages"] is not None:
        check_continuation(body)
        tokens = (await chat_prompt(service, GivenChat(given["messages"]), tools_of(given))).tokens
    else:
        tokens = await asyncio.to_thread(_tokens, service, body)
    reply: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": service.served.context_tokens,
        "tokens": tokens,
        "token_strs": None,
    }
    if body["return_token_strs"]:
        reply["token_strs"] = [service.served.tokenizer.id_to_piece(token) for token in tokens]
    await send_json(reply, send)


async def detokenize(service: Service, request: Request, send: Send) -> None:
    """Text of token ids. Raises ApiError."""
    body = DETOKENIZE_BODY.read(await read_json_body(request, service.options.max_body_bytes))
    service.served.check_name(body["model"])
    tokens = service.served.check_ids(body["tokens"], "tokens")
    own = service.served.tokenizer
    text = await asyncio.to_thread(own.decode, [token for token in tokens if token < own.vocab_size])
    await send_json({"prompt": text}, send)


async def tokenizer_info(service: Service, request: Request, send: Send) -> None:
    """What tells the tokenizer: its special tokens, its size, the chat template where it is one."""
    own = service.served.tokenizer

    def named(token: int | None) -> str | None:
        return None if token is None else own.id_to_piece(token)

    await send_json(
        {
            "tokenizer_class": type(own).__name__,
            "vocab_size": own.vocab_size,
            "model_max_length": service.served.context_tokens,
            "bos_token": named(own.bos_token_id),
            "eos_token": named(own.eos_token_id),
            "pad_token": None,
            "add_bos_token": own.adds_bos,
            "eos_token_ids": sorted(service.served.eos_token_ids),
            "chat_format": own.chat_format,
            "chat_template": None if own.chat_is_native else own.chat_source,
        },
        send,
    )


def _tokens(service: Service, body: dict[str, Any]) -> list[int]:
    return service.served.encode(body["prompt"], "prompt", special=body["special"], bos=body["add_special_tokens"])
