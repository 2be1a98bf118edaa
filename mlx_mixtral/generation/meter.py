"""Fills in the statistics of a generation while it runs."""

from __future__ import annotations

import time

from mlx_mixtral.experts.store import Counters
from mlx_mixtral.generation.request import Request
from mlx_mixtral.model.transformer import MixtralModel

__all__ = ["Meter"]


class Meter:
    """Made when a generation starts; told how many tokens there are whenever one more was read.

    ``request.on_prefill`` is told ``(total, total)`` prompt tokens with the first token.

    Args:
        reused_tokens: of the prompt, what the cache holds already.
    """

    def __init__(self, model: MixtralModel, request: Request, reused_tokens: int = 0) -> None:
        self._stats, self._on_prefill = request.stats, request.on_prefill
        self._counters = model.counters if model.is_streamed else None
        self._before = None if self._counters is None else self._counters.copy()
        self._prompt_experts: Counters | None = None
        self._started = self._first_token_at = time.perf_counter()
        self._stats.prompt_tokens, self._stats.reused_tokens = len(request.tokens), reused_tokens

    def count(self, tokens: int) -> None:
        stats, now = self._stats, time.perf_counter()
        if tokens == 1:
            self._first_token_at = now
            stats.time_to_first_token_s = now - self._started
            if self._on_prefill is not None:
                self._on_prefill(stats.prompt_tokens, stats.prompt_tokens)
        stats.tokens = tokens
        stats.decode_s = now - self._first_token_at
        if self._counters is not None and self._before is not None:
            self._prompt_experts = self._prompt_experts or self._counters.copy()
            stats.prompt_experts = self._prompt_experts.since(self._before)
            stats.decode_experts = self._counters.since(self._prompt_experts)
