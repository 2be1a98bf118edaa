"""What a benchmark measures: lengths of prompts, depths of context, sizes of batches, and how often each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlx_mixtral.arguments import check_integer
from mlx_mixtral.errors import ContextLengthError, InvalidRequestError

__all__ = [
    "DEFAULT_BATCHES",
    "DEFAULT_DEPTHS",
    "DEFAULT_PROMPTS",
    "Case",
    "Cases",
    "plan_cases",
    "random_prompt",
]

DEFAULT_PROMPTS = (128, 512, 2048)
DEFAULT_DEPTHS = (128, 2048)
DEFAULT_BATCHES = (1, 4, 8)
BATCH_PROMPT_TOKENS = 32
MAX_ROWS = 1024


class Case(NamedTuple):
    """One thing measured: ``prefill`` of ``size`` tokens, ``decode`` after ``size`` tokens, or a ``batch`` of ``size`` rows."""

    kind: str
    size: int


@dataclass(frozen=True)
class Cases:
    """All of a run.

    ``tokens`` are decoded in each measurement of decode and batches, beyond the first one; ``batch_prompt`` is the length of
    each row's prompt.
    """

    prompts: tuple[int, ...]
    depths: tuple[int, ...]
    batches: tuple[int, ...]
    batch_prompt: int
    tokens: int
    repeats: int

    @property
    def list(self) -> list[Case]:
        kinds = {"prefill": self.prompts, "decode": self.depths, "batch": self.batches}
        return [Case(kind, size) for kind, sizes in kinds.items() for size in sizes]

    @property
    def context(self) -> int:
        """Tokens the longest sequence of all has."""
        prompts = [length + 1 for length in self.prompts]
        depths = [depth + self.tokens + 1 for depth in self.depths]
        batches = [self.batch_prompt + self.tokens + 1] * bool(self.batches)
        return max([1, *prompts, *depths, *batches])


def plan_cases(
    limit: int,
    *,
    prompts: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    tokens: int = 32,
    repeats: int = 5,
) -> Cases:
    """Cases within a context of ``limit`` tokens. What is None is the default list, cut to what fits; an empty one is left out.

    Raises:
        InvalidRequestError: a number below 1, or too many rows.
        ContextLengthError: a length that was asked for does not fit the context.
    """
    for name, numbers in (
        ("prompt", prompts), ("depth", depths), ("batch", batches), ("tokens", [tokens]), ("repeats", [repeats]),
    ):  # fmt: skip
        for number in numbers or ():
            check_integer(name, number, 1, wanted="at least 1")
    if batches is not None and max(batches, default=1) > MAX_ROWS:
        raise InvalidRequestError(f"batch is {max(batches)}; it must be at most {MAX_ROWS} rows")
    # One token is generated after a prompt; decoding feeds one more than it is timed for.
    prompt_room, depth_room = limit - 1, limit - tokens - 1
    for name, wanted, room in (("prompt", prompts, prompt_room), ("depth", depths, depth_room)):
        if wanted is not None and max(wanted, default=0) > max(room, 1):
            more = "one token" if name == "prompt" else f"{tokens + 1} tokens"
            raise ContextLengthError(
                f"{name} {max(wanted)} is too long: the context holds {limit} tokens, and {more} must be left "
                f"for generation; give at most {max(room, 1)}"
            )
    if prompt_room < 1 or (depth_room < 1 and any(sizes is None or sizes for sizes in (depths, batches))):
        raise ContextLengthError(f"tokens is {tokens}, and the context holds {limit}; decode fewer")
    return Cases(
        _unique(_clipped(DEFAULT_PROMPTS, prompt_room) if prompts is None else prompts),
        _unique(_clipped(DEFAULT_DEPTHS, depth_room) if depths is None else depths),
        _unique(DEFAULT_BATCHES if batches is None else batches),
        min(BATCH_PROMPT_TOKENS, depth_room),
        tokens,
        repeats,
    )


def random_prompt(vocab_size: int, length: int, seed: int) -> list[int]:
    """Token ids drawn evenly: what they mean has no part in how long they take."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab_size, length)]


def _clipped(sizes: Sequence[int], room: int) -> list[int]:
    return [min(size, room) for size in sizes]


def _unique(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(sizes))
