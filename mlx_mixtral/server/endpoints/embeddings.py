"""/v1/embeddings."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.types import Send

from mlx_mixtral.server.bodies import read_json_body
from mlx_mixtral.server.endpoints.answering import LONG_CHARACTERS
from mlx_mixtral.server.endpoints.generating import generate
from mlx_mixtral.server.jobs import Pooling
from mlx_mixtral.server.served import ServedModel
from mlx_mixtral.server.service import Service
from mlx_mixtral.server.wire.embeddings import EMBEDDINGS_BODY, EmbeddingsReply
from mlx_mixtral.server.wire.errors import ApiError

__all__ = ["embeddings"]


async def embeddings(service: Service, request: Request, send: Send) -> None:
    """Vectors of one or several texts. Raises ApiError."""
    given = await read_json_body(request, service.options.max_body_bytes)
    kind = service.options.pooling
    if kind is None:
        raise ApiError(501, "this server makes no embeddings; start it with --pooling mean or --pooling last")
    body = EMBEDDINGS_BODY.read(given)
    model = service.served.check_name(body["model"])
    service.admission.check(1)
    several = isinstance(body["input"], list) and not isinstance(body["input"][0], int)
    inputs = body["input"] if several else [body["input"]]
    places = [f"input[{index}]" for index in range(len(inputs))] if several else ["input"]
    size = sum(map(len, inputs))

    def encode() -> list[list[int]]:
        return [_tokens(service.served, each, place) for each, place in zip(inputs, places, strict=True)]

    prompts = await asyncio.to_thread(encode) if size > LONG_CHARACTERS else encode()
    reply = EmbeddingsReply(model, len(prompts), is_base64=body["encoding_format"] == "base64")
    lengths = [len(prompt) for prompt in prompts]
    pooling = Pooling(prompts, kind, service.served.adapter_of(model))
    await generate(service, request, send, [], reply, prompts=lengths, pooling=pooling)


def _tokens(served: ServedModel, given: Any, param: str) -> list[int]:
    if isinstance(given, list):
        tokens = served.check_ids(given, param)
    elif not given:
        raise ApiError.field(param, "is empty; give some text")
    else:
        # A document is no prompt: what looks like control tokens in it is text.
        tokens = served.encode(given, param, special=False)
    served.check_length(len(tokens), param)
    return tokens
