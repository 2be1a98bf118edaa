"""Passkey retrieval: a number is hidden in filler text and asked for at its end (arXiv 2305.16300; Mixtral's figure 4).

Everything is made from a seed: the same lengths, depths and seed give the same prompts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from mlx_mixtral.arguments import check_callbacks, check_integer, check_type, checked, is_number, shown
from mlx_mixtral.errors import ContextLengthError, InvalidRequestError
from mlx_mixtral.evaluation.forward import context_limit
from mlx_mixtral.evaluation.journal import EvaluationJournal
from mlx_mixtral.runtime.mixtral import Mixtral
from mlx_mixtral.tokenizer import Tokenizer

__all__ = [
    "DEFAULT_DEPTHS",
    "PasskeyPrompt",
    "PasskeyResult",
    "check_passkey",
    "default_lengths",
    "make_prompt",
    "passkey",
    "run_passkey",
]

DEFAULT_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ANSWER_TOKENS = 16
PART = "passkey"

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
FILLER = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.",
    "The river is long.", "The house is old.", "Birds sing in the morning.",
)  # fmt: skip
KEY = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class PasskeyPrompt:
    """A text that holds ``key``; ``token_ids`` with BOS. ``sentences`` of filler, ``before`` of them in front of the key."""

    text: str
    key: str
    token_ids: tuple[int, ...]
    sentences: int
    before: int

    def is_answered_by(self, answer: str) -> bool:
        """Whether the first number of ``answer`` is the key."""
        found = re.search(r"\d+", answer)
        return found is not None and found.group() == self.key


@dataclass(frozen=True)
class PasskeyResult:
    """``found[i][j]``: share of trials in which the key at ``depths[j]`` of ``lengths[i]`` tokens was given back."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    found: tuple[tuple[float, ...], ...]
    trials: int
    seed: int

    @property
    def accuracy(self) -> float:
        """Over all cells."""
        return sum(map(sum, self.found)) / (len(self.lengths) * len(self.depths))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"accuracy": self.accuracy}


def make_prompt(tokenizer: Tokenizer, length: int, depth: float, seed: int) -> PasskeyPrompt:
    """As much filler as fits with the key and its answer in ``length`` tokens, the key at ``depth`` of it (0 start, 1 end).

    Raises:
        InvalidRequestError: ``length`` has no room for any filler.
    """
    random = Random(seed)
    key = str(random.randrange(10_000, 100_000))
    room = length - ANSWER_TOKENS
    sentences: list[str] = []

    def text(count: int) -> str:
        while len(sentences) < count:
            sentences.append(random.choice(FILLER))
        before = round(depth * count)
        parts = (" ".join(sentences[:before]), KEY.format(key=key), " ".join(sentences[before:count]), QUESTION)
        return TASK + "".join(parts)

    def fits(count: int) -> bool:
        return len(tokenizer.encode(text(count))) <= room

    if not fits(1):
        least = len(tokenizer.encode(text(1))) + ANSWER_TOKENS
        raise InvalidRequestError(
            f"a passkey prompt of {length} tokens has no room for filler; at least {least} are needed"
        )
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return PasskeyPrompt(text(low), key, tuple(tokenizer.encode(text(low))), low, round(depth * low))


def default_lengths(limit: int) -> tuple[int, ...]:
    """Lengths that double up to ``limit``, six at most."""
    return tuple(limit // 2**step for step in reversed(range(6)) if limit // 2**step >= 256) or (limit,)


def run_passkey(
    answer: Callable[[PasskeyPrompt], str],
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    depths: Sequence[float] = DEFAULT_DEPTHS,
    *,
    limit: int,
    trials: int = 1,
    seed: int = 0,
    journal: EvaluationJournal | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PasskeyResult:
    """Ask ``answer`` for the key of every prompt: ``trials`` for each length and depth, each with another key and filler.

    Args:
        limit: tokens of context.
        journal: where answers are kept, and found again.
        progress: called with prompts done and prompts in all.

    Raises:
        InvalidRequestError, ContextLengthError: an argument out of range, before the first prompt.
    """
    check_passkey(tokenizer, lengths, depths, trials, seed, limit)
    prompts = [(length, depth, trial) for length in lengths for depth in depths for trial in range(trials)]
    kept, hits = journal or EvaluationJournal(), []
    for index, (length, depth, trial) in enumerate(prompts):
        if progress is not None:
            progress(index, len(prompts))
        if (entry := kept.get(PART, index)) is None:
            # A string seeds the same on every machine.
            prompt = make_prompt(tokenizer, length, depth, Random(f"{seed} {length} {depth} {trial}").randrange(2**32))
            entry = {"found": prompt.is_answered_by(answer(prompt))}
            kept.add(PART, [(index, entry)])
        hits.append(bool(entry.get("found")))
    if progress is not None:
        progress(len(prompts), len(prompts))
    cells = [sum(hits[at : at + trials]) / trials for at in range(0, len(hits), trials)]
    rows = [tuple(cells[at : at + len(depths)]) for at in range(0, len(cells), len(depths))]
    return PasskeyResult(tuple(lengths), tuple(depths), tuple(rows), trials, seed)


@checked()
def passkey(
    model: Mixtral,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEFAULT_DEPTHS,
    *,
    trials: int = 1,
    seed: int = 0,
    journal: EvaluationJournal | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PasskeyResult:
    """Passkey retrieval of ``model``, answers chosen greedily.

    Args:
        lengths: tokens of prompt and answer together; doubling up to the context when None.
        depths: where the key stands, from 0 (start) to 1 (end).

    Raises:
        InvalidRequestError, ContextLengthError: an argument out of range.
        TokenizerError: a checkpoint without a tokenizer.
    """
    check_type("model", model, Mixtral, "a model that load() gave")
    check_callbacks(progress=progress)

    def answer(prompt: PasskeyPrompt) -> str:
        return model.generate(prompt.token_ids, max_tokens=ANSWER_TOKENS).text

    limit = context_limit(model)
    lengths = default_lengths(limit) if lengths is None else lengths
    return run_passkey(
        answer,
        model.tokenizer,
        lengths,
        depths,
        limit=limit,
        trials=trials,
        seed=seed,
        journal=journal,
        progress=progress,
    )


def check_passkey(
    tokenizer: Tokenizer, lengths: Sequence[int], depths: Sequence[float], trials: int, seed: int, limit: int
) -> None:
    """Raise InvalidRequestError or ContextLengthError unless ``run_passkey`` can do what it is asked for."""
    for name, values in (("lengths", lengths), ("depths", depths)):
        check_type(name, values, (list, tuple), "a list of numbers")
        if not values:
            raise InvalidRequestError(f"{name} is empty; give at least one")
    for length in lengths:
        check_integer("a length", length, 1, wanted="a number of tokens, at least 1")
        if length > limit:
            raise ContextLengthError(
                f"a passkey prompt of {shown(length)} tokens was asked for; the model's context holds {limit}"
            )
    for depth in depths:
        if not is_number(depth) or not 0 <= depth <= 1:
            raise InvalidRequestError(f"a depth is {depth!r}; it must be from 0 (start) to 1 (end)")
    check_integer("trials", trials, 1)
    check_type("seed", seed, int, "an integer")
    make_prompt(tokenizer, min(lengths), 0.5, seed)
