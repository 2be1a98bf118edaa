"""What is measured against each other: a runtime with a model, and how it is timed. Ours is here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.generation.loop import decode
from mlx_mixtral.generation.prefill import last_hidden
from mlx_mixtral.generation.request import Request
from mlx_mixtral.generation.sampling import Sampler, SamplingParams
from mlx_mixtral.generation.stats import GenerationStats
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
    """This package's runtime, by the loops that ``generate`` and ``generate_batch`` run, with the adapter in use.

    Nothing else may use the model.
    """

    def __init__(self, model: Mixtral) -> None:
        self.model, self.nbytes = model, model.nbytes + model.adapters.nbytes
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
        stats = self._generate(self._prompt, cache, tokens + 1)
        experts = stats.decode_experts
        return Timing(stats.tokens - 1, stats.decode_s, None if experts is None else experts.bytes_read)

    def batch(self, prompts: Sequence[Sequence[int]], tokens: int) -> Timing | None:
        engine = self.model.engine
        scheduler = engine.scheduler(len(prompts), keeps_prompts=False)
        clock = BatchClock(len(prompts))
        for prompt in prompts:
            scheduler.submit(self._request(prompt, tokens + 1))
        with engine.guarded(), engine.running():
            while not scheduler.is_idle:
                clock.count(sum(update.token is not None for update in scheduler.step()))
                if scheduler.running < len(prompts) and clock.timing is None:
                    break  # the memory budget lets some wait
        return clock.timing

    def close(self) -> None:
        self._cache = None
        self.model.close()

    def _request(self, prompt: Sequence[int], tokens: int) -> Request:
        sampler = Sampler(SamplingParams(), prompt, self.model.engine.vocab_size)
        return Request(prompt, tokens, sampler, adapter=self.model.module.adapter)

    def _filled(self) -> KVCache:
        cache, before = self.model.make_cache(), mx.array([list(self._prompt[:-1])], mx.int32)
        with self.model.engine.computing() as context:
            mx.eval(last_hidden(context.model, before, cache, context.chunk_tokens), cache.arrays)
        return cache

    def _generate(self, prompt: Sequence[int], cache: KVCache, tokens: int) -> GenerationStats:
        engine, request = self.model.engine, self._request(prompt, tokens)
        with engine.guarded(), engine.running():
            for _ in decode(engine.context, request, cache):
                pass
        return request.stats
