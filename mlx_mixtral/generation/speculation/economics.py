"""Whether to speculate now, and how far: what verifying k tokens costs against what it brings.

If each proposed token is right with probability a, given that those before it are, a round of k proposals gives

    tokens(a, k) = 1 + a + a^2 + … + a^k

tokens, the model's own at the end included. With ``seconds(k)`` of such a round and ``seconds(0)`` of a plain step, the best k
has the largest tokens(a, k) / seconds(k); 0 means not to speculate.

a is measured: a moving average for each kind of guess. Seconds are measured too, as far as there are measurements: the median
of the last rounds of that k. Others are what the cost model predicts, times the ratio measured / predicted of the nearest k
that was measured.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable

__all__ = ["Acceptance", "Economics", "expected_tokens"]

# Rows of a forward that are tried: few enough that each size is compiled and measured soon. 16 is where 8x7B's experts are
# grouped.
ROWS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MEMORY = 0.95
KEPT_TIMES = 5
RETRY_TOKENS, MAX_RETRY_TOKENS = 64, 1024
TRIAL_ROUNDS = 3
# What a plain step must be beaten by: below it the difference is noise.
MARGIN = 1.03


def expected_tokens(acceptance: float, proposed: int) -> float:
    """Tokens a round of ``proposed`` gives on average."""
    return float((1.0 - acceptance ** (proposed + 1)) / (1.0 - acceptance)) if acceptance < 1.0 else proposed + 1.0


class Acceptance:
    """Probability that a proposed token is right: the mean of what was seen, of which each new trial makes the rest fade.

    Args:
        expected: the prior, with the weight of two trials.
    """

    def __init__(self, expected: float) -> None:
        self._expected = expected
        self.forget()

    def forget(self) -> None:
        self._right = self._trials = 0.0

    def saw(self, right: int, wrong: int) -> None:
        for outcome in (1.0,) * right + (0.0,) * wrong:
            self._right = MEMORY * self._right + outcome
            self._trials = MEMORY * self._trials + 1.0

    @property
    def rate(self) -> float:
        return (self._right + 2.0 * self._expected) / (self._trials + 2.0)


class Economics:
    """Decides how many tokens to propose, from what rounds and plain steps did so far.

    Where nothing is expected to pay, the first few rounds propose one token, which costs little and tells how good guesses
    are. If that stays so it is tried again after ``RETRY_TOKENS`` plain tokens, later after twice as many and so on, what was
    measured being forgotten: the text or the machine may have changed.

    Args:
        max_tokens: largest k.
        predicted_s: the cost model's seconds of a round of k, and of a plain step for 0.
        expected_acceptance: before anything was measured.
        uses_clock: measured seconds count. Without them decisions depend on the text alone: rejection sampling gives other
            text, of the same distribution, where other tokens are proposed, and a seed is to give the same text again.
        is_adaptive: False proposes as many tokens as it may, whatever it costs.
    """

    def __init__(
        self,
        max_tokens: int,
        predicted_s: Callable[[int], float],
        *,
        expected_acceptance: float,
        uses_clock: bool = True,
        is_adaptive: bool = True,
    ) -> None:
        self._is_adaptive = is_adaptive
        self._choices = [*(rows - 1 for rows in ROWS if rows - 1 < max_tokens), max_tokens]
        self._predicted_s = predicted_s
        self._expected, self._uses_clock = expected_acceptance, uses_clock
        self._acceptance: dict[int, Acceptance] = {}
        self._times: dict[int, deque[float]] = {}
        self._trials = TRIAL_ROUNDS
        self._idle, self._retry_tokens = 0, RETRY_TOKENS

    def choose(self, kind: int, limit: int) -> int:
        """How many tokens to propose, at most ``limit``; asking changes nothing."""
        choices = [k for k in self._choices if k <= limit]
        if not self._is_adaptive:
            return min(limit, self._choices[-1])
        # What a plain step takes has to be known first.
        if not choices or (self._uses_clock and not self._times.get(0)):
            return 0
        acceptance = self.acceptance(kind)
        rates = {k: expected_tokens(acceptance, k) / self.seconds(k) for k in choices}
        best = max(choices, key=rates.__getitem__)
        if rates[best] * self.seconds(0) > MARGIN:
            return best
        return choices[0] if self._trials else 0

    def acceptance(self, kind: int) -> float:
        return self._of(kind).rate

    def seconds(self, k: int) -> float:
        """Of a round of ``k`` proposals; of a plain step for 0."""
        if self._times.get(k):
            return statistics.median(self._times[k])
        measured = [(abs(other - k), other) for other, times in self._times.items() if times]
        if not measured:
            return self._predicted_s(k)
        nearest = min(measured)[1]
        return self._predicted_s(k) * statistics.median(self._times[nearest]) / self._predicted_s(nearest)

    def plain(self, seconds: float) -> None:
        """A token was generated without a proposal."""
        self._timed(0, seconds)
        self._idle += 1
        if self._idle >= self._retry_tokens:
            self._retry_tokens = min(2 * self._retry_tokens, MAX_RETRY_TOKENS)
            self._idle, self._trials = 0, TRIAL_ROUNDS
            self._times = {k: times for k, times in self._times.items() if k == 0}
            for acceptance in self._acceptance.values():
                acceptance.forget()

    def guessed(self, kind: int, *, right: bool) -> None:
        """What would have been proposed was compared with the token that came."""
        self._of(kind).saw(int(right), int(not right))

    def round(self, kind: int, proposed: int, accepted: int, seconds: float) -> None:
        """``proposed`` tokens were verified, of which ``accepted`` stay."""
        self._of(kind).saw(accepted, int(accepted < proposed))
        self._timed(proposed, seconds)
        if self._trials:
            self._trials -= 1
        else:
            self._retry_tokens = RETRY_TOKENS
        self._idle = 0

    def _timed(self, k: int, seconds: float) -> None:
        if not self._uses_clock:
            return
        if k in self._times:
            self._times[k].append(seconds)
        else:
            # The first of its size may have compiled kernels: it is not counted.
            self._times[k] = deque(maxlen=KEPT_TIMES)

    def _of(self, kind: int) -> Acceptance:
        if kind not in self._acceptance:
            self._acceptance[kind] = Acceptance(self._expected)
        return self._acceptance[kind]
