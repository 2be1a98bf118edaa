"""A scheduler whose steps are recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import Mixtral, SamplingParams
from mlx_mixtral.cache.prefixes import PrefixStore
from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.request import Request
from mlx_mixtral.generation.rows import RowUpdate
from mlx_mixtral.generation.sampling import Sampler
from mlx_mixtral.generation.scheduler import Scheduler
from mlx_mixtral.model.step import DecodeStep

__all__ = ["HandClock", "StorePrefixes", "WatchedScheduler", "prompt_of"]


def prompt_of(model: Mixtral, length: int, seed: int = 0) -> list[int]:
    """Random tokens; another length or seed gives others."""
    return [int(i) for i in np.random.default_rng(seed + length).integers(3, model.config.vocab_size, length)]


class HandClock:
    """Seconds that go on only when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class StorePrefixes(PrefixStore):
    """A store of prefixes as a scheduler takes one."""

    @property
    def is_borrowed(self) -> bool:
        return not self.has_memory


class WatchedScheduler:
    """A scheduler, and who ran in each of its steps."""

    def __init__(self, model: Mixtral, **limits: Any) -> None:
        self.model, self.tokens = model, dict[int, list[int]]()
        self.running: list[tuple[int, ...]] = []
        self.errors: dict[int, Exception] = {}
        self.ended: list[int] = []
        self.context = DecodeContext(
            model.module,
            limits.pop("step", DecodeStep(model.module, compiled=False)),
            mx.default_stream(mx.default_device()),
            limits.pop("prefill_chunk", 1024),
        )
        self.scheduler = Scheduler(self.context, **{"max_rows": 8} | limits)

    def request(self, prompt: Sequence[int], max_tokens: int, **options: Any) -> Request:
        """Options of ``Request`` by their names, and those of ``SamplingParams``."""
        own = {name: options.pop(name) for name in ("constraint", "on_prefill") if name in options}
        processors = options.pop("processors", ())
        sampler = Sampler(SamplingParams(**options), prompt, self.model.config.vocab_size, processors=processors)
        return Request(prompt, max_tokens, sampler, **own)

    def submit(self, prompt: Sequence[int], max_tokens: int, *, timeout_s: float | None = None, **options: Any) -> int:
        ticket = self.scheduler.submit(self.request(prompt, max_tokens, **options), timeout_s=timeout_s)
        self.tokens[ticket] = []
        return ticket

    def step(self) -> list[RowUpdate]:
        found = self.scheduler.step()
        self.running.append(tuple(update.ticket for update in found if update.token is not None))
        for update in found:
            if update.token is not None:
                self.tokens.setdefault(update.ticket, []).append(update.token.token_id)
            if update.error is not None:
                self.errors[update.ticket] = update.error
            if update.is_last:
                self.ended.append(update.ticket)
        return found

    def run(self) -> None:
        for _ in range(3000):
            if self.scheduler.is_idle:
                return
            self.step()
        pytest.fail("the scheduler does not end")
