"""The decode loop with speculation: rounds of proposals verified in one forward, plain steps where nothing is proposed."""

from __future__ import annotations

import time
from collections.abc import Generator

import mlx.core as mx
import numpy as np

from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.loop import first_token, read_token
from mlx_mixtral.generation.meter import Meter
from mlx_mixtral.generation.request import Request
from mlx_mixtral.generation.sampling import Sampled, Sampler
from mlx_mixtral.generation.speculation.accept import VerifiedTokens, verify
from mlx_mixtral.generation.speculation.economics import Economics
from mlx_mixtral.generation.speculation.proposal import Guess, Proposer
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
    rounds = _Rounds(context, request.sampler, cache, proposer, economics)
    request.stats.speculation = rounds.stats
    try:
        ahead = first_token(context, request, cache)
        while True:
            guess, proposed = rounds.choose(max_tokens - done - 1)
            following = None
            # What waits for experts, or for a function that wants this token, gains nothing by starting early.
            waits = context.model.is_streamed or request.sampler.reads_tokens
            if done + 1 < max_tokens and not proposed and not waits:
                following = rounds.plain(ahead.token)
            last = read_token(ahead)
            rounds.take_plain(last.token_id, guess, is_first=done == 0)
            done += 1
            meter.count(done)
            yield last
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
                rounds.resume()
            if following is None:
                return
            ahead = following
    finally:
        excess = cache.length - (len(request.tokens) + done)
        if excess > 0:
            cache.trim(excess)


class _Rounds:
    """Plain steps and rounds of one generation, and their bookkeeping."""

    def __init__(
        self, context: DecodeContext, sampler: Sampler, cache: KVCache, proposer: Proposer, economics: Economics
    ) -> None:
        self._compute, self._stream = context.step, context.stream
        self._sampler, self._cache, self._proposer, self._economics = sampler, cache, proposer, economics
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

    def plain(self, token: mx.array) -> Sampled:
        """Schedule the step after ``token [1]``."""
        with mx.stream(self._stream):
            sampled = self._sampler(self._compute(token[None], self._cache)[:, -1])
            mx.async_eval(sampled.arrays)
        return sampled

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
            proposal = self._proposer.propose(count, self._sampler)
            tokens = mx.concatenate([mx.array([last], mx.int32), proposal.tokens])
            logits = self._compute(tokens[None], self._cache, last_only=False)[0]
            verified = verify(self._sampler, logits, proposal)
            mx.eval(verified.arrays)
            accepted = int(np.asarray(verified.accepted))
            self._cache.trim(count - accepted)
            kept = _read(verified, accepted + 1)
            ids = [token.token_id for token in kept]
            self._sampler.record(mx.array(ids, mx.int32))
            self._proposer.take(ids, accepted)
        self._economics.round(guess.kind, count, accepted, time.perf_counter() - self._resumed)
        self.stats.forwards += 1
        self.stats.tokens += len(kept)
        self.stats.proposed += count
        self.stats.accepted += accepted
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
