"""The description of the API at /openapi.json, made of the same tables that check the bodies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from mlx_mixtral import __version__
from mlx_mixtral.server.wire.chat import CHAT_BODY
from mlx_mixtral.server.wire.completions import COMPLETION_BODY
from mlx_mixtral.server.wire.embeddings import EMBEDDINGS_BODY
from mlx_mixtral.server.wire.errors import is_anthropic
from mlx_mixtral.server.wire.fields import BodyTable, Tagged
from mlx_mixtral.server.wire.kinds import Either, ListOf, MapOf, ValueKind
from mlx_mixtral.server.wire.messages import COUNT_TOKENS_BODY, MESSAGES_BODY, VERSIONS
from mlx_mixtral.server.wire.replies_schema import REPLY_SCHEMAS
from mlx_mixtral.server.wire.responses import RESPONSES_BODY
from mlx_mixtral.server.wire.tokens import DETOKENIZE_BODY, TOKENIZE_BODY

__all__ = ["BODIES", "describe"]

BODIES: dict[str, BodyTable] = {
    "/v1/chat/completions": CHAT_BODY,
    "/v1/completions": COMPLETION_BODY,
    "/v1/responses": RESPONSES_BODY,
    "/v1/messages": MESSAGES_BODY,
    "/v1/messages/count_tokens": COUNT_TOKENS_BODY,
    "/v1/embeddings": EMBEDDINGS_BODY,
    "/tokenize": TOKENIZE_BODY,
    "/detokenize": DETOKENIZE_BODY,
}
"""What each path that is posted to takes."""

_ABOUT: dict[str, tuple[str, str]] = {
    "/v1/chat/completions": ("Answer a conversation", "ChatCompletion"),
    "/v1/completions": ("Continue a prompt", "Completion"),
    "/v1/responses": ("Answer a conversation, in items; nothing is stored", "Response"),
    "/v1/messages": ("Answer a conversation, in Anthropic's protocol", "Message"),
    "/v1/messages/count_tokens": ("Tokens of a conversation, in Anthropic's protocol", "MessageTokens"),
    "/v1/embeddings": ("Vectors of texts, by a server that was started with --pooling", "Embeddings"),
    "/tokenize": ("Token ids of a text or a conversation", "Tokens"),
    "/detokenize": ("Text of token ids", "Detokenized"),
    "/tokenizer_info": ("What tells the tokenizer", "TokenizerInfo"),
    "/v1/models": ("The model, under each of its names", "ModelList"),
    "/v1/models/{model}": ("One name of the model", "Model"),
    "/v1/status": ("What the server is doing, in numbers", "Status"),
    "/health": ("Whether requests are taken; needs no key", "Health"),
    "/metrics": ("Counts and times for Prometheus", ""),
    "/openapi.json": ("This description", ""),
}

_STREAMED = {
    "/v1/chat/completions": "Chunks of the answer as `data`, the last `[DONE]`",
    "/v1/completions": "Chunks of the text as `data`, the last `[DONE]`",
    "/v1/responses": "Events with their `type` as name and as `data`; the last is response.completed or response.incomplete",
    "/v1/messages": "Events with their `type` as name and as `data`; the last is message_stop",
}
"""What comes with ``stream``."""
_OPEN = ("/health",)

_ERRORS = {
    "400": "The request is wrong; `param` names the field",
    "401": "The API key is missing or not valid",
    "403": "The Host or the Origin is not one of this server's",
    "404": "There is no such path, or no such model",
    "408": "The request did not come in time",
    "413": "The body is too large",
    "415": "The body is not application/json",
    "429": "Too many requests are waiting; see Retry-After",
    "500": "The server failed",
    "501": "Needs a package that is not installed, or an option that the server was started without",
    "503": "Waited too long, or the server is not ready",
}


def describe(paths: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """An OpenAPI 3.1 document (https://spec.openapis.org/oas/v3.1.1.html).

    Args:
        paths: method and path of each endpoint.
    """
    described: dict[str, dict[str, Any]] = {}
    for method, path in paths:
        place = path.replace(":path}", "}")
        described.setdefault(place, {})[method.lower()] = _operation(method, place)
    tables = {table.name: table for body in BODIES.values() for table in _named_tables(body)}
    schemas = {name: table.object_schema() for name, table in tables.items()} | REPLY_SCHEMAS
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mlx-mixtral",
            "version": __version__,
            "description": "One Mixtral model in OpenAI's protocol and Anthropic's. Unknown fields are ignored.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": described,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"key": []}, {"x-api-key": []}, {}],
    }


def _operation(method: str, path: str) -> dict[str, Any]:
    summary, reply = _ABOUT[path]
    content: dict[str, Any] = {"application/json": {"schema": _ref(reply) if reply else {"type": "object"}}}
    if path == "/metrics":
        content = {"text/plain": {"schema": {"type": "string"}}}
    if path in _STREAMED:
        # No type: some readers take the schema for the whole text, others for each event.
        content["text/event-stream"] = {"schema": {"description": _STREAMED[path]}}
    error = {"application/json": {"schema": _ref("AnthropicError" if is_anthropic(path) else "Error")}}
    operation: dict[str, Any] = {
        "operationId": "_".join([method.lower(), *re.findall(r"[a-z0-9]+", path)]),
        "summary": summary,
        "responses": {"200": {"description": summary, "content": content}},
    }
    if path in _OPEN:
        operation["security"] = []
    unavailable = {"503": {"description": "It is not ready", "content": content}} if path == "/health" else {}
    statuses = (
        _ERRORS if path in BODIES else {status: _ERRORS[status] for status in ("400", "401", "403", "404", "500")}
    )
    operation["responses"] |= {
        status: {"description": about, "content": error} for status, about in statuses.items()
    } | unavailable
    if path in BODIES:
        schema = {"application/json": {"schema": _ref(BODIES[path].name)}}
        operation["requestBody"] = {"required": True, "content": schema}
    if is_anthropic(path):
        version = {"type": "string", "enum": list(VERSIONS)}
        operation["parameters"] = [{"name": "anthropic-version", "in": "header", "schema": version}]
    if "{model}" in path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return operation


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _named_tables(kind: ValueKind | None) -> Iterator[BodyTable]:
    """Tables that schemas refer to by name, within ``kind``."""
    if isinstance(kind, BodyTable):
        if kind.name:
            yield kind
        for field in kind.fields:
            yield from _named_tables(field.kind)
    elif isinstance(kind, ListOf):
        yield from _named_tables(kind.item)
    elif isinstance(kind, MapOf):
        yield from _named_tables(kind.value)
    elif isinstance(kind, Tagged):
        for table in kind.tables.values():
            yield from _named_tables(table)
    elif isinstance(kind, Either):
        for each in kind.kinds:
            yield from _named_tables(each)
