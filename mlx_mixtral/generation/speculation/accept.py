"""Which proposed tokens stay, so that the text has the distribution it has without them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

from mlx_mixtral.generation.sampling import Sampler
from mlx_mixtral.generation.speculation.proposal import Proposal

__all__ = ["DRAFT_STREAM", "VerifiedTokens", "verify"]

# Streams of the sampler's keys, beside 0 which draws tokens. No two draws at one position may share one.
DRAFT_STREAM, ACCEPT_STREAM, RESIDUAL_STREAM = 1, 2, 3


@dataclass(frozen=True)
class VerifiedTokens:
    """Still on the device: of ``tokens [k + 1]`` the first ``accepted []`` were proposed, one more is the model's own, and
    the rest means nothing. Log-probabilities when asked for, a row a token."""

    tokens: mx.array
    accepted: mx.array
    logprobs: mx.array | None = None
    top_ids: mx.array | None = None
    top_logprobs: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        held = (self.tokens, self.accepted, self.logprobs, self.top_ids, self.top_logprobs)
        return [array for array in held if array is not None]


def verify(sampler: Sampler, logits: mx.array, proposal: Proposal, allowed: mx.array | None = None) -> VerifiedTokens:
    """Judge a proposal of k tokens by the logits ``[k + 1, V]`` of the token before them and of each of them.

    Let p be the distribution at a position (after penalties, temperature and truncation, the tokens proposed before it taken
    as generated), and q the one that the proposed token x was drawn from. Speculative sampling (arXiv 2211.17192, 2302.01318)
    accepts x with probability min(1, p(x) / q(x)) and otherwise, for good, draws from norm(max(p - q, 0)). The token then has
    distribution p: q(y) min(1, p(y) / q(y)) = min(p(y), q(y)) from the first way, max(p(y) - q(y), 0) from the second.

    Where nothing was drawn (lookup, a greedy draft) q is 1 at x, x stays with probability p(x), and the residual is p without
    x. To draw y from p and to accept x if y = x is the same, and uses the very draw that plain decoding makes: the text is
    then not only as likely as without speculation, it is the same text for the same seed. Greedy is a case of it.

    ``allowed [k + 1, V]`` boolean is what a constraint lets come at each position: p is 0 elsewhere.
    """
    adjusted = sampler.adjusted(logits, proposal.tokens)
    if allowed is not None:
        adjusted = mx.where(allowed, adjusted, -math.inf)
    if proposal.log_probabilities is None or sampler.params.is_greedy:
        tokens = sampler.draw(adjusted)
        stays = tokens[:-1] == proposal.tokens
    else:
        tokens, stays = _judged(
            sampler, sampler.log_probabilities(adjusted), proposal.tokens, proposal.log_probabilities
        )
    accepted = mx.sum(mx.cumprod(stays.astype(mx.int32)))
    return VerifiedTokens(tokens, accepted, *sampler.logprobs(logits, tokens))


def _judged(sampler: Sampler, log_p: mx.array, proposed: mx.array, log_q: mx.array) -> tuple[mx.array, mx.array]:
    """Tokens ``[k + 1]`` to go on with, whether each is the proposed one ``[k]`` or a draw from what is left without it."""
    k = proposed.size
    p, q = mx.exp(log_p), mx.exp(log_q)
    p_x, q_x = (mx.take_along_axis(of, proposed[:, None], axis=-1)[:, 0] for of in (p[:k], q))
    uniform = mx.concatenate([mx.random.uniform(shape=(1,), key=sampler.key(ACCEPT_STREAM, n)) for n in range(k)])
    stays = uniform * q_x < p_x
    left = mx.maximum(p[:k] - q, 0)
    # Nothing is left where p = q, and x is always accepted. Rounding may see it otherwise once in 2^24.
    left = mx.where(mx.sum(left, axis=-1, keepdims=True) > 0, left, p[:k])
    following = mx.concatenate([mx.log(left), log_p[k:]])
    drawn = [
        mx.random.categorical(following[n : n + 1], key=sampler.key(RESIDUAL_STREAM, n)).astype(mx.int32)
        for n in range(k + 1)
    ]
    tokens = mx.concatenate(drawn)
    return mx.concatenate([mx.where(stays, proposed, tokens[:k]), tokens[k:]]), stays
