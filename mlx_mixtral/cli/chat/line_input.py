"""Messages from a pipe or a terminal that can do no more than lines, and the rules for messages of several lines."""

from __future__ import annotations

import contextlib
import signal
import sys
import termios
from collections.abc import Iterator

from mlx_mixtral.cli.console import one_line
from mlx_mixtral.cli.terminal_modes import keeping_output
from mlx_mixtral.errors import InvalidRequestError

__all__ = [
    "CONTINUED",
    "FENCE",
    "PROMPT",
    "BadInputError",
    "LineReader",
    "decoded",
    "is_open",
    "unfenced",
]

PROMPT, CONTINUED = ">>> ", "... "
FENCE = '"""'


class BadInputError(InvalidRequestError):
    """A line that is no text; the session goes on."""


def is_open(text: str) -> bool:
    """Whether a message goes on in the next line: it begins with triple quotes that are not closed yet."""
    return text.lstrip().startswith(FENCE) and text.count(FENCE) == 1


def unfenced(text: str) -> str:
    """What stands between triple quotes that a message begins and ends with; any other message as it is."""
    bare = text.strip()
    if bare.count(FENCE) == 2 and bare.startswith(FENCE) and bare.endswith(FENCE):
        return bare.removeprefix(FENCE).removesuffix(FENCE).strip("\n")
    return text


class LineReader:
    """Reads one message at a time from standard input, line by line.

    A line that ends with a backslash goes on in the next one; everything between two lines of triple quotes is one message.

    Args:
        is_terminal: whether somebody types: there are prompts then, on stderr where stdout is no terminal, and Ctrl-C
            takes back what was typed. Without, so that a chat can be scripted, it ends the program.
    """

    def __init__(self, *, is_terminal: bool) -> None:
        self.is_terminal = is_terminal

    def read(self) -> str | None:
        """The next message, None at the end of input.

        Raises:
            BadInputError: the line is not UTF-8.
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        with self._interruptible():
            try:
                return self._message()
            except EOFError:
                return None

    def session(self) -> contextlib.AbstractContextManager[None]:
        """Between messages the terminal takes lines as ever, which wait."""
        return keeping_output(sys.stdin)

    def confirm(self, question: str) -> bool:
        """The answer to a question on a terminal; no for Ctrl-C and Ctrl-D, and without one."""
        if not self.is_terminal:
            return False
        print(f"{one_line(question)} [y/N]: ", end="", file=sys.stderr, flush=True)
        try:
            with self._interruptible():
                return sys.stdin.buffer.readline().strip().lower() in (b"y", b"yes")
        except KeyboardInterrupt:
            return False

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """At a terminal, Ctrl-C raises KeyboardInterrupt meanwhile and takes back the line, unless interrupts are ignored."""
        before = signal.getsignal(signal.SIGINT)
        if not self.is_terminal or before is signal.SIG_IGN:
            yield
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        except KeyboardInterrupt:
            termios.tcflush(sys.stdin, termios.TCIFLUSH)
            raise
        finally:
            signal.signal(signal.SIGINT, before)

    def wait(self) -> None:
        """Nothing has to be done before an answer."""

    def _message(self) -> str:
        line = self._line(PROMPT)
        if is_open(line):
            while is_open(line):
                line += "\n" + self._line(CONTINUED)
            return unfenced(line)
        lines = []
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = self._line(CONTINUED)
        return unfenced("\n".join([*lines, line]))

    def _line(self, prompt: str) -> str:
        if self.is_terminal:
            shown = sys.stdout if sys.stdout.isatty() else sys.stderr
            print(prompt, end="", file=shown, flush=True)
        data = sys.stdin.buffer.readline()
        if not data:
            raise EOFError
        return decoded(data, sys.stdin.encoding if self.is_terminal else "utf-8").rstrip("\r\n")


def decoded(data: bytes, encoding: str = "utf-8") -> str:
    """Input as text: in UTF-8, or in a terminal's own ``encoding``.

    Raises:
        BadInputError: in neither; the message names the byte.
    """
    with contextlib.suppress(UnicodeDecodeError):
        return data.decode(encoding)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"this line of input is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; not sent"
        ) from None
