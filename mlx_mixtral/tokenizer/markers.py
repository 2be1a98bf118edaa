"""Markers: the strings that stand for one id (control pieces and added tokens), found in trusted text only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["NAMED_FORM", "AddedToken", "Markers"]

NAMED_FORM = re.compile(r"[<\[].+[>\]]")
"""A piece that a file only names (as `pad_token`, say) is a marker if it looks like one; a word stays a word."""


@dataclass(frozen=True)
class AddedToken:
    """A token that lies outside the tokenizer's own model, or changes how one of its pieces is treated.

    Args:
        content: The string that stands for it.
        token_id: Its id.
        special: True when it is never shown in decoded text.
        lstrip, rstrip: Whether finding it in a text swallows the whitespace before or after it.
    """

    content: str
    token_id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


class Markers:
    """Finds markers in a text: leftmost first, the longest where several start at one place."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self.by_content: dict[str, AddedToken] = {token.content: token for token in tokens if token.content}
        longest_first = sorted(self.by_content, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self.alphabet: frozenset[str] = frozenset().union(*self.by_content)

    def split(self, text: str) -> Iterator[str | AddedToken]:
        """Cut `text` at its markers; the strings between them, none empty, are plain text."""
        start, swallow = 0, False
        for match in self._pattern.finditer(text) if self._pattern else ():
            token = self.by_content[match.group()]
            plain = text[start : match.start()]
            plain = plain.lstrip() if swallow else plain
            plain = plain.rstrip() if token.lstrip else plain
            if plain:
                yield plain
            yield token
            start, swallow = match.end(), token.rstrip
        tail = text[start:].lstrip() if swallow else text[start:]
        if tail:
            yield tail

    def within(self, text: str) -> list[AddedToken]:
        """The markers that a text spells anywhere, overlapping ones too."""
        return [token for content, token in self.by_content.items() if content in text]

    def sequence(self, text: str) -> list[str]:
        """The markers of a text, in order."""
        return [part.content for part in self.split(text) if isinstance(part, AddedToken)]
