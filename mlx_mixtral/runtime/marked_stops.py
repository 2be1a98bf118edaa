"""Stop strings in which control tokens count, though they show no text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mlx_mixtral.generation.stop import StopStrings
from mlx_mixtral.tokenizer import Tokenizer

__all__ = ["MarkedStops"]

# Lone surrogates: no text that was decoded holds one.
_FIRST_STAND_IN, _LAST_STAND_IN = 0xD800, 0xDFFF


class MarkedStops:
    """Cuts a stream as ``StopStrings`` does; a control token in it matches its spelling in ``stops``.

    ``<|im_end|>`` stops at that token, ``<|im_end|>\\n`` at the line break after it, and both at the same characters written
    as text. Matching sees a stand-in for each control token that a stop string spells, and shows none of them.

    Args:
        tokenizer: whose control tokens count; None: there is text only.

    Raises:
        InvalidRequestError: a stop string is empty or not a string.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Tokenizer | None) -> None:
        StopStrings(stops)  # checked first
        spelled = {} if tokenizer is None else {
            token.content: token.token_id
            for stop in stops
            for token in tokenizer.markers.within(stop)
            if tokenizer.surface(token.token_id) is None
        }  # fmt: skip
        used = set("".join(stops))
        free = (chr(code) for code in range(_FIRST_STAND_IN, _LAST_STAND_IN + 1) if chr(code) not in used)
        stand_ins = dict(zip(spelled, free, strict=False))
        self._stand_ins = {spelled[content]: stand_in for content, stand_in in stand_ins.items()}
        self._invisible = dict.fromkeys(map(ord, self._stand_ins.values()))
        # Each string that is looked for, with the one that was given.
        self._given = {stop: stop for stop in stops}
        if stand_ins:
            pattern = re.compile("|".join(map(re.escape, sorted(stand_ins, key=len, reverse=True))))
            for stop in stops:
                self._given.setdefault(pattern.sub(lambda match: stand_ins[match.group()], stop), stop)
        self._strings = StopStrings(list(self._given))

    def is_stopped(self) -> bool:
        """Whether a stop string was complete; nothing comes after it."""
        return self._strings.is_stopped()

    @property
    def matched(self) -> str | None:
        """The stop string that was complete, as it was given."""
        return None if self._strings.matched is None else self._given[self._strings.matched]

    def add(self, text: str, token_id: int | None = None) -> str:
        """Take more text, and the token it came with; returns what can be shown now."""
        stand_in = "" if token_id is None else self._stand_ins.get(token_id, "")
        return self._visible(self._strings.add(text + stand_in))

    def finish(self) -> str:
        """The text still held back, once no more will come."""
        return self._visible(self._strings.finish())

    def _visible(self, text: str) -> str:
        return text.translate(self._invisible) if self._invisible else text
