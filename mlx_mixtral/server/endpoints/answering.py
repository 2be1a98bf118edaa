"""From a conversation, whichever protocol it came in, to the rows that answer it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_mixtral.calls.chat import ChatPrompt
from mlx_mixtral.calls.definitions import ToolUse
from mlx_mixtral.constraints.specs import ConstraintSpec
from mlx_mixtral.errors import MixtralError
from mlx_mixtral.generation.sampling_params import SamplingParams
from mlx_mixtral.server.constraining import WantedConstraint, compiled_constraint
from mlx_mixtral.server.jobs import RowSpec
from mlx_mixtral.server.service import Service
from mlx_mixtral.server.wire.errors import ApiError, placed, renamed
from mlx_mixtral.server.wire.given_chat import GivenChat

__all__ = ["LONG_CHARACTERS", "Answers", "answers", "chat_prompt"]

LONG_CHARACTERS = 20_000
"""Texts beyond it are tokenized on another thread, so that streams go on meanwhile."""

_MESSAGE = re.compile(r"messages\[(\d+)\]")


@dataclass(frozen=True)
class Answers:
    """Answers to one conversation, ready to be generated.

    Attributes:
        rows: one an answer.
        prompt_tokens: what each of them continues.
        room: tokens that the context has left for an answer.
        continues: whether an answer goes on from text the conversation ends with.
        warnings: what of a schema cannot be kept.
    """

    rows: Sequence[RowSpec]
    prompt_tokens: int
    room: int
    continues: bool
    warnings: Sequence[str]


async def answers(
    service: Service,
    chat: GivenChat,
    use: ToolUse,
    wanted: WantedConstraint | None,
    sampling: Sequence[SamplingParams],
    *,
    max_tokens: int | None,
    stops: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    adapter: str | None = None,
) -> Answers:
    """Check what is asked for, and prepare it.

    Args:
        wanted: what the answer has to be where it is text.
        sampling: one an answer.
        max_tokens: of an answer; the server's when None.
        adapter: what to compute with; None: the model itself.

    Raises:
        ApiError: 400 with the field; 429, 501 or 503.
    """
    served = service.served
    service.admission.check(len(sampling))
    served.check_biases(sampling[0].logit_bias)
    ends = served.check_ids(stop_token_ids, "stop_token_ids")
    prompt = await chat_prompt(service, chat, use, None if wanted is None else wanted.spec)
    room = served.check_room(len(prompt.tokens), chat.param)
    most = min(max_tokens or service.options.max_tokens, room)
    continues = bool(prompt.begun)
    constraint = await compiled_constraint(
        service,
        prompt.constraint,
        "tools" if wanted is None else wanted.param,
        most,
        from_start=not continues,
        is_optional=wanted is None and use.mode != "required",
        explained=prompt.explained,
    )
    end = served.tokenizer.end_of_turn_text
    rows = [
        RowSpec(
            prompt.tokens,
            most,
            params,
            [*([end] if end else []), *stops],
            ends,
            is_answer=not continues,
            constraint=constraint,
            parser=prompt.parser if use.callable_tools else None,
            adapter=adapter,
        )
        for params in sampling
    ]
    warnings = () if constraint is None else constraint.warnings
    return Answers(rows, len(prompt.tokens), room, continues, warnings)


async def chat_prompt(
    service: Service, chat: GivenChat, use: ToolUse, answer: ConstraintSpec | None = None
) -> ChatPrompt:
    """What the answer to ``chat`` is generated from.

    Raises:
        ApiError: 400, with the message it is about.
    """
    messages = chat.messages
    size = len(str(messages))
    try:
        if size > LONG_CHARACTERS:
            return await asyncio.to_thread(service.chat.prompt, messages, use, answer)
        return service.chat.prompt(messages, use, answer)
    except MixtralError as error:
        raise _as_given(placed(error, "messages"), chat) from None


def _as_given(error: ApiError, chat: GivenChat) -> ApiError:
    """``error`` with the places of the request in place of the messages it was read into."""
    found = _MESSAGE.match(error.param or "")
    if found is not None and chat.places:
        return renamed(error, found.group(), chat.places[int(found.group(1))])
    return renamed(error, "messages", chat.param)
