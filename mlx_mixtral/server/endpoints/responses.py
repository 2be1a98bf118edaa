"""/v1/responses."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import Send

from mlx_mixtral.runtime.chat import CHAT_SAMPLING
from mlx_mixtral.server.bodies import read_json_body
from mlx_mixtral.server.constraining import constraint_of
from mlx_mixtral.server.endpoints.answering import answers
from mlx_mixtral.server.endpoints.chat import tools_of
from mlx_mixtral.server.endpoints.generating import generate
from mlx_mixtral.server.service import Service
from mlx_mixtral.server.wire.logprobs import AnswerLogprobs
from mlx_mixtral.server.wire.responses import (
    RESPONSES_BODY,
    responses_chat,
    responses_structure,
    wanted_logprobs,
)
from mlx_mixtral.server.wire.responses_reply import ResponsesReply, response_frame
from mlx_mixtral.server.wire.sampling import check_stream, sampling_params

__all__ = ["responses"]


async def responses(service: Service, request: Request, send: Send) -> None:
    """Answer one request. Raises ApiError."""
    body = RESPONSES_BODY.read(await read_json_body(request, service.options.max_body_bytes))
    served = service.served
    model = served.check_name(body["model"])
    check_stream(body)
    top = wanted_logprobs(body)
    use = tools_of(body)
    wanted = constraint_of(responses_structure(body))
    sampling = sampling_params(body, 0, temperature=CHAT_SAMPLING.temperature, top_p=CHAT_SAMPLING.top_p, logprobs=top)
    chat = responses_chat(body)
    adapter = served.adapter_of(model)
    asked = await answers(service, chat, use, wanted, [sampling], max_tokens=body["max_output_tokens"], adapter=adapter)
    logprobs = None
    if top is not None:
        logprobs = AnswerLogprobs(served.tokenizer, served.eos_token_ids, top, continues=asked.continues)
    frame = response_frame(body, model, temperature=sampling.temperature, top_p=sampling.top_p)
    reply = ResponsesReply(frame, logprobs, asked.warnings)
    prompts = [asked.prompt_tokens]
    await generate(service, request, send, asked.rows, reply, prompts=prompts, is_stream=body["stream"])
