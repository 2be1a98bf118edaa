"""Choosing the next token, on the device."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.generation.dry import Dry, DryHistory
from mlx_mixtral.generation.processors import LogitsProcessor, processed
from mlx_mixtral.generation.sampling_params import SamplingParams

__all__ = ["Sampled", "Sampler", "SamplingParams"]

# Of each position: one draws its token, three are speculation's, one says whether XTC applies.
KEY_STREAMS, XTC_STREAM = 5, 4


@dataclass(frozen=True)
class Sampled:
    """One sampled token, still on the device: ``token [1]``, and log-probabilities when asked for."""

    token: mx.array
    logprob: mx.array | None = None
    top_ids: mx.array | None = None
    top_logprobs: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        return [a for a in (self.token, self.logprob, self.top_ids, self.top_logprobs) if a is not None]


class Sampler:
    """Draws tokens of one sequence. Its state lives on the device: nothing here waits for a token to be computed.

    Calling it draws the next token. Speculation asks for several positions at once instead: ``adjusted``, then ``draw`` or
    ``log_probabilities``, and ``record`` when it is known which tokens stay. Position n draws with the n-th key of the seed
    either way, so both draw the same from the same logits.

    Args:
        params: what to do.
        prompt: token ids the repetition penalty counts as seen, and DRY as the beginning.
        vocab_size: size of the logits.
        xtc_special_tokens: ids that XTC leaves where they are.
        dry_breakers: sequences of ids that are DRY's breakers.
        processors: the request's own functions, called for each token with all ids before it. Speculation calls them for
            tokens that may be taken back.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab_size: int,
        *,
        xtc_special_tokens: Iterable[int] = (),
        dry_breakers: frozenset[tuple[int, ...]] = frozenset(),
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self.params, self._processors = params, tuple(processors)
        self._ids = mx.array(list(prompt), mx.int32) if processors else None
        self._dry: DryHistory | None = None
        if params.repels:
            last_n = None if params.dry_penalty_last_n < 0 else params.dry_penalty_last_n
            numbers = (params.dry_multiplier, params.dry_base, params.dry_allowed_length)
            self._dry = Dry(*numbers, last_n, dry_breakers, vocab_size).begin(prompt)
        special = np.zeros(vocab_size, bool)
        special[[token for token in xtc_special_tokens if token < vocab_size]] = True
        self._xtc_special = mx.array(special) if params.xtc_probability else None
        self._step = 0
        seed = params.seed if params.seed is not None else np.random.SeedSequence().entropy
        # Streams of threefry keys: one word from the seed, one counts the steps. The first stream draws tokens.
        self._keys = [int(word) for word in np.random.SeedSequence(_unsigned(seed)).generate_state(KEY_STREAMS)]
        self._seen: mx.array | None = None
        self._counts: mx.array | None = None
        self._bias: mx.array | None = None
        if params.repetition_penalty != 1:
            seen = np.zeros(vocab_size, bool)
            seen[list(prompt)] = True
            self._seen = mx.array(seen)
        if params.presence_penalty or params.frequency_penalty:
            self._counts = mx.zeros(vocab_size, mx.float32)
        if params.logit_bias:
            bias = np.zeros(vocab_size, np.float32)
            for token, value in params.logit_bias.items():
                if token >= vocab_size:
                    raise InvalidRequestError(f"logit_bias names token {token}; the vocabulary has {vocab_size}")
                bias[token] = value
            self._bias = mx.array(bias)

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the likeliest one, and nothing else is asked of it."""
        p = self.params
        return p.is_greedy and p.logprobs is None and not p.adjusts and not self._processors

    @property
    def reads_tokens(self) -> bool:
        """Whether tokens are waited for: functions of the request's own see each before the next is drawn."""
        return bool(self._processors)

    def __call__(self, logits: mx.array) -> Sampled:
        """Sample from ``logits [1, V]``; lazily, so that the next step can be scheduled before this one is read."""
        sampled = self.drawn(logits)
        self.record(sampled.token)
        return sampled

    def drawn(self, logits: mx.array, allowed: mx.array | None = None) -> Sampled:
        """The same without ``record``: for who decides later whether the token stays.

        ``allowed [1, V]`` boolean: other tokens cannot come, whatever penalties, bias and processors say.
        """
        adjusted = self.adjusted(logits)
        return self.chosen(logits, self.draw(adjusted if allowed is None else mx.where(allowed, adjusted, -math.inf)))

    def chosen(self, logits: mx.array, token: mx.array) -> Sampled:
        """``token [1]``, and what is asked for of the ``logits [1, V]`` it comes from."""
        chosen, top, top_logprobs = self.logprobs(logits, token)
        return Sampled(
            token,
            None if chosen is None else chosen[0],
            None if top is None else top[0],
            None if top_logprobs is None else top_logprobs[0],
        )

    def fork(self) -> Sampler:
        """Another one in the same state, for tokens that may be taken back."""
        other = copy.copy(self)
        if self._seen is not None:
            other._seen = mx.array(self._seen)
        return other

    def key(self, stream: int, ahead: int = 0) -> mx.array:
        """The key of stream 0 to ``KEY_STREAMS - 1`` for the position ``ahead`` of the next; stream 0 draws tokens."""
        return mx.array([self._keys[stream], self._step + ahead], mx.uint32)

    def adjusted(self, logits: mx.array, drafted: mx.array | None = None) -> mx.array:
        """``logits [N, V]`` of the next N positions after penalties, bias, DRY and processors, float32.

        ``drafted [N - 1]`` are the tokens at all of them but the last: each counts as generated for those after it. None
        when N is 1.
        """
        logits = self._with_seen(logits.astype(mx.float32), drafted)
        if self._dry is not None:
            logits = logits - self._repelled(self._dry, len(logits), drafted)
        if self._ids is None:
            return logits
        before = self._ids if drafted is None else mx.concatenate([self._ids, drafted.astype(mx.int32)])
        known = before.size - len(logits) + 1
        return mx.stack([processed(self._processors, before[: known + n], row) for n, row in enumerate(logits)])

    @staticmethod
    def _repelled(history: DryHistory, positions: int, drafted: mx.array | None) -> mx.array:
        """What logits ``[N, V]`` lose."""
        rows = [history.penalties()]
        for n in range(positions - 1):
            assert drafted is not None
            history = history.after(drafted[n : n + 1])
            rows.append(history.penalties())
        return mx.stack(rows)

    def _with_seen(self, logits: mx.array, drafted: mx.array | None) -> mx.array:
        """Penalties and bias."""
        if drafted is None or (self._seen is None and self._counts is None):
            return self._with_penalties(logits, self._seen, self._counts)
        times = mx.cumsum((mx.arange(logits.shape[-1]) == drafted[:, None]).astype(mx.float32), axis=0)
        before = mx.concatenate([mx.zeros((1, logits.shape[-1])), times])  # [N, V]
        seen = None if self._seen is None else self._seen | (before > 0)
        counts = None if self._counts is None else self._counts + before
        return self._with_penalties(logits, seen, counts)

    def draw(self, adjusted: mx.array) -> mx.array:
        """One token ``[N]`` of each of the next N positions, whose adjusted logits are ``[N, V]``."""
        if self.params.is_greedy:
            return mx.argmax(adjusted, axis=-1)
        kept, order = self._truncated(adjusted)
        rows = [mx.random.categorical(kept[n : n + 1], axis=-1, key=self.key(0, n)) for n in range(len(kept))]
        drawn = rows[0] if len(rows) == 1 else mx.concatenate(rows)
        return drawn if order is None else mx.take_along_axis(order, drawn[:, None], axis=-1)[:, 0]

    def log_probabilities(self, adjusted: mx.array) -> mx.array:
        """What ``draw`` draws from: log-probabilities ``[N, V]``, -inf where a token cannot come. Not for greedy."""
        kept, order = self._truncated(adjusted)
        kept = kept - mx.logsumexp(kept, axis=-1, keepdims=True)
        return kept if order is None else mx.put_along_axis(mx.zeros_like(kept), order, kept, axis=-1)

    def logprobs(self, logits: mx.array, tokens: mx.array) -> tuple[mx.array | None, mx.array | None, mx.array | None]:
        """Of ``logits [N, V]``: log-probabilities of ``tokens [N]``, the likeliest ids ``[N, n]`` and theirs, if asked for."""
        if self.params.logprobs is None:
            return None, None, None
        logits = logits.astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
        if self.params.logprobs == 0:
            return chosen, None, None
        top = mx.argsort(-logprobs, axis=-1)[:, : self.params.logprobs]
        return chosen, top, mx.take_along_axis(logprobs, top, axis=-1)

    def record(self, tokens: mx.array) -> None:
        """``tokens [N]`` are what the next N positions hold."""
        self._step += tokens.size
        if self._seen is not None:
            self._seen[tokens] = True
        if self._counts is not None:
            self._counts = self._counts.at[tokens].add(1)
        if self._ids is not None:
            self._ids = mx.concatenate([self._ids, tokens.astype(mx.int32)])
        for n in range(tokens.size if self._dry is not None else 0):
            assert self._dry is not None
            self._dry = self._dry.after(tokens[n : n + 1])

    def _with_penalties(self, logits: mx.array, seen: mx.array | None, counts: mx.array | None) -> mx.array:
        p = self.params
        if seen is not None:
            penalised = mx.where(logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty)
            logits = mx.where(seen, penalised, logits)
        if counts is not None:
            logits = logits - (p.frequency_penalty * counts + p.presence_penalty * (counts > 0))
        return logits if self._bias is None else logits + self._bias

    def _truncated(self, logits: mx.array) -> tuple[mx.array, mx.array | None]:
        """Logits ``[N, V]`` over the temperature, -inf where they are cut off; sorted when their order is given too."""
        p = self.params
        logits = logits / p.temperature
        if 0 < p.top_k < logits.shape[-1]:
            smallest_kept = mx.min(mx.topk(logits, p.top_k, axis=-1), axis=-1, keepdims=True)
            logits = mx.where(logits < smallest_kept, -math.inf, logits)
        order = None
        if p.top_p < 1:
            order = mx.argsort(-logits, axis=-1)
            logits = mx.take_along_axis(logits, order, axis=-1)
            probabilities = mx.softmax(logits, axis=-1)
            # A token stays when those before it have not reached top_p yet, so the likeliest always stays.
            before = mx.cumsum(probabilities, axis=-1) - probabilities
            logits = mx.where(before < p.top_p, logits, -math.inf)
        if p.min_p > 0:
            floor = mx.max(logits, axis=-1, keepdims=True) + math.log(p.min_p)
            logits = mx.where(logits < floor, -math.inf, logits)
        if self._xtc_special is not None:
            logits = self._without_top_choices(logits, order)
        return logits, order

    def _without_top_choices(self, logits: mx.array, order: mx.array | None) -> mx.array:
        """XTC of ``logits [N, V]`` over the temperature, each position by its own coin."""
        p, special = self.params, self._xtc_special
        assert special is not None
        probabilities = mx.softmax(logits * p.temperature, axis=-1)
        likely = mx.where(probabilities > p.xtc_threshold, probabilities, math.inf)
        left_out = probabilities > mx.min(likely, axis=-1, keepdims=True)
        left_out = left_out & ~(special if order is None else special[order])
        coins = [mx.random.uniform(shape=(1,), key=self.key(XTC_STREAM, n)) for n in range(len(logits))]
        applies = mx.stack(coins) < p.xtc_probability  # [N, 1]
        return mx.where(applies & left_out, -math.inf, logits)


def _unsigned(seed: object) -> int:
    """Negative seeds are fine with users, not with numpy: fold the sign into the lowest bit."""
    assert isinstance(seed, int)
    return 2 * seed if seed >= 0 else -2 * seed - 1
