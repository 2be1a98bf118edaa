"""Messages as they are typed or piped in: line editing, several lines in one message, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import sys

from mlx_mixtral.cli.console import note
from mlx_mixtral.errors import InvalidRequestError

__all__ = ["BadInputError", "MessageReader"]

PROMPT, CONTINUED = ">>> ", "... "
FENCE = '"""'


class BadInputError(InvalidRequestError):
    """A line that is no text; the session goes on."""


class MessageReader:
    """Reads one message at a time from standard input.

    A line that ends with a backslash goes on in the next one; everything between two lines of triple quotes is one message.
    Without a terminal there are no prompts, so that a chat can be scripted.
    """

    def __init__(self) -> None:
        self.is_terminal = sys.stdin.isatty()
        self._interrupts = 0
        if self.is_terminal:
            try:
                import readline
            except ImportError:
                return
            # Pasted text with tabs stays text.
            readline.parse_and_bind("set disable-completion on")

    def read(self) -> str | None:
        """The next message, None at the end of input.

        Ctrl-C drops the line; the second in a row raises KeyboardInterrupt.

        Raises:
            BadInputError: the line is not UTF-8.
        """
        while True:
            try:
                message = self._message()
            except EOFError:
                return None
            except KeyboardInterrupt:
                self._interrupts += 1
                if self._interrupts > 1 or not self.is_terminal:
                    raise
                note("\n(Ctrl-C again, Ctrl-D or /exit to leave)")
                continue
            self._interrupts = 0
            return message

    def _message(self) -> str:
        line = self._line(PROMPT)
        if line.lstrip().startswith(FENCE):
            return self._fenced(line.lstrip().removeprefix(FENCE))
        lines = []
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = self._line(CONTINUED)
        return "\n".join([*lines, line])

    def _fenced(self, line: str) -> str:
        lines = []
        while not line.rstrip().endswith(FENCE):
            lines.append(line)
            line = self._line(CONTINUED)
        lines.append(line.rstrip().removesuffix(FENCE))
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str:
        if self.is_terminal:
            if sys.stdout.isatty():
                return input(prompt)
            # Without a terminal for the answers the prompt must not go between them.
            print(prompt, end="", file=sys.stderr, flush=True)
            return input()
        data = sys.stdin.buffer.readline()
        if not data:
            raise EOFError
        try:
            return data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise BadInputError(
                f"this line of input is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; not sent"
            ) from None
