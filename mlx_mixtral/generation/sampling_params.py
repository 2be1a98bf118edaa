"""How a token is to be chosen, checked when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_mixtral.arguments import check_type, checked, is_integer, is_number, plain, shown
from mlx_mixtral.errors import InvalidRequestError

__all__ = ["SamplingParams"]

MAX_LOGPROBS = 100
DRY_BREAKERS = ("\n", ":", '"', "*")


@checked()
@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy: the most likely token.

    Applied in this order: repetition, presence and frequency penalties, ``logit_bias``, DRY, ``logits_processors`` of the
    request, its ``constraint``, temperature, top-k, top-p, min-p, XTC.

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
        xtc_probability: how often the likeliest tokens are left out, of those at least ``xtc_threshold`` likely all but the
            last, so that another choice is made; 0 is never. End-of-sequence ids and line breaks stay. The probabilities
            are those without temperature of the tokens kept so far, as in mlx-lm and llama.cpp
            (https://github.com/oobabooga/text-generation-webui/pull/6335).
        xtc_threshold: see there, in [0, 0.5].
        dry_multiplier: what a token loses that would repeat ``dry_allowed_length`` tokens and itself, of prompt or output;
            0 is off. Each token more makes it ``dry_base`` times as much: see ``mlx_mixtral.generation.dry``.
        dry_base: see there, at least 1.
        dry_allowed_length: see there, at least 1.
        dry_sequence_breakers: texts past which no repetition is followed.
        dry_penalty_last_n: last tokens in which repetitions are looked for; -1 for all, 0 is off.
        seed: same seed, same prompt, same text; None draws one.
        logprobs: None for none, 0 for the chosen token's log-probability, n for the n likeliest beside it. They are the
            model's own, before penalties, bias, constraint and temperature.

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
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_sequence_breakers: Sequence[str] = DRY_BREAKERS
    dry_penalty_last_n: int = -1
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
        self._number("xtc_probability", 0, 1, "between 0 and 1")
        self._number("xtc_threshold", 0, 0.5, "between 0 and 0.5")
        self._number("dry_multiplier", 0, math.inf, "at least 0 (0 is off)")
        self._number("dry_base", 1, math.inf, "at least 1")
        self._integer("dry_allowed_length", 1, None, "at least 1")
        self._integer("dry_penalty_last_n", -1, None, "at least -1 (-1 looks at all tokens)")
        breakers = self.dry_sequence_breakers
        if not isinstance(breakers, list | tuple) or not all(isinstance(text, str) and text for text in breakers):
            raise InvalidRequestError(
                f"dry_sequence_breakers is {shown(breakers)}; it must be a list of texts, none empty"
            )
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

    @property
    def repels(self) -> bool:
        """Whether DRY has anything to do."""
        return self.dry_multiplier > 0 and self.dry_penalty_last_n != 0

    @property
    def adjusts(self) -> bool:
        """Whether logits change before the temperature."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(self.logit_bias or penalties or self.repels)

    def _number(self, name: str, low: float, high: float, allowed: str) -> None:
        value = getattr(self, name)
        if is_number(value) and _is_finite(value) and low <= value <= high:
            return
        finite = "a finite number, " if is_number(value) and not _is_finite(value) and "finite" not in allowed else ""
        raise InvalidRequestError(f"{name} is {shown(value)}; it must be {finite}{allowed}")

    def _integer(self, name: str, low: int | None, high: int | None, allowed: str) -> None:
        value = getattr(self, name)
        if value is None and name in ("seed", "logprobs"):
            return
        if not is_integer(value) or (low is not None and value < low) or (high is not None and value > high):
            raise InvalidRequestError(f"{name} is {shown(value)}; it must be {allowed}")


def _is_finite(value: float) -> bool:
    """Whether it is a number that a float can be: neither infinite nor NaN, nor an integer beyond all floats."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
