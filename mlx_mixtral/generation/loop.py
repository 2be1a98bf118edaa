"""The decode loop: prefill by chunks, then one token a step, the next step scheduled before the last one is read."""

from __future__ import annotations

from collections.abc import Generator

import mlx.core as mx
import numpy as np

from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.meter import Meter
from mlx_mixtral.generation.prefill import prefill
from mlx_mixtral.generation.request import Request
from mlx_mixtral.generation.sampling import Sampled
from mlx_mixtral.generation.stats import Token

__all__ = ["decode", "first_logits", "first_token", "read_token"]


def decode(context: DecodeContext, request: Request, cache: KVCache) -> Generator[Token, None, None]:
    """Generate up to ``request.max_tokens`` tokens; the caller stops iterating when it has seen enough.

    Of the prompt, what ``cache`` holds already is not computed; it must not hold all of it. Exactly ``max_tokens - 1``
    positions beyond the prompt are computed when all tokens are taken: the last token is never fed back. A caller that stops
    early on a token's value leaves one step in flight, which reading it ahead costs.
    """
    model, sampler = context.model, request.sampler
    meter = Meter(model, request, cache.length)
    ahead = first_token(context, request, cache)

    def following(current: Sampled) -> Sampled:
        with mx.stream(context.stream):
            sampled = sampler(context.step(current.token[None], cache)[:, -1])
            mx.async_eval(sampled.arrays)
        return sampled

    for made in range(1, request.max_tokens + 1):
        current = ahead
        # What waits for experts, or for a function that wants this token, gains nothing by starting early.
        is_early = made < request.max_tokens and not model.is_streamed and not sampler.reads_tokens
        if is_early:
            ahead = following(current)
        token = read_token(current)
        meter.count(made)
        yield token
        if made < request.max_tokens and not is_early:
            ahead = following(current)


def first_token(context: DecodeContext, request: Request, cache: KVCache) -> Sampled:
    """Compute what ``cache`` does not hold of the prompt, and schedule the token after it."""
    with mx.stream(context.stream):
        sampled = request.sampler(first_logits(context, request, cache))
        mx.async_eval(sampled.arrays)
    return sampled


def first_logits(context: DecodeContext, request: Request, cache: KVCache) -> mx.array:
    """Compute what ``cache`` does not hold of the prompt, and give the logits ``[1, V]`` after it."""
    before, total = cache.length, len(request.tokens)
    with mx.stream(context.stream):
        tokens = mx.array([list(request.tokens[before:])], mx.int32)
        for done, hidden in prefill(context.model, tokens, cache, context.chunk_tokens):
            if hidden is None and request.on_prefill is not None:
                request.on_prefill(before + done, total)
        assert hidden is not None
        return context.model.head(hidden[:, -1], cache.adapter)


def read_token(sampled: Sampled) -> Token:
    """Wait for a sampled token and bring it to the host."""
    top: tuple[tuple[int, float], ...] = ()
    if sampled.top_ids is not None and sampled.top_logprobs is not None:
        ids, logprobs = np.asarray(sampled.top_ids).tolist(), np.asarray(sampled.top_logprobs).tolist()
        top = tuple(zip(ids, logprobs, strict=True))
    logprob = None if sampled.logprob is None else float(np.asarray(sampled.logprob))
    return Token(int(np.asarray(sampled.token)[0]), logprob, top)
