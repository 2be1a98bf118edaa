"""The decode loop: prefill by chunks, then one token a step, the next step scheduled before the last one is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.experts.store import Counters
from mlx_mixtral.generation.sampling import Sampled, Sampler
from mlx_mixtral.generation.speculation.proposal import SpeculationStats
from mlx_mixtral.model.mixtral import MixtralModel
from mlx_mixtral.model.step import DecodeStep

__all__ = ["PREFILL_CHUNK_TOKENS", "GenerationStats", "Token", "decode", "prefill", "read_token"]

PREFILL_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Token:
    """One generated token: its id, its log-probability and the likeliest ids with theirs, where asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass
class GenerationStats:
    """What a generation cost so far. Seconds are wall-clock; rates are 0 before there is anything to divide."""

    prompt_tokens: int = 0
    tokens: int = 0
    time_to_first_token_s: float = 0.0
    decode_s: float = 0.0
    """From the first token to the last."""
    peak_memory_bytes: int = 0
    """Largest memory MLX held at once during the generation, weights included."""
    prompt_experts: Counters | None = None
    """What streaming did up to the first token; None when all experts are resident."""
    decode_experts: Counters | None = None
    """The same from the first token to the last."""
    predicted_tok_s: float | None = None
    """What the plan in force predicts for decoding."""
    speculation: SpeculationStats | None = None
    """What was proposed and accepted; None without speculation."""

    @property
    def prompt_tok_s(self) -> float:
        """Prompt tokens over the time to the first token."""
        return self.prompt_tokens / self.time_to_first_token_s if self.time_to_first_token_s else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Tokens after the first over the time they took."""
        return (self.tokens - 1) / self.decode_s if self.tokens > 1 and self.decode_s else 0.0

    def to_dict(self) -> dict[str, float | int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "time_to_first_token_s": self.time_to_first_token_s,
            "prompt_tok_s": self.prompt_tok_s,
            "decode_s": self.decode_s,
            "decode_tok_s": self.decode_tok_s,
            "peak_memory_bytes": self.peak_memory_bytes,
            **self._streaming(),
            **({} if self.speculation is None else self.speculation.to_dict()),
        }

    def _streaming(self) -> dict[str, float | int]:
        prompt, decoded = self.prompt_experts, self.decode_experts
        if prompt is None or decoded is None:
            return {}
        steps = max(self.tokens - 1, 1)
        return {
            "prompt_bytes_read": prompt.bytes_read,
            "bytes_read_per_token": decoded.bytes_read / steps,
            "hit_rate": decoded.hit_rate,
            "readbacks_per_token": decoded.readbacks / steps,
            "disk_wait_s": prompt.wait_s + decoded.wait_s,
        } | ({} if self.predicted_tok_s is None else {"predicted_tok_s": self.predicted_tok_s})


def decode(
    model: MixtralModel,
    compute: DecodeStep,
    prompt: Sequence[int],
    cache: KVCache,
    sampler: Sampler,
    max_tokens: int,
    stats: GenerationStats,
    *,
    stream: mx.Stream,
    prefill_chunk: int = PREFILL_CHUNK_TOKENS,
    on_prefill: Callable[[int, int], None] | None = None,
) -> Generator[Token, None, None]:
    """Generate up to ``max_tokens`` tokens after ``prompt``; the caller stops iterating when it has seen enough.

    Exactly ``len(prompt) + max_tokens - 1`` positions are computed when all tokens are taken: the last token is never fed
    back. A caller that stops early on a token's value leaves one step in flight, which reading it ahead costs.

    Args:
        compute: the model's step, one token at a time.
        cache: what came before the prompt; updated in place.
        stats: filled in as it goes.
        stream: the MLX stream for all work. One that any thread may use, as the iterator may be resumed from several.
        prefill_chunk: tokens computed at once; bounds working memory.
        on_prefill: told ``(done, total)`` prompt tokens after each chunk; raising from it cancels.
    """
    started = time.perf_counter()
    stats.prompt_tokens = len(prompt)
    counters = model.counters if model.is_streamed else None
    before = counters.copy() if counters is not None else None
    with mx.stream(stream):
        hidden = prefill(model, prompt, cache, prefill_chunk, on_prefill)
        ahead = sampler(model.head(hidden[:, -1]))
        mx.async_eval(ahead.arrays)
    first_token_at = started

    def following(current: Sampled) -> Sampled:
        with mx.stream(stream):
            sampled = sampler(compute(current.token[None], cache)[:, -1])
            mx.async_eval(sampled.arrays)
        return sampled

    prompt_experts = None
    for step in range(max_tokens):
        current = ahead
        # A forward that waits for experts would wait for this token too: nothing is gained by starting it early.
        is_early = step + 1 < max_tokens and not model.is_streamed
        if is_early:
            ahead = following(current)
        token = read_token(current)
        now = time.perf_counter()
        if step == 0:
            first_token_at = now
            stats.time_to_first_token_s = now - started
            if on_prefill is not None:
                on_prefill(len(prompt), len(prompt))
        stats.tokens = step + 1
        stats.decode_s = now - first_token_at
        if counters is not None and before is not None:
            prompt_experts = prompt_experts or counters.copy()
            stats.prompt_experts = prompt_experts.since(before)
            stats.decode_experts = counters.since(prompt_experts)
        yield token
        if step + 1 < max_tokens and not is_early:
            ahead = following(current)


def prefill(
    model: MixtralModel,
    prompt: Sequence[int],
    cache: KVCache,
    chunk: int,
    on_prefill: Callable[[int, int], None] | None,
) -> mx.array:
    """Hidden state of the prompt's last token ``[1, 1, D]``, lazily; all chunks but the last are computed and dropped."""
    tokens = mx.array([list(prompt)], mx.int32)
    start = 0
    while len(prompt) - start > chunk:
        model.remember(tokens[:, start : start + chunk], cache)
        mx.eval(cache.arrays)
        start += chunk
        if on_prefill is not None:
            on_prefill(start, len(prompt))
    return model.hidden(tokens[:, start:], cache, last_only=True)


def read_token(sampled: Sampled) -> Token:
    """Wait for a sampled token and bring it to the host."""
    top: tuple[tuple[int, float], ...] = ()
    if sampled.top_ids is not None and sampled.top_logprobs is not None:
        ids, logprobs = np.asarray(sampled.top_ids).tolist(), np.asarray(sampled.top_logprobs).tolist()
        top = tuple(zip(ids, logprobs, strict=True))
    logprob = None if sampled.logprob is None else float(np.asarray(sampled.logprob))
    return Token(int(np.asarray(sampled.token)[0]), logprob, top)
