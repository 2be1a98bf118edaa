"""The decode loop with speculation: rounds of proposals verified in one forward, plain steps where nothing is proposed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.constraints.base import Constraint, mask_words, masks_along
from mlx_mixtral.generation.constrained import allowed_tokens, next_mask, settled
from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.loop import first_logits, read_token
from mlx_mixtral.generation.meter import Meter
from mlx_mixtral.generation.request import Request
from mlx_mixtral.generation.sampling import Sampled
from mlx_mixtral.generation.speculation.accept import VerifiedTokens, verify
from mlx_mixtral.generation.speculation.economics import Economics
from mlx_mixtral.generation.speculation.proposal import Guess, Proposal, Proposer
from mlx_mixtral.generation.stats import SpeculationStats, Token

__all__ = ["speculate"]


def speculate(
    context: DecodeContext, request: Request, cache: KVCache, *, proposer: Proposer, economics: Economics
) -> Generator[Token, None, None]:
    """As ``decode``, with the same tokens where plain decoding draws them (greedy, lookup), else of the same distribution.

    A round of k proposals feeds the last token and all k, and keeps of the cache what was accepted. Where nothing is proposed
    the next step is scheduled before the last one is read, as in plain decoding; a round needs all tokens before it, so it
    starts when the step in flight is read. No position past the ``max_tokens``-th token is ever computed.

    The same tokens, that is, as far as the logits are the same: a forward over several tokens sums in another order than one
    over each. In float32 they differ by about 1e-6, and two tokens have to be as close as that to change places. In 16 bits
    they differ by a unit in the last place, at which two of the likeliest tokens are level now and then (bfloat16 tells 16.0
    from 16.125 and nothing between): one may be taken for the other, and a text that goes on from there is another one, as
    likely. Sampling is unchanged in the same sense: its probabilities are those of the logits computed.

    When the generator ends or is closed the cache holds the prompt and tokens that were yielded, perhaps without the last.

    Args:
        proposer: knows all tokens up to the prompt's last.
        economics: proposes no more at once than a window of the cache can take back.
    """
    meter, done, max_tokens = Meter(context.model, request, cache.length), 0, request.max_tokens
    rounds = _Rounds(context, request, cache, proposer, economics)
    request.stats.speculation = rounds.stats
    try:
        ahead = rounds.drawn(first_logits(context, request, cache))
        while True:
            guess, proposed = rounds.choose(max_tokens - done - 1)
            following = None
            # What waits for experts, or for who wants this token first, gains nothing by starting early.
            waits = context.model.is_streamed or request.sampler.reads_tokens or request.constraint is not None
            if done + 1 < max_tokens and not proposed and not waits:
                following = rounds.plain(ahead.sampled.token)
            last = rounds.read(ahead)
            rounds.take_plain(last.token_id, guess, is_first=done == 0)
            done += 1
            meter.count(done)
            yield last
            if last.end is not None:
                return
            rounds.resume()
            while following is None and done < max_tokens:
                guess, proposed = rounds.choose(max_tokens - done)
                if guess is None or not proposed:
                    following = rounds.plain(mx.array([last.token_id], mx.int32))
                    continue
                for token in rounds.run(last.token_id, guess, proposed):
                    done, last = done + 1, token
                    meter.count(done)
                    yield token
                if last.end is not None:
                    return
                rounds.resume()
            if following is None:
                return
            ahead = following
    finally:
        excess = cache.length - (len(request.tokens) + done)
        if excess > 0:
            cache.trim(excess)


@dataclass(frozen=True)
class _Drawn:
    """A token of a plain step, and the logits ``[1, V]`` it was drawn from."""

    logits: mx.array
    sampled: Sampled


class _Rounds:
    """Plain steps and rounds of one generation, and their bookkeeping."""

    def __init__(
        self, context: DecodeContext, request: Request, cache: KVCache, proposer: Proposer, economics: Economics
    ) -> None:
        self._compute, self._stream = context.step, context.stream
        self._sampler, self._constraint = request.sampler, request.constraint
        self._cache, self._proposer, self._economics = cache, proposer, economics
        self.stats = SpeculationStats()
        self._resumed = time.perf_counter()

    def resume(self) -> None:
        """The caller wants more: what it did with a token is not counted as ours."""
        self._resumed = time.perf_counter()

    def choose(self, left: int) -> tuple[Guess | None, int]:
        """What could be proposed, and how much of it, when ``left`` tokens are left to generate."""
        guess = self._proposer.guess()
        # A round gives one token more than it proposes.
        return guess, 0 if guess is None or left < 2 else self._economics.choose(guess.kind, left - 1)

    def plain(self, token: mx.array) -> _Drawn:
        """Schedule the step after ``token [1]``."""
        with mx.stream(self._stream):
            logits = self._compute(token[None], self._cache)[:, -1]
            mx.async_eval(logits)
        return self.drawn(logits)

    def drawn(self, logits: mx.array) -> _Drawn:
        """Schedule the token after ``logits [1, V]``; the mask of a constraint is made while they are computed."""
        allowed = None if self._constraint is None else next_mask(self._constraint, logits.shape[-1])
        with mx.stream(self._stream):
            sampled = self._sampler(logits) if allowed is None else self._sampler.drawn(logits, allowed)
            mx.async_eval(sampled.arrays)
        return _Drawn(logits, sampled)

    def read(self, drawn: _Drawn) -> Token:
        """The token, or the one that a constraint puts in its place."""
        if self._constraint is None:
            return read_token(drawn.sampled)
        with mx.stream(self._stream):
            return settled(self._sampler, self._constraint, drawn.logits, drawn.sampled)

    def take_plain(self, token: int, guess: Guess | None, *, is_first: bool) -> None:
        """A step's token was read; ``guess`` is what would have been proposed for it."""
        self._proposer.take([token])
        if guess is not None and guess.token is not None:
            self._economics.guessed(guess.kind, right=guess.token == token)
        if not is_first:
            self._economics.plain(time.perf_counter() - self._resumed)
            self.stats.forwards += 1
            self.stats.tokens += 1

    def run(self, last: int, guess: Guess, count: int) -> list[Token]:
        """Propose ``count`` tokens after ``last``, verify them, and return those that stay and the model's own after them."""
        with mx.stream(self._stream):
            proposal = self._proposer.propose(count, self._sampler, self._constraint)
            tokens = mx.concatenate([mx.array([last], mx.int32), proposal.tokens])
            logits = self._compute(tokens[None], self._cache, last_only=False)[0]
            verified = verify(self._sampler, logits, proposal, self._allowed(logits, proposal))
            mx.eval(verified.arrays)
            accepted = int(np.asarray(verified.accepted))
            kept = _read(verified, accepted + 1)
            if self._constraint is not None:
                kept = self._settled(self._constraint, kept, logits)
                accepted = min(accepted, len(kept) - 1)
            self._cache.trim(count - accepted)
            ids = [token.token_id for token in kept]
            self._sampler.record(mx.array(ids, mx.int32))
            self._proposer.take(ids, accepted)
        self._economics.round(guess.kind, count, accepted, time.perf_counter() - self._resumed)
        self.stats.forwards += 1
        self.stats.tokens += len(kept)
        self.stats.proposed += count
        self.stats.accepted += accepted
        return kept

    def _allowed(self, logits: mx.array, proposal: Proposal) -> mx.array | None:
        """What a constraint lets come at each of the positions of ``logits [k + 1, V]``, made while they are computed."""
        if self._constraint is None:
            return None
        mx.async_eval(logits)
        masks = np.zeros((len(logits), mask_words(logits.shape[-1])), np.int32)
        masks_along(self._constraint, np.asarray(proposal.tokens).tolist(), masks)
        return allowed_tokens(masks, logits.shape[-1])

    def _settled(self, constraint: Constraint, kept: list[Token], logits: mx.array) -> list[Token]:
        """``kept`` as far as they stay under ``constraint``, with the token that it puts in the place of the next."""
        for place, token in enumerate(kept):
            stays = constraint.accept(token.token_id)
            if stays != token.token_id:
                other = mx.array([stays], mx.int32)
                kept[place] = read_token(self._sampler.chosen(logits[place : place + 1], other))
            if constraint.is_complete:
                kept[place] = dataclasses.replace(kept[place], end="length" if constraint.was_cut else "stop")
            if stays != token.token_id or constraint.is_complete:
                return kept[: place + 1]
        return kept


def _read(verified: VerifiedTokens, count: int) -> list[Token]:
    ids = np.asarray(verified.tokens)[:count].tolist()
    logprobs: list[float | None] = [None] * count
    tops: list[tuple[tuple[int, float], ...]] = [()] * count
    if verified.logprobs is not None:
        logprobs = np.asarray(verified.logprobs)[:count].tolist()
    if verified.top_ids is not None and verified.top_logprobs is not None:
        rows = zip(np.asarray(verified.top_ids).tolist(), np.asarray(verified.top_logprobs).tolist(), strict=True)
        tops = [tuple(zip(*row, strict=True)) for row in rows][:count]
    return [Token(*fields) for fields in zip(ids, logprobs, tops, strict=True)]
