"""DRY as its description has it, by trying every sequence of every length: the oracle of what is computed incrementally.

"Don't Repeat Yourself" (https://github.com/oobabooga/text-generation-webui/pull/5677): the longest sequence that ends the text
and stood before a token already decides what this token loses; sequences contain no breaker.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["dry_penalties"]


def dry_penalties(
    tokens: Sequence[int],
    multiplier: float,
    base: float,
    allowed_length: int,
    last_n: int = -1,
    breakers: Collection[tuple[int, ...]] = (),
) -> dict[int, float]:
    """What each token loses; those that lose nothing are left out."""
    text = tuple(tokens if last_n < 0 else tokens[len(tokens) - min(last_n, len(tokens)) :])
    size, found = len(text), dict[int, float]()
    for token in set(text):
        if (token,) in breakers:
            continue
        longest = 0
        for length in range(1, size):
            end = text[size - length :]
            if _has_breaker(text, size - length, breakers):
                break
            if any(text[at : at + length] == end and text[at + length] == token for at in range(size - length)):
                longest = length
        if longest >= allowed_length and multiplier:
            found[token] = multiplier * base ** (longest - allowed_length)
    return found


def _has_breaker(text: tuple[int, ...], start: int, breakers: Collection[tuple[int, ...]]) -> bool:
    """Whether a breaker ends at ``start`` or behind it."""
    return any(
        text[end - len(breaker) : end] == breaker
        for breaker in breakers
        for end in range(max(start + 1, len(breaker)), len(text) + 1)
    )
