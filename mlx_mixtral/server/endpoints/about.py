"""/v1/models, /health, /metrics, /v1/status: of the model and the server, never of what anybody asked."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.types import Send

from mlx_mixtral import __version__
from mlx_mixtral.server.engine_thread import EngineState
from mlx_mixtral.server.replies import send_json
from mlx_mixtral.server.service import Service

__all__ = ["health", "metrics", "model", "models", "status"]

_UP = (EngineState.READY, EngineState.UNLOADED, EngineState.LOADING)


async def models(service: Service, request: Request, send: Send) -> None:
    """The one model, under each of its names, and its adapters."""
    names = (*service.served.names, *service.served.adapters)
    await send_json({"object": "list", "data": [_model(service, name) for name in names]}, send)


async def model(service: Service, request: Request, send: Send) -> None:
    """One name."""
    name = request.path_params["model"]
    await send_json(_model(service, service.served.check_name(name or "?")), send)


async def health(service: Service, request: Request, send: Send) -> None:
    """200 while requests are taken; 503 while the engine is being built again, when it is dead, and at shutdown."""
    state: str = service.engine.state.value
    is_up = service.engine.state in _UP and not service.admission.is_draining
    if service.admission.is_draining:
        state = "draining"
    await send_json({"status": "ok" if is_up else "unavailable", "engine": state}, send, status=200 if is_up else 503)


async def metrics(service: Service, request: Request, send: Send) -> None:
    """Prometheus' text format."""
    found, snapshot, admission = service.metrics, service.engine.snapshot, service.admission
    found.set("mlx_mixtral_requests_running", admission.open_rows - admission.waiting_rows)
    found.set("mlx_mixtral_requests_waiting", admission.waiting_rows)
    found.set("mlx_mixtral_engine_up", int(service.engine.state in _UP))
    found.set("mlx_mixtral_engine_failures_total", service.engine.failures)
    found.set("mlx_mixtral_connections", service.connections())
    found.set("mlx_mixtral_memory_active_bytes", snapshot.active_bytes)
    found.set("mlx_mixtral_memory_peak_bytes", snapshot.peak_bytes)
    found.set("mlx_mixtral_prefix_cache_bytes", snapshot.cached_prefix_bytes)
    body = found.text().encode()
    headers = [
        (b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def status(service: Service, request: Request, send: Send) -> None:
    """What the server is doing, in numbers."""
    engine, admission, options, served = service.engine, service.admission, service.options, service.served
    snapshot = engine.snapshot
    await send_json(
        {
            "version": __version__,
            "model": served.name,
            "aliases": list(served.aliases),
            "adapters": list(served.adapters),
            "engine": engine.state.value,
            "engine_failures": engine.failures,
            "uptime_seconds": round(time.monotonic() - service.started_at, 1),
            "is_draining": admission.is_draining,
            "context_tokens": served.context_tokens,
            "chat_format": served.tokenizer.chat_format,
            "tool_format": service.chat.name,
            "rows": {"most": engine.rows, "running": snapshot.running_rows, "waiting": admission.waiting_rows},
            "queue": {"most": options.queue, "timeout_seconds": options.queue_timeout_s},
            "requests_open": admission.open_jobs,
            "memory": {
                "weights_bytes": snapshot.weights_bytes,
                "active_bytes": snapshot.active_bytes,
                "peak_bytes": snapshot.peak_bytes,
            },
            "prefix_cache": {"entries": snapshot.cached_prefixes, "bytes": snapshot.cached_prefix_bytes},
        },
        send,
    )


def _model(service: Service, name: str) -> dict[str, Any]:
    served = service.served
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "mlx-mixtral",
        "max_model_len": served.context_tokens,
        "parent": None if served.adapter_of(name) is None else served.name,
    }
