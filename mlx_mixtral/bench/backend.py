"""What is measured against each other: a runtime with a model, and how it is timed. Ours is here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.generation.loop import GenerationStats, decode
from mlx_mixtral.generation.sampling import Sampler, SamplingParams
from mlx_mixtral.generation.scheduler import Scheduler, SequenceRequest
from mlx_mixtral.model.step import DecodeStep
from mlx_mixtral.runtime.mixtral import Mixtral

__all__ = ["Backend", "BatchClock", "Ours", "Timing"]


@dataclass(frozen=True)
class Timing:
    """One measurement: so many tokens in so many seconds.

    ``read_bytes`` came from disk meanwhile, None when nothing is streamed.
    """

    tokens: int
    seconds: float
    read_bytes: int | None = None

    @property
    def tok_s(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


class Backend(Protocol):
    """A loaded model of one runtime. All generation is greedy and goes on past end-of-sequence ids."""

    nbytes: int
    """Of its weights as they lie in memory."""

    def prefill(self, prompt: Sequence[int]) -> Timing:
        """From ``prompt`` to its first token on the host."""
        ...

    def go_to(self, prompt: Sequence[int]) -> None:
        """Fill a cache with all of ``prompt`` but the last token, for ``decode``; an empty prompt frees it."""
        ...

    def decode(self, tokens: int) -> Timing:
        """So many steps after the prompt of ``go_to`` and its first token; may be called again and again."""
        ...

    def batch(self, prompts: Sequence[Sequence[int]], tokens: int) -> Timing | None:
        """So many steps of all rows together, after the first token of each; None when they cannot all run at once."""
        ...

    def close(self) -> None:
        """Free the weights."""
        ...


class BatchClock:
    """Times a batch by the tokens it gives: from the first step that had one for every row."""

    def __init__(self, rows: int) -> None:
        self._rows, self._tokens = rows, 0
        self._started = self._ended = 0.0

    def count(self, tokens: int) -> None:
        """So many tokens came with one step, just now."""
        now = time.perf_counter()
        if self._started:
            self._tokens, self._ended = self._tokens + tokens, now
        elif tokens == self._rows:
            self._started = now

    @property
    def timing(self) -> Timing | None:
        return Timing(self._tokens, self._ended - self._started) if self._tokens else None


class Ours:
    """This package's runtime, by the loops that ``generate`` and ``generate_batch`` run. Nothing else may use the model."""

    def __init__(self, model: Mixtral) -> None:
        self.model, self.nbytes = model, model.nbytes
        self._step = DecodeStep(model.module, compiled=model.device.kind != "cpu")
        self._stream = mx.new_thread_unsafe_stream(mx.default_device())
        self._prompt: Sequence[int] = ()
        self._cache: KVCache | None = None

    def prefill(self, prompt: Sequence[int]) -> Timing:
        stats = self._generate(prompt, self.model.make_cache(), 1)
        experts = stats.prompt_experts
        return Timing(len(prompt), stats.time_to_first_token_s, None if experts is None else experts.bytes_read)

    def go_to(self, prompt: Sequence[int]) -> None:
        self._prompt, self._cache = prompt, None
        if prompt:
            self._cache = self._filled()

    def decode(self, tokens: int) -> Timing:
        depth = len(self._prompt) - 1
        cache = self._cache
        assert cache is not None
        if cache.length > depth:
            if cache.trimmable >= cache.length - depth:
                cache.trim(cache.length - depth)
            else:  # a window that is full cannot be taken back
                self._cache = cache = self._filled()
        stats = self._generate(self._prompt[-1:], cache, tokens + 1)
        experts = stats.decode_experts
        return Timing(stats.tokens - 1, stats.decode_s, None if experts is None else experts.bytes_read)

    def batch(self, prompts: Sequence[Sequence[int]], tokens: int) -> Timing | None:
        module, planned = self.model.module, self.model.residency.planned
        scheduler = Scheduler(
            module,
            self._step,
            module.make_cache,
            stream=self._stream,
            max_rows=len(prompts),
            max_columns=None if planned.budget_bytes is None else planned.demands.context_capacity,
            prefill_chunk=planned.chunk_tokens,
        )
        clock = BatchClock(len(prompts))
        for prompt in prompts:
            scheduler.submit(SequenceRequest(prompt, tokens + 1, self._sampler(prompt)))
        while not scheduler.is_idle:
            clock.count(len(scheduler.step()))
            if scheduler.running < len(prompts) and clock.timing is None:
                break  # the memory budget lets some wait
        mx.synchronize(self._stream)
        return clock.timing

    def close(self) -> None:
        self._cache = None
        del self._step
        self.model.close()

    def _sampler(self, prompt: Sequence[int]) -> Sampler:
        return Sampler(SamplingParams(), prompt, self.model.config.vocab_size)

    def _filled(self) -> KVCache:
        cache, chunk = self.model.make_cache(), self.model.residency.planned.chunk_tokens
        before = mx.array([list(self._prompt[:-1])], mx.int32)
        with mx.stream(self._stream):
            for start in range(0, before.shape[1], chunk):
                self.model.module.remember(before[:, start : start + chunk], cache)
                mx.eval(cache.arrays)
        return cache

    def _generate(self, prompt: Sequence[int], cache: KVCache, max_tokens: int) -> GenerationStats:
        stats = GenerationStats()
        steps = decode(
            self.model.module,
            self._step,
            prompt,
            cache,
            self._sampler(prompt),
            max_tokens,
            stats,
            stream=self._stream,
            prefill_chunk=self.model.residency.planned.chunk_tokens,
        )
        for _ in steps:
            pass
        mx.synchronize(self._stream)
        return stats
