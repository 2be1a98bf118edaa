"""A conversation in OpenAI's chat form, with the places in the request that its messages came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["GivenChat", "call_message", "result_message"]


@dataclass(frozen=True)
class GivenChat:
    """Messages as ``read_conversation`` takes them.

    Args:
        places: of each message, the field of the request; none where ``messages`` are the request's own.
        param: the field that holds all of them.
    """

    messages: Sequence[Mapping[str, Any]]
    places: Sequence[str] = ()
    param: str = "messages"


def call_message(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call, as ``tool_calls`` lists it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result_message(call_id: str, text: str) -> dict[str, Any]:
    """The message with a call's result."""
    return {"role": "tool", "tool_call_id": call_id, "content": text}
