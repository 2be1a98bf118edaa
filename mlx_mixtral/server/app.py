"""The application: every path, behind the guards."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cache, partial
from typing import Any

from starlette.requests import Request
from starlette.routing import Match, Route, Router
from starlette.types import ASGIApp, Scope, Send

from mlx_mixtral.server.endpoints import about, chat, completions, embeddings, messages, page, responses, tokens
from mlx_mixtral.server.guards import Guards
from mlx_mixtral.server.replies import send_json
from mlx_mixtral.server.service import Endpoint, Service
from mlx_mixtral.server.wire.openapi import describe

__all__ = ["PATHS", "make_app"]


async def openapi(service: Service, request: Request, send: Send) -> None:
    """What there is, in OpenAPI's words."""
    await send_json(_description(), send)


PATHS: tuple[tuple[str, str, Callable[[Service, Request, Send], Awaitable[None]]], ...] = (
    ("POST", "/v1/chat/completions", chat.chat_completions),
    ("POST", "/v1/completions", completions.completions),
    ("POST", "/v1/responses", responses.responses),
    ("POST", "/v1/messages", messages.messages),
    ("POST", "/v1/messages/count_tokens", messages.count_tokens),
    ("POST", "/v1/embeddings", embeddings.embeddings),
    ("POST", "/tokenize", tokens.tokenize),
    ("POST", "/detokenize", tokens.detokenize),
    ("GET", "/tokenizer_info", tokens.tokenizer_info),
    ("GET", "/v1/models", about.models),
    ("GET", "/v1/models/{model:path}", about.model),
    ("GET", "/v1/status", about.status),
    ("GET", "/health", about.health),
    ("GET", "/metrics", about.metrics),
    ("GET", "/openapi.json", openapi),
)
"""Method, path, and who answers. Those that begin with /v1 are there without it, too."""


@cache
def _description() -> dict[str, Any]:
    return describe([(method, path) for method, path, _ in PATHS])


def make_app(service: Service) -> ASGIApp:
    """An ASGI application that serves ``service``."""
    routes = []
    for method, path, answer in PATHS:
        endpoint = Endpoint(path, partial(answer, service))
        places = dict.fromkeys((path, path.removeprefix("/v1")))
        routes += [Route(place, endpoint, methods=[method]) for place in places]
    if service.options.has_page:
        routes.append(Route("/", Endpoint("/", partial(page.page, service)), methods=["GET"]))

    def methods_of(scope: Scope) -> list[str]:
        found = {method for route in routes if route.matches(scope)[0] != Match.NONE for method in route.methods or ()}
        return sorted(found)

    return Guards(Router(routes, redirect_slashes=False), methods_of, service.options, service.log, service.metrics)
