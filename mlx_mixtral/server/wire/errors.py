"""Errors as clients read them: OpenAI's ``{"error": {"message", "type", "param", "code"}}``, Anthropic's on its own paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlx_mixtral.errors import MixtralError

__all__ = ["ANTHROPIC_PATHS", "ApiError", "error_body", "is_anthropic", "placed", "renamed"]

ANTHROPIC_PATHS = ("/v1/messages", "/messages")
"""What is at and below these paths speaks Anthropic's protocol."""

_KINDS = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "timeout"),
    413: ("invalid_request_error", "body_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", "internal_error"),
    501: ("not_implemented_error", "not_implemented"),
    503: ("server_error", "unavailable"),
}

# https://platform.claude.com/docs/en/api/errors; other statuses are errors of the request.
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    501: "api_error",
    503: "overloaded_error",
}

# Fields whose checks in the library begin their message with the place.
_PLACE = re.compile(
    r"(messages|tools|tool_choice|parallel_tool_calls|functions|function_call)((?:\[\d+\]|\.[a-z_]+)*)(?=[: ])"
)


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of the reply; a stream whose head is sent gets the error as an event instead.
        message: one sentence: what is wrong, the value, the limit, the fix.
        param: the field it is about, such as ``messages[0].content``.
        code: a word for programs; that of the status when None.
        headers: of the reply, beside the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, dict(headers or {})
        self.kind, usual = _KINDS.get(status, ("invalid_request_error", None))
        self.code = code or usual

    @property
    def body(self) -> dict[str, Any]:
        """The reply, and the data of an error event."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """The same in Anthropic's envelope, which has no place for ``param`` and bears it."""
        kind = _ANTHROPIC_KINDS.get(self.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message, "param": self.param}}

    @classmethod
    def field(cls, param: str, message: str) -> ApiError:
        """A 400 about one field; ``message`` goes on from its name."""
        return cls(400, f"{param} {message}", param, code="invalid_value")


def placed(error: MixtralError, usual: str) -> ApiError:
    """A 400 of an error whose message may begin with the field it is about; ``usual`` where it does not."""
    found = _PLACE.match(str(error))
    return ApiError(400, str(error), found.group() if found is not None else usual, code="invalid_value")


def renamed(error: ApiError, place: str, name: str) -> ApiError:
    """``error``, where it is about ``place`` or what is within it: about ``name`` instead, as the request calls it."""
    if error.param is None or re.match(re.escape(place) + r"(?![\w])", error.param) is None:
        return error
    message = error.message
    if message.startswith(place):
        message = name + message.removeprefix(place)
    param = name + error.param.removeprefix(place)
    return ApiError(error.status, message, param, code=error.code, headers=error.headers)


def error_body(error: ApiError, path: str, request_id: str | None = None) -> dict[str, Any]:
    """The reply to a request of ``path``: in the envelope of the protocol that is spoken there."""
    if not is_anthropic(path):
        return error.body
    return error.anthropic_body | ({} if request_id is None else {"request_id": request_id})


def is_anthropic(path: str) -> bool:
    """Whether Anthropic's protocol is spoken at ``path``."""
    return any(path == each or path.startswith(f"{each}/") for each in ANTHROPIC_PATHS)
