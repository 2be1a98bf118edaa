"""/v1/completions."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.types import Send

from mlx_mixtral.server.bodies import read_json_body
from mlx_mixtral.server.constraining import compiled_constraint, wanted_constraint
from mlx_mixtral.server.endpoints.answering import LONG_CHARACTERS
from mlx_mixtral.server.endpoints.generating import generate, reply_head
from mlx_mixtral.server.jobs import RowSpec, Scoring
from mlx_mixtral.server.service import Service
from mlx_mixtral.server.wire.completions import COMPLETION_BODY, CompletionReply, EchoedPrompt
from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.server.wire.logprobs import AnswerLogprobs
from mlx_mixtral.server.wire.sampling import check_stream, sampling_params, stops, usage_so_far

__all__ = ["completions"]

DEFAULT_MAX_TOKENS = 16
"""OpenAI's own."""


async def completions(service: Service, request: Request, send: Send) -> None:
    """Continue one or several prompts. Raises ApiError."""
    body = COMPLETION_BODY.read(await read_json_body(request, service.options.max_body_bytes))
    served = service.served
    model = served.check_name(body["model"])
    adapter = served.adapter_of(model)
    check_stream(body)
    max_tokens = DEFAULT_MAX_TOKENS if body["max_tokens"] is None else body["max_tokens"]
    if not max_tokens and not body["echo"]:
        raise ApiError.field(
            "max_tokens", "is 0, and without echo there is nothing to give back; it must be at least 1"
        )
    given = _prompts(body["prompt"])
    service.admission.check(len(given) * body["n"] if max_tokens else 1)
    prompts = [
        await _encode(service, prompt, _place(body["prompt"], index), body) for index, prompt in enumerate(given)
    ]
    rooms = [served.check_room(len(prompt.tokens), _place(body["prompt"], n)) for n, prompt in enumerate(prompts)]
    most = min([max_tokens, *rooms])
    wanted = wanted_constraint(body)
    constraint = None
    if wanted is not None:
        constraint = await compiled_constraint(service, wanted.spec, wanted.param, most, from_start=False)
    rows = [
        RowSpec(
            prompt.tokens,
            min(max_tokens, room),
            sampling_params(body, row, temperature=1.0, top_p=1.0, logprobs=body["logprobs"]),
            stops(body),
            served.check_ids(body["stop_token_ids"], "stop_token_ids"),
            constraint=constraint,
            adapter=adapter,
        )
        for prompt, room in zip(prompts, rooms, strict=True)
        for row in range(body["n"] if max_tokens else 0)
    ]
    served.check_biases(rows[0].sampling.logit_bias if rows else None)
    has_logprobs = body["logprobs"] is not None
    ends = served.eos_token_ids | {*body["stop_token_ids"]}
    each = [prompt for prompt in prompts for _ in range(body["n"])]
    scored = prompts if body["echo"] and has_logprobs else []
    reply = CompletionReply(
        reply_head(service, "cmpl", model),
        [
            AnswerLogprobs(served.tokenizer, ends, body["logprobs"], continues=True) if has_logprobs else None
            for _ in each
        ],
        [prompt if body["echo"] else None for prompt in each],
        tokenizer=served.tokenizer,
        scored=scored,
        used=usage_so_far(body, sum(len(prompt.tokens) for prompt in prompts)),
    )
    await generate(
        service,
        request,
        send,
        rows,
        reply,
        prompts=[len(prompt.tokens) for prompt in prompts],
        is_stream=body["stream"],
        scoring=Scoring([prompt.tokens for prompt in scored], body["logprobs"], adapter) if scored else None,
    )


def _prompts(given: Any) -> list[Any]:
    """A list of texts, or of lists of ids."""
    return list(given) if isinstance(given, list) and not isinstance(given[0], int) else [given]


def _place(given: Any, index: int) -> str:
    return f"prompt[{index}]" if isinstance(given, list) and not isinstance(given[0], int) else "prompt"


async def _encode(service: Service, prompt: Any, param: str, body: dict[str, Any]) -> EchoedPrompt:
    served = service.served
    if isinstance(prompt, list):
        tokens = served.check_ids(prompt, param)
        return EchoedPrompt(served.tokenizer.decode(tokens), tokens, drops_first_space=True)
    if not prompt:
        raise ApiError.field(param, "is empty; give some text")

    def encode() -> list[int]:
        return served.encode(prompt, param, special=body["special"], bos=body["add_special_tokens"])

    tokens = await asyncio.to_thread(encode) if len(prompt) > LONG_CHARACTERS else encode()
    return EchoedPrompt(prompt, tokens, drops_first_space=True)
