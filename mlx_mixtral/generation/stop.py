"""Stop strings over a stream of text: nothing that may turn out to be part of one is let through early."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_mixtral.errors import InvalidRequestError

__all__ = ["StopStrings"]


class StopStrings:
    """Cuts a stream at the first occurrence of any of ``stops``; the stop string itself is not part of the text.

    Of several that match, the one that starts first wins. Text is held back only while it could be the beginning of a stop
    string, so a stream without one is complete after ``finish``.

    Raises:
        InvalidRequestError: a stop string is empty or not a string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise InvalidRequestError(f"stop string {stop!r} is empty or not a string")
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was complete; of those that begin at one place the first that was given."""

    def is_stopped(self) -> bool:
        """Whether a stop string was complete; nothing comes after it."""
        return self.matched is not None

    def add(self, text: str) -> str:
        """Take more text; returns what can be shown now. ``is_stopped`` says whether a stop string is complete."""
        if self.matched is not None:
            return ""
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.matched = min(found, key=lambda pair: pair[0])
            shown, self._held = self._held[:at], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """The text still held back, once no more will come."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins ``stop``."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
