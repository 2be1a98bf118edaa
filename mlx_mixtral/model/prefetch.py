"""Reading the next layer's experts before its router has spoken: a guess from the state that enters this layer's experts.

A layer adds little to the residual stream, so the next router mostly chooses as it would have chosen without it. The guess is
read back together with this layer's own choice and costs no synchronisation. Whether it pays depends on the disk: a wrong
guess reads for nothing, and pushes out an expert that may be needed. ``auto`` measures both ways on the user's own tokens.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence

import mlx.core as mx

from mlx_mixtral.cache.choice import AdapterChoice
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.experts.gather import Prefetch
from mlx_mixtral.model.moe import SparseMoe, route
from mlx_mixtral.model.transformer import DecoderLayer

__all__ = ["MODES", "PrefetchControl"]

MODES = ("off", "on", "auto")
# Tokens with and without, in turn, before ``auto`` decides, and how much faster looking ahead has to be.
TRIAL_TOKENS, TRIAL_ROUNDS = 8, 4
GAIN = 0.03


class PrefetchControl:
    """Whether layers look ahead; one for a model.

    Raises:
        InvalidRequestError: an unknown mode.
    """

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise InvalidRequestError(f"prefetch {mode!r} is unknown; use one of {', '.join(MODES)}")
        self.mode = mode
        self.is_active = mode == "on"
        self._times: dict[bool, list[float]] = {False: [], True: []}
        self._last: float | None = None

    @property
    def is_decided(self) -> bool:
        """False while ``auto`` still measures."""
        return self.mode != "auto" or sum(map(len, self._times.values())) >= self._trial_tokens

    @property
    def _trial_tokens(self) -> int:
        return 2 * TRIAL_TOKENS * TRIAL_ROUNDS

    def _is_gain(self) -> bool:
        without, with_it = (statistics.median(self._times[way]) for way in (False, True))
        return with_it < (1 - GAIN) * without

    def connect(self, layers: Sequence[DecoderLayer]) -> None:
        """Let every streamed layer look at the next one, where that has slots of its own with room for a guess."""
        first = True
        for layer, following in itertools.pairwise(layers):
            moe, after = layer.moe, following.moe
            if not isinstance(moe, SparseMoe) or not isinstance(after, SparseMoe):
                continue
            moe.prefetch_with(None)
            pool = after.experts.pool
            if self.mode == "off" or moe.experts.pool is None or pool is None or pool is moe.experts.pool:
                continue
            if pool.size > after.num_experts_per_tok:
                moe.prefetch_with(_Guess(self, following, counts=first))
                first = False

    def step(self) -> None:
        """One token more, as the first layer that looks ahead sees it."""
        now = time.perf_counter()
        if self._last is not None and not self.is_decided:
            self._times[self.is_active].append(now - self._last)
            done = sum(map(len, self._times.values()))
            self.is_active = done // TRIAL_TOKENS % 2 == 1 if done < self._trial_tokens else self._is_gain()
        self._last = now


class _Guess:
    """From the state before a layer's experts to the experts of ``following``."""

    def __init__(self, control: PrefetchControl, following: DecoderLayer, *, counts: bool) -> None:
        self._control, self._following, self._counts = control, following, counts

    def __call__(self, residual: mx.array, choice: AdapterChoice) -> Prefetch | None:
        # A chunk of a prompt needs all experts anyway.
        if residual.shape[1] > 1:
            return None
        if self._counts:
            self._control.step()
        if not self._control.is_active:
            return None
        moe = self._following.moe
        assert isinstance(moe, SparseMoe)
        normed = self._following.post_attention_norm(residual, choice)
        guessed, _ = route(moe.gate(normed, choice), moe.num_experts_per_tok)
        return Prefetch(moe.experts, guessed)
