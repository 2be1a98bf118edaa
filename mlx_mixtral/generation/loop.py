"""The decode loop: prefill by chunks, then one token a step, the next step scheduled before the last one is read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import mlx.core as mx
import numpy as np

from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.generation.meter import Meter
from mlx_mixtral.generation.sampling import Sampled, Sampler
from mlx_mixtral.generation.stats import GenerationStats, Token
from mlx_mixtral.model.step import DecodeStep
from mlx_mixtral.model.transformer import MixtralModel

__all__ = ["PREFILL_CHUNK_TOKENS", "GenerationStats", "Token", "decode", "prefill", "read_token"]

PREFILL_CHUNK_TOKENS = 1024


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
    meter = Meter(model, prompt, stats, on_prefill)
    with mx.stream(stream):
        hidden = prefill(model, prompt, cache, prefill_chunk, on_prefill)
        ahead = sampler(model.head(hidden[:, -1]))
        mx.async_eval(ahead.arrays)

    def following(current: Sampled) -> Sampled:
        with mx.stream(stream):
            sampled = sampler(compute(current.token[None], cache)[:, -1])
            mx.async_eval(sampled.arrays)
        return sampled

    for step in range(max_tokens):
        current = ahead
        # A forward that waits for experts would wait for this token too: nothing is gained by starting it early.
        is_early = step + 1 < max_tokens and not model.is_streamed
        if is_early:
            ahead = following(current)
        token = read_token(current)
        meter.count(step + 1)
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
    start, before = 0, cache.length
    while len(prompt) - start > chunk:
        model.remember(tokens[:, start : start + chunk], cache)
        mx.eval(cache.arrays)
        start += chunk
        if on_prefill is not None:
            on_prefill(before + start, before + len(prompt))
    return model.hidden(tokens[:, start:], cache, last_only=True)


def read_token(sampled: Sampled) -> Token:
    """Wait for a sampled token and bring it to the host."""
    top: tuple[tuple[int, float], ...] = ()
    if sampled.top_ids is not None and sampled.top_logprobs is not None:
        ids, logprobs = np.asarray(sampled.top_ids).tolist(), np.asarray(sampled.top_logprobs).tolist()
        top = tuple(zip(ids, logprobs, strict=True))
    logprob = None if sampled.logprob is None else float(np.asarray(sampled.logprob))
    return Token(int(np.asarray(sampled.token)[0]), logprob, top)
