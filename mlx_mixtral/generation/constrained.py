"""Decoding under a constraint: masks are made on the host while the forward runs, and tokens stay when they are accepted."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.constraints.base import WORD_BITS, Constraint, mask_words
from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.loop import first_logits, read_token
from mlx_mixtral.generation.meter import Meter
from mlx_mixtral.generation.request import Request
from mlx_mixtral.generation.sampling import Sampled, Sampler
from mlx_mixtral.generation.stats import Token

__all__ = ["allowed_tokens", "decode_constrained", "next_mask", "settled"]


def allowed_tokens(masks: npt.NDArray[np.int32], vocab_size: int) -> mx.array:
    """Masks ``[B, ceil(V / 32)]`` unpacked on the device: ``[B, V]`` boolean."""
    words = mx.array(masks)[:, :, None]
    bits = mx.right_shift(words, mx.arange(WORD_BITS, dtype=mx.int32)) & 1
    return bits.reshape(len(masks), -1)[:, :vocab_size] != 0


def next_mask(constraint: Constraint, vocab_size: int) -> mx.array:
    """What may come next, ``[1, V]`` boolean."""
    mask = np.zeros((1, mask_words(vocab_size)), np.int32)
    constraint.mask_into(mask[0])
    return allowed_tokens(mask, vocab_size)


def settled(sampler: Sampler, constraint: Constraint, logits: mx.array, sampled: Sampled) -> Token:
    """Wait for a token drawn from ``logits [1, V]`` and let the constraint accept it, or another one in its place.

    The sampler takes what stays as generated. ``end`` is set where the text is whole with it.

    Raises:
        ConstraintError: the constraint cannot be kept.
    """
    token = read_token(sampled)
    stays = constraint.accept(token.token_id)
    if stays != token.token_id:
        sampled = sampler.chosen(logits, mx.array([stays], mx.int32))
        token = read_token(sampled)
    sampler.record(sampled.token)
    if not constraint.is_complete:
        return token
    return dataclasses.replace(token, end="length" if constraint.was_cut else "stop")


def decode_constrained(context: DecodeContext, request: Request, cache: KVCache) -> Generator[Token, None, None]:
    """As ``decode``, with tokens that ``request.constraint`` allows, and no more once the text is whole.

    The forward after a token starts before the token is read, as in ``decode``: the mask behind it is made meanwhile. Where
    another token takes its place that forward is taken back.

    Raises:
        ConstraintError: the constraint cannot be kept.
    """
    model, sampler, constraint = context.model, request.sampler, request.constraint
    assert constraint is not None
    meter = Meter(model, request, cache.length)
    logits = first_logits(context, request, cache)
    mx.async_eval(logits)

    def after(token: mx.array) -> mx.array:
        with mx.stream(context.stream):
            following = context.step(token[None], cache)[:, -1]
            mx.async_eval(following)
        return following

    for made in range(1, request.max_tokens + 1):
        allowed = next_mask(constraint, logits.shape[-1])
        with mx.stream(context.stream):
            sampled = sampler.drawn(logits, allowed)
            mx.async_eval(sampled.arrays)
        is_early = made < request.max_tokens and not model.is_streamed and not sampler.reads_tokens
        following = after(sampled.token) if is_early else None
        with mx.stream(context.stream):
            token = settled(sampler, constraint, logits, sampled)
            if following is not None and token.token_id != int(np.asarray(sampled.token)[0]):
                cache.trim(1)
                following = None
        meter.count(made)
        yield token
        if token.end is not None or made == request.max_tokens:
            return
        logits = after(mx.array([token.token_id], mx.int32)) if following is None else following
