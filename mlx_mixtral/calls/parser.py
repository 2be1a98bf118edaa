"""From what a model writes to text and calls, as it comes: the same for every way of cutting it into pieces."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from enum import Enum, auto

from mlx_mixtral.calls.definitions import MAX_CALLS
from mlx_mixtral.calls.ids import random_id
from mlx_mixtral.calls.markup import Delimiters
from mlx_mixtral.calls.scanner import CallScanner, Found, FoundKind, Status
from mlx_mixtral.calls.turns import ToolCall

__all__ = ["ArgumentsDelta", "CallBegin", "CallEnd", "CallEvent", "CallParser", "Event", "TextDelta"]

_SPACE = " \t\n\r"


@dataclass(frozen=True)
class TextDelta:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """A call, the ``index``-th of the answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """More of a call's arguments: JSON text, as the model writes it."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """A call is whole."""

    index: int


CallEvent = CallBegin | ArgumentsDelta | CallEnd
Event = TextDelta | CallEvent


class _Mode(Enum):
    TEXT = auto()
    CALLS = auto()
    END = auto()


class _Match(Enum):
    NO = auto()
    BEGINS = auto()
    WHOLE = auto()


class CallParser:
    """Reads one answer. Text and arguments are passed on as soon as it is certain what they are.

    What looks like the beginning of calls and turns out to be none is text, a call of a tool that is not there included. White
    space around calls is no text.

    An answer that ends within a call has no such call in ``calls``, though its beginning may have been passed on: a client of a
    stream sees that no ``CallEnd`` came, and that the answer's reason is "length".

    Args:
        delimiters: of the markup; None: all is text.
        names: tools that may be called.
        max_calls: calls beyond it are passed over.
        make_id: gives each call its id.

    Attributes:
        calls: those that are whole.

    Example:
        >>> parser = CallParser(Delimiters(begin=("<call>",), is_list=False), {"now"})
        >>> parser.add('<call>{"name": "now"}')
        [CallBegin(…), ArgumentsDelta(index=0, text='{}'), CallEnd(index=0)]
    """

    def __init__(
        self,
        delimiters: Delimiters | None,
        names: Set[str] = frozenset(),
        *,
        max_calls: int = MAX_CALLS,
        make_id: Callable[[], str] = random_id,
    ) -> None:
        self._delimiters, self._names, self._max_calls, self._make_id = delimiters, names, max_calls, make_id
        self._mode = _Mode.TEXT
        self._held = ""
        self._is_at_start, self._is_behind_calls = True, False
        self._scanner = CallScanner(is_list=True, names=names)
        self._count = 0
        self._arguments: list[str] = []
        self._events: list[Event] = []
        self.calls: list[ToolCall] = []

    @property
    def barriers(self) -> frozenset[int]:
        """Control tokens that have to come with all text before them: none of it may be held back beyond them."""
        known = self._delimiters
        return frozenset() if known is None else frozenset({known.begin_id, known.end_id} - {None})  # type: ignore[arg-type]

    def add(self, text: str, token_id: int | None = None) -> list[Event]:
        """Take more of the answer.

        Args:
            token_id: the token that came with it. Where it is a control token that begins or ends calls, all of ``text`` stands
                before it.
        """
        if self._delimiters is None:
            return [TextDelta(text)] if text else []
        for char in text:
            self._add(char)
        if token_id is not None and token_id == self._delimiters.begin_id:
            self._leave_calls(was_cut=False)
            self._begin_calls("")
        elif token_id is not None and token_id == self._delimiters.end_id and self._mode is _Mode.END:
            self._end_calls()
        return self._passed_on()

    def finish(self, *, was_cut: bool) -> list[Event]:
        """The answer has ended. What was held back comes as text, unless it was to be a call that was cut.

        Args:
            was_cut: its reason is not "stop": the model would have gone on.
        """
        is_half = len(self._held.strip()) > 1
        if self._mode is _Mode.CALLS:
            self._leave_calls(was_cut=was_cut)
        elif self._mode is _Mode.TEXT and not (was_cut and is_half):
            self._say(self._held.strip(_SPACE) if self._is_behind_calls else self._held)
        self._held = ""
        return self._passed_on()

    def _add(self, char: str) -> None:
        if self._mode is _Mode.CALLS:
            self._scan(char)
        elif self._mode is _Mode.END:
            self._read_end(char)
        else:
            self._read_text(char)

    def _read_text(self, char: str) -> None:
        assert self._delimiters is not None
        self._held += char
        while self._held:
            shown = self._held.lstrip(_SPACE)
            if not shown:
                return
            space = self._held[: len(self._held) - len(shown)]
            may_begin = self._delimiters.begin and (self._delimiters.anywhere or self._is_at_start)
            fit = _fit(shown, self._delimiters.begin) if may_begin else _Match.NO
            if fit is _Match.BEGINS:
                return
            if fit is _Match.WHOLE:
                self._begin_calls(self._held)
                return
            self._say(("" if self._is_behind_calls else space) + shown[0])
            self._is_at_start = self._is_behind_calls = False
            self._held = shown[1:]

    def _begin_calls(self, marker: str) -> None:
        assert self._delimiters is not None
        self._mode, self._held = _Mode.CALLS, marker
        self._scanner = CallScanner(is_list=self._delimiters.is_list, names=self._names)

    def _scan(self, char: str) -> None:
        for found in self._scanner.add(char):
            self._take(found)
        if self._scanner.status is Status.BROKEN:
            self._leave_calls(was_cut=False)
        elif self._scanner.status is Status.DONE:
            self._mode = _Mode.END
            if self._delimiters is not None and not self._delimiters.end and self._delimiters.end_id is None:
                self._end_calls()

    def _take(self, found: Found) -> None:
        index = self._count
        if found.kind is FoundKind.NAME:
            self._held = ""
            self._arguments = []
            self._begun = CallBegin(index, self._make_id(), found.text)
            event: Event = self._begun
        elif found.kind is FoundKind.ARGUMENTS:
            self._arguments.append(found.text)
            event = ArgumentsDelta(index, found.text)
        else:
            event = CallEnd(index)
            self._count += 1
        if index >= self._max_calls:
            return
        self._events.append(event)
        if isinstance(event, CallEnd):
            self.calls.append(ToolCall(self._begun.id, self._begun.name, "".join(self._arguments)))

    def _leave_calls(self, *, was_cut: bool) -> None:
        """Back to text: what was no call is some, unless the answer was cut."""
        if self._mode is _Mode.CALLS:
            if not was_cut:
                unread = self._held + self._scanner.unread
                self._say(unread.lstrip(_SPACE) if self._count else unread)
            self._is_at_start = False
        self._mode, self._held, self._is_behind_calls = _Mode.TEXT, "", False

    def _read_end(self, char: str) -> None:
        assert self._delimiters is not None
        self._held += char
        shown = self._held.lstrip(_SPACE)
        fit = _fit(shown, self._delimiters.end) if shown else _Match.BEGINS
        if fit is _Match.BEGINS:
            return
        read = "" if fit is _Match.WHOLE else self._held
        self._end_calls()
        for each in read:
            self._add(each)

    def _end_calls(self) -> None:
        self._mode, self._held, self._is_behind_calls, self._is_at_start = _Mode.TEXT, "", True, False

    def _say(self, text: str) -> None:
        if text:
            self._events.append(TextDelta(text))

    def _passed_on(self) -> list[Event]:
        """What there is to pass on, pieces that belong together as one."""
        events, self._events = self._events, []
        joined: list[Event] = []
        for event in events:
            last = joined[-1] if joined else None
            if isinstance(event, TextDelta) and isinstance(last, TextDelta):
                joined[-1] = TextDelta(last.text + event.text)
            elif isinstance(event, ArgumentsDelta) and isinstance(last, ArgumentsDelta) and last.index == event.index:
                joined[-1] = ArgumentsDelta(event.index, last.text + event.text)
            else:
                joined.append(event)
        return joined


def _fit(text: str, pieces: tuple[str, ...]) -> _Match:
    """Whether a text is ``pieces`` one after the other, white space between any two, or the beginning of that."""
    for piece in pieces:
        text = text.lstrip(_SPACE)
        if len(text) < len(piece):
            return _Match.BEGINS if piece.startswith(text) else _Match.NO
        if not text.startswith(piece):
            return _Match.NO
        text = text[len(piece) :]
    return _Match.NO if text else _Match.WHOLE
