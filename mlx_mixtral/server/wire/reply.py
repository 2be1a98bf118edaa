"""What every generating endpoint builds its reply with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from mlx_mixtral.server.jobs import ReplyPart
from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.server.wire.sse import COMMENT, DONE, compact_json, data_event

__all__ = ["NamedReply", "Reply", "StreamedReply"]


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
