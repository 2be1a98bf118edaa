"""Fills in the statistics of a generation while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable

from mlx_mixtral.experts.store import Counters
from mlx_mixtral.generation.request import Request
from mlx_mixtral.model.transformer import MixtralModel

__all__ = ["Meter"]


class Meter:
    """Made when a generation starts; told how many tokens there are whenever one more was read.

    ``request.on_prefill`` is told ``(total, total)`` prompt tokens with the first token.

    Args:
        reused_tokens: of the prompt, what the cache holds already.
        clock: seconds that only go up.
    """

    def __init__(
        self,
        model: MixtralModel,
        request: Request,
        reused_tokens: int = 0,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._stats, self._on_prefill, self._clock = request.stats, request.on_prefill, clock
        self._counters = model.counters if model.is_streamed else None
        self._before = None if self._counters is None else self._counters.copy()
        self._prompt_experts: Counters | None = None
        self._started = self._first_token_at = clock()
        self._stats.prompt_tokens, self._stats.reused_tokens = len(request.tokens), reused_tokens

    @property
    def waited_s(self) -> float:
        """Seconds since this was made."""
        return self._clock() - self._started

    def admit(self, reused_tokens: int) -> None:
        """It has waited since this was made, and begins now."""
        self._stats.queue_s, self._stats.reused_tokens = self.waited_s, reused_tokens
        if self._counters is not None:
            self._before = self._counters.copy()

    def count(self, tokens: int) -> None:
        stats, now = self._stats, self._clock()
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
