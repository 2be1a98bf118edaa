"""What every generating endpoint builds its reply with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from mlx_mixtral.server.jobs import ReplyPart
from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.server.wire.sse import COMMENT, DONE, compact_json, data_event

__all__ = ["NamedReply", "Reply", "StreamedReply", "UsageSoFar"]


@dataclass
class UsageSoFar:
    """What chunks of a stream say of the tokens it took.

    Args:
        prompt_tokens: of all prompts.
        is_told: chunks have the field; it is null but in the last one.
        is_continuous: it is not null in the others either, vLLM's ``continuous_usage_stats``.
        tokens: generated so far, of all answers together.
    """

    prompt_tokens: int = 0
    is_told: bool = False
    is_continuous: bool = False
    tokens: int = 0

    def field(self, whole: dict[str, Any] | None = None) -> dict[str, Any]:
        """What a chunk has beside the rest; ``whole`` when all is there."""
        if not self.is_told:
            return {}
        if whole is None and self.is_continuous:
            total = self.prompt_tokens + self.tokens
            whole = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": total}
        return {"usage": whole}


class Reply(ABC):
    """What is sent for one request."""

    @abstractmethod
    def add(self, event: ReplyPart) -> list[dict[str, Any]]:
        """Take an event of the job; the events to send with it, where they are streamed."""

    @abstractmethod
    def body(self, usage: dict[str, Any]) -> bytes:
        """The whole reply as JSON, once all is there; ``usage``: see ``usage_of``."""


class StreamedReply(Reply):
    """A reply that is sent whole or as a stream of events.

    Attributes:
        waiting: sent when a stream had nothing to say for a while.
        end: what a stream ends with.
    """

    waiting: bytes = COMMENT
    end: bytes = DONE

    def first(self) -> list[dict[str, Any]]:
        """Events to send before anything is computed."""
        return []

    @abstractmethod
    def last(self, usage: dict[str, Any]) -> list[dict[str, Any]]:
        """Events to send when all is there."""

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        """Events to send instead of all that would come."""
        return [error.body]

    @abstractmethod
    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The reply without events, once all is there."""

    def body(self, usage: dict[str, Any]) -> bytes:
        return compact_json(self.whole(usage))

    def encoded(self, events: list[dict[str, Any]]) -> bytes:
        """Events as they are sent."""
        return b"".join(map(data_event, events))


class NamedReply(StreamedReply):
    """A reply whose events have their ``type`` as a name; the stream ends when it closes."""

    end = b""

    def encoded(self, events: list[dict[str, Any]]) -> bytes:
        return b"".join(data_event(event, event["type"]) for event in events)
