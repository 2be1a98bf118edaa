"""Choosing the next token: what may be asked for, checked when it is asked, and its computation on the device."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_mixtral.arguments import check_type, checked, is_integer, is_number, plain, shown
from mlx_mixtral.errors import InvalidRequestError

__all__ = ["Sampled", "Sampler", "SamplingParams"]

MAX_LOGPROBS = 100
KEY_STREAMS = 4


@checked()
@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy: the most likely token.

    Applied in this order: repetition, presence and frequency penalties, ``logit_bias``, temperature, top-k, top-p, min-p.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_p: keep the likeliest tokens that together reach this probability, in (0, 1].
        top_k: keep the k likeliest tokens; 0 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest, in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output
            (arXiv 1909.05858); 1 is off.
        presence_penalty: subtracted from logits of tokens generated so far.
        frequency_penalty: subtracted once for each time a token was generated.
        logit_bias: added to the logits of token ids.
        seed: same seed, same prompt, same text; None draws one.
        logprobs: None for none, 0 for the chosen token's log-probability, n for the n likeliest beside it. They are the
            model's own, before penalties, bias and temperature.

    Raises:
        InvalidRequestError: a value out of its range.

    Example:
        >>> SamplingParams(temperature=0.7, top_p=0.95, seed=1)
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._number("temperature", 0, math.inf, "at least 0 (0 is greedy)")
        self._number("top_p", 0, 1, "above 0 and at most 1")
        if self.top_p == 0:
            raise InvalidRequestError("top_p is 0; it must be above 0 and at most 1")
        self._number("min_p", 0, 1, "between 0 and 1")
        self._number("repetition_penalty", 0, math.inf, "above 0 (1 is off)")
        if self.repetition_penalty == 0:
            raise InvalidRequestError("repetition_penalty is 0; it must be above 0 (1 is off)")
        self._number("presence_penalty", -math.inf, math.inf, "a finite number")
        self._number("frequency_penalty", -math.inf, math.inf, "a finite number")
        self._integer("top_k", 0, None, "at least 0 (0 keeps all)")
        self._integer("seed", None, None, "an integer")
        self._integer("logprobs", 0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")
        check_type("logit_bias", self.logit_bias, (Mapping, type(None)), "a mapping of token ids to numbers, or None")
        pairs = [(plain(token), plain(bias)) for token, bias in (self.logit_bias or {}).items()]
        for token, bias in pairs:
            is_bias = is_number(bias) and (bias == -math.inf or _is_finite(bias))
            if not is_integer(token) or token < 0 or not is_bias:
                raise InvalidRequestError(
                    f"logit_bias holds {shown(token)}: {shown(bias)}; it maps token ids to numbers below infinity"
                )
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", dict(pairs))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def _number(self, name: str, low: float, high: float, allowed: str) -> None:
        value = getattr(self, name)
        if is_number(value) and _is_finite(value) and low <= value <= high:
            return
        finite = "a finite number, " if is_number(value) and not _is_finite(value) and "finite" not in allowed else ""
        raise InvalidRequestError(f"{name} is {shown(value)}; it must be {finite}{allowed}")

    def _integer(self, name: str, low: int | None, high: int | None, allowed: str) -> None:
        value = getattr(self, name)
        if value is None and name != "top_k":
            return
        if not is_integer(value) or (low is not None and value < low) or (high is not None and value > high):
            raise InvalidRequestError(f"{name} is {shown(value)}; it must be {allowed}")


def _is_finite(value: float) -> bool:
    """Whether it is a number that a float can be: neither infinite nor NaN, nor an integer beyond all floats."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


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
        prompt: token ids the repetition penalty counts as seen.
        vocab_size: size of the logits.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
        self.params = params
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

    def __call__(self, logits: mx.array) -> Sampled:
        """Sample from ``logits [1, V]``; lazily, so that the next step can be scheduled before this one is read."""
        token = self.draw(self.adjusted(logits))
        self.record(token)
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
        """``logits [N, V]`` of the next N positions after penalties and bias, float32.

        ``drafted [N - 1]`` are the tokens at all of them but the last: each counts as generated for those after it. None
        when N is 1.
        """
        logits = logits.astype(mx.float32)
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
        return logits, order


def _unsigned(seed: object) -> int:
    """Negative seeds are fine with users, not with numpy: fold the sign into the lowest bit."""
    assert isinstance(seed, int)
    return 2 * seed if seed >= 0 else -2 * seed - 1
