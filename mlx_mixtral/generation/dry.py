"""DRY: a token that would go on with a repetition is penalised, the more the longer what is repeated already.

https://github.com/oobabooga/text-generation-webui/pull/5677, with llama.cpp's names and its window of last tokens. At every
earlier position the sequence up to there is compared, backwards, with the sequence up to its end; where m tokens agree, the
token that followed there would make m + 1 of them. Its logit loses ``multiplier * base ** (m - allowed_length)`` from m =
``allowed_length`` on, for the longest m where there are several. No comparison goes back past a breaker, such as the end of a
line: what has to be repeated, like the names in a dialogue, is short between two of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

__all__ = ["Dry", "DryHistory"]

# Of float32, with room for the multiplier: a penalty that is larger is as good as infinite.
MAX_PENALTY = 1e38


@dataclass(frozen=True)
class Dry:
    """What is penalised how much. Its arrays are made once for a generation.

    Args:
        last_n: tokens that are looked at, prompt and output together; None for all.
        breakers: sequences of ids; where one is complete, comparisons end.
    """

    multiplier: float
    base: float
    allowed_length: int
    last_n: int | None
    breakers: frozenset[tuple[int, ...]]
    vocab_size: int

    def begin(self, prompt: Sequence[int]) -> DryHistory:
        """The state after ``prompt``."""
        tokens = list(prompt)[-self.last_n :] if self.last_n is not None else list(prompt)
        free = self._since_breaker(tokens)
        lengths = np.minimum(_agreements(tokens), free)
        single = np.zeros(self.vocab_size, bool)
        single[[ids[0] for ids in self.breakers if len(ids) == 1]] = True
        longer = sorted(ids for ids in self.breakers if len(ids) > 1)
        width = max(map(len, longer), default=0)
        padded = np.array([[-1] * (width - len(ids)) + list(ids) for ids in longer], np.int32).reshape(
            len(longer), width
        )
        return DryHistory(
            self, mx.array(tokens, mx.int32), mx.array(lengths, mx.int32), mx.array(single), mx.array(padded)
        )

    def _since_breaker(self, tokens: Sequence[int]) -> int:
        """How many of the last tokens come after the last breaker."""
        longest = max(map(len, self.breakers), default=0)
        for end in range(len(tokens), 0, -1):
            if any(tuple(tokens[end - n : end]) in self.breakers for n in range(1, min(longest, end) + 1)):
                return len(tokens) - end
        return len(tokens)


@dataclass(frozen=True)
class DryHistory:
    """Tokens so far and how they repeat; a new one is made for each token, on the device: no token is waited for.

    Args:
        tokens: ``[n]`` int32, the last ones.
        lengths: ``[n]`` int32, of each position: how many tokens up to it are the last tokens of all; 0 at the end itself.
        single: ``[V]``, whether an id is a breaker.
        longer: ``[S, K]`` int32, breakers of several ids, aligned at their ends, -1 before them.
    """

    dry: Dry
    tokens: mx.array
    lengths: mx.array
    single: mx.array
    longer: mx.array

    def after(self, token: mx.array) -> DryHistory:
        """With ``token [1]`` behind: what agreed up to the position before, and now agrees too, is longer by one."""
        token, zero = token.astype(mx.int32), mx.zeros(1, mx.int32)
        agreed = mx.concatenate([zero, self.lengths[:-1]]) if self.lengths.size > 1 else mx.zeros_like(self.lengths)
        tokens = mx.concatenate([self.tokens, token])
        goes_on = (self.tokens == token) & ~self._is_broken(tokens, token)
        lengths = mx.concatenate([mx.where(goes_on, agreed + 1, 0), zero])
        if self.dry.last_n is not None:
            tokens, lengths = tokens[-self.dry.last_n :], lengths[-self.dry.last_n :]
        return DryHistory(self.dry, tokens, lengths, self.single, self.longer)

    def penalties(self) -> mx.array:
        """What each logit loses, ``[V]`` float32."""
        dry, none = self.dry, mx.zeros(self.dry.vocab_size, mx.float32)
        if self.tokens.size < 2:
            return none
        # Beyond the window nothing is compared.
        agreed = mx.minimum(self.lengths[:-1], mx.arange(1, self.tokens.size))
        most = math.log(MAX_PENALTY) / math.log(dry.base) if dry.base > 1 else 0.0
        exponents = mx.minimum((agreed - dry.allowed_length).astype(mx.float32), most)
        penalties = mx.minimum(dry.multiplier * mx.power(mx.array(dry.base, mx.float32), exponents), MAX_PENALTY)
        penalties = none.at[self.tokens[1:]].maximum(mx.where(agreed >= dry.allowed_length, penalties, 0.0))
        return mx.where(self.single, 0.0, penalties)

    def _is_broken(self, tokens: mx.array, token: mx.array) -> mx.array:
        """Whether a breaker ends with the last of ``tokens``."""
        broken = self.single[token]
        count, width = self.longer.shape
        if not count:
            return broken
        missing = max(0, width - tokens.size)
        last = mx.concatenate([mx.full((missing,), -2, mx.int32), tokens[max(0, tokens.size - width) :]])
        return broken | mx.any(mx.all((self.longer < 0) | (self.longer == last), axis=1))


def _agreements(tokens: Sequence[int]) -> npt.NDArray[np.int32]:
    """Of each position: how many tokens up to it are the last tokens of all, 0 at the end itself; in linear time.

    The Z-function of the reversed sequence (Gusfield, Algorithms on Strings, Trees and Sequences, section 1.4).
    """
    reverse, size = list(tokens)[::-1], len(tokens)
    found = np.zeros(size, np.int32)
    left = right = 0
    for at in range(1, size):
        length = min(right - at, int(found[at - left])) if at < right else 0
        while at + length < size and reverse[length] == reverse[at + length]:
            length += 1
        found[at] = length
        if at + length > right:
            left, right = at, at + length
    return found[::-1].copy()
