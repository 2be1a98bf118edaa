"""Messages as they are typed: edited, pasted whole, completed, and remembered from one chat to the next."""

from __future__ import annotations

import contextlib
import os
import sys
import termios
from collections.abc import Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.color_depth import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from mlx_mixtral.cli.chat.history import FileHistory
from mlx_mixtral.cli.chat.line_input import CONTINUED, PROMPT, decoded, is_open, unfenced
from mlx_mixtral.cli.console import note, one_line
from mlx_mixtral.cli.terminal_modes import keeping_output

__all__ = ["TerminalReader", "can_edit"]

PASTE_ON, PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"


def can_edit() -> bool:
    """Whether somebody types at a terminal on which a cursor can be moved."""
    shown = sys.stdout.isatty() or sys.stderr.isatty()
    return sys.stdin.isatty() and shown and os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")


class TerminalReader:
    """Reads one message at a time from a terminal.

    Enter sends; a backslash before it, Alt-Enter, and Enter between triple quotes begin another line. A text that is pasted is
    inserted as it is, whatever its lines are. Nothing is drawn in colour. Within ``session`` what is typed ahead while an
    answer is written is the next message's.
    """

    is_terminal = True

    def __init__(self, completer: Completer, history: FileHistory | None) -> None:
        self._history = history
        self._shown = sys.stdout if sys.stdout.isatty() else sys.stderr
        output = Vt100_Output.from_pty(
            self._shown, term=os.environ.get("TERM"), default_color_depth=ColorDepth.DEPTH_1_BIT
        )
        # Where the cursor is need not be asked: no answer of the terminal can then land in a message.
        output.enable_cpr = False
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=CONTINUED,
            completer=completer,
            complete_style=CompleteStyle.READLINE_LIKE,
            history=history or InMemoryHistory(),
            key_bindings=_bindings(),
            enable_suspend=True,
            input=Vt100Input(sys.stdin),
            output=output,
        )
        self._tell()

    def read(self) -> str | None:
        """The next message, None at the end of input.

        Raises:
            BadInputError: it is not text in the terminal's encoding or UTF-8.
            KeyboardInterrupt: Ctrl-C was pressed; what was typed is given up.
        """
        try:
            text = self._session.prompt()
        except EOFError:
            return None
        self._tell()
        try:
            text.encode()
        except UnicodeEncodeError:
            # Bytes that the locale has no characters for.
            text = decoded(text.encode(sys.stdin.encoding, "surrogateescape"))
        return unfenced(text)

    def _tell(self) -> None:
        if self._history is not None and (problem := self._history.new_problem()):
            note(f"note: what you type is not remembered after this chat: {one_line(problem)}")

    def confirm(self, question: str) -> bool:
        """The answer to a question; no for Ctrl-C and Ctrl-D."""
        asking: PromptSession[str] = PromptSession(input=self._session.input, output=self._session.output)
        try:
            return asking.prompt(f"{one_line(question)} [y/N]: ").strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            return False

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Between messages what is typed is not shown and waits, past a Ctrl-C too, which is a signal as ever."""
        with keeping_output(sys.stdin, without=termios.ECHO | termios.ICANON):
            try:
                yield
            finally:
                print(PASTE_OFF, end="", file=self._shown, flush=True)

    def wait(self) -> None:
        """Before an answer: a text pasted from now on has marks around it, and stays one."""
        print(PASTE_ON, end="", file=self._shown, flush=True)


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter", filter=has_focus(DEFAULT_BUFFER))
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        before = buffer.document.text_before_cursor
        if before.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _go_on(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
