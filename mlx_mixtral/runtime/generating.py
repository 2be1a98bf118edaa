"""One generation on an engine: the caches it goes on from, and the one it leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Protocol

import mlx.core as mx

from mlx_mixtral.budget.plan import MemoryPlan
from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.request import Decoder, Request
from mlx_mixtral.generation.stats import Token
from mlx_mixtral.runtime.adapters import Adapters
from mlx_mixtral.runtime.prompt_cache import PromptCache

__all__ = ["generated"]


class GeneratingEngine(Protocol):
    """What a generation asks of its engine."""

    @property
    def context(self) -> DecodeContext: ...

    @property
    def plan(self) -> MemoryPlan: ...

    @property
    def adapters(self) -> Adapters: ...

    @property
    def prompt_cache(self) -> PromptCache: ...

    @property
    def context_limit(self) -> int: ...

    def running(self) -> contextlib.AbstractContextManager[None]: ...


def generated(engine: GeneratingEngine, decoder: Decoder, request: Request) -> Generator[Token, None, None]:
    """The tokens of ``request`` as ``decoder`` makes them, the engine being busy; raises as ``Engine.generate``."""
    context, prompts = engine.context, engine.prompt_cache
    return _steps(engine, context, prompts, decoder, request)


def _steps(
    engine: GeneratingEngine, context: DecodeContext, prompts: PromptCache, decoder: Decoder, request: Request
) -> Generator[Token, None, None]:
    busy = contextlib.nullcontext() if request.speculation is None else request.speculation.busy()
    with engine.running(), busy:
        engine.adapters.by_number(request.adapter)
        request.stats.predicted_tok_s = engine.plan.tok_s
        with mx.stream(context.stream):
            kept = prompts.take(request.tokens, context.model.min_prompt_tokens, request.adapter)
            request.stats.not_reused = prompts.kept.why_not
            cache = kept or context.model.make_cache(max_tokens=engine.context_limit, adapter=request.adapter)
        seen, is_whole = list(request.tokens), False
        try:
            with contextlib.closing(decoder(context, request, cache)) as tokens:
                for token in tokens:
                    seen.append(token.token_id)
                    request.stats.peak_memory_bytes = mx.get_peak_memory()
                    # A caller that has seen enough closes us here.
                    is_whole = True
                    yield token
                    is_whole = False
            is_whole = True
        finally:
            if is_whole:
                prompts.put(seen[: cache.length], cache)
