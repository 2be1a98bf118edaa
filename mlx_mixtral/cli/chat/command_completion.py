"""Completion of what begins with a slash: commands, names of settings and adapters, and files where a command takes one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

__all__ = ["CommandCompleter"]

TAKES_FILE = ("/load", "/save")
OVERWRITE = "--overwrite "


class CommandCompleter(Completer):
    """Completes the first word of a message that begins with a slash, and what comes after it.

    Args:
        commands: those there are.
        words: what the first word after some of them may be.
    """

    def __init__(self, commands: Sequence[str], words: Mapping[str, Sequence[str]]) -> None:
        self._commands = sorted(commands)
        self._words = {command: sorted(taken) for command, taken in words.items()}
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """What may stand at the cursor."""
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in document.text:
            return
        command, space, rest = text.partition(" ")
        if not space:
            yield from _words(self._commands, command)
        elif command in TAKES_FILE:
            rest = rest.lstrip()
            if command == "/save" and rest and OVERWRITE.startswith(rest):
                yield from _words([OVERWRITE.strip()], rest)
            name = rest.removeprefix(OVERWRITE) if command == "/save" else rest
            yield from self._files.get_completions(Document(name), complete_event)
        elif command in self._words and " " not in rest.lstrip():
            yield from _words(self._words[command], rest.lstrip())


def _words(words: Iterable[str], begun: str) -> Iterable[Completion]:
    for word in words:
        if word.startswith(begun):
            yield Completion(f"{word} ", start_position=-len(begun), display=word)
