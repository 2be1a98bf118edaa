"""A draft model: a smaller one with the same vocabulary writes ahead, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_mixtral.constraints.base import Constraint
from mlx_mixtral.generation.constrained import next_mask
from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.prefill import last_hidden
from mlx_mixtral.generation.sampling import Sampler
from mlx_mixtral.generation.speculation.accept import DRAFT_STREAM
from mlx_mixtral.generation.speculation.proposal import Guess, Proposal

__all__ = ["DraftProposer"]


class DraftProposer:
    """Proposes what a draft model generates, sampled as the model itself is: same temperature, truncation and penalties.

    The draft has its own cache, brought up to the sequence before it proposes and trimmed when tokens were refused. After
    k proposals it holds k - 1 of them: the last was never fed to it.

    Args:
        context: the draft model's own.
        max_tokens: positions the draft's cache may take; beyond them nothing is proposed.
        max_proposed: largest number of tokens that ``propose`` is asked for.
    """

    def __init__(self, context: DecodeContext, prompt: Sequence[int], *, max_tokens: int, max_proposed: int) -> None:
        self._context = context
        self._tokens = list(prompt)
        self._max_tokens, self._max_proposed = max_tokens, max_proposed
        self.cache = context.model.make_cache(max_tokens=max_tokens)

    def guess(self) -> Guess | None:
        """None once the draft's context is full."""
        return Guess(0) if len(self._tokens) + self._max_proposed <= self._max_tokens else None

    def propose(self, count: int, sampler: Sampler, constraint: Constraint | None = None) -> Proposal:
        sampler = sampler.fork()
        ahead = None if constraint is None else constraint.fork()
        logits = self._catch_up()
        tokens, log_q = [], []
        while True:
            adjusted = sampler.adjusted(logits)
            if ahead is not None:
                adjusted = mx.where(next_mask(ahead, logits.shape[-1]), adjusted, -math.inf)
            if sampler.params.is_greedy:
                token = sampler.draw(adjusted)
            else:
                log_q.append(sampler.log_probabilities(adjusted))
                token = mx.random.categorical(log_q[-1], key=sampler.key(DRAFT_STREAM))
            token = token.astype(mx.int32)
            tokens.append(token)
            if len(tokens) == count:
                return Proposal(mx.concatenate(tokens), mx.concatenate(log_q) if log_q else None)
            # Begins now, while Python prepares the next step.
            mx.async_eval(token)
            if ahead is not None:
                # Where another token would take its place, or none follows, it does not matter what is proposed after it.
                proposed = int(np.asarray(token)[0])
                ahead = ahead if ahead.accept(proposed) == proposed and not ahead.is_complete else None
            sampler.record(token)
            logits = self._context.step(token[None], self.cache)[:, -1]

    def take(self, tokens: Sequence[int], accepted: int = 0) -> None:
        # A proposal that was fed to the draft and refused, and all after it, are in the cache and not in the sequence.
        excess = self.cache.length - (len(self._tokens) + accepted)
        if excess > 0:
            self.cache.trim(excess)
        self._tokens.extend(tokens)

    def _catch_up(self) -> mx.array:
        """Logits ``[1, V]`` after all tokens taken; the cache holds them then."""
        model, cache = self._context.model, self.cache
        missing = mx.array([self._tokens[cache.length :]], mx.int32)
        # After a round one token is missing, or two: the last one proposed was not fed. Those are the sizes worth a graph.
        if missing.size <= 2:
            return self._context.step(missing, cache)[:, -1]
        return model.head(last_hidden(model, missing, cache, self._context.chunk_tokens)[:, -1], cache.adapter)
