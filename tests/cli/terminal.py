"""A pseudo-terminal with the program in it: keys in, the screen's text out."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Ctrl-C is a signal to the processes whose controlling terminal it is typed at.
OWN_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
# Sequences that begin with escape: CSI, OSC, and those of two characters; at the end of what was read, half a one too.
ESCAPES = re.compile(
    r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_=>])|\x1b(\[[0-?]*[ -/]*|\][^\x07\x1b]*\x1b?)?\Z"
)
CTRL_C, CTRL_D, TAB, ENTER, ALT_ENTER, UP = "\x03", "\x04", "\t", "\r", "\x1b\r", "\x1b[A"
PROMPT = ">>>"
PATIENCE_S = 30


class Terminal:
    """A command at a terminal of its own.

    Args:
        start: the fixture ``spawn``.
        state: where what is typed is remembered.
        before: Python to run in the program first.
        output: where stdout goes instead.
        command: of the program.
    """

    def __init__(
        self,
        start: Callable[..., Any],
        state: Path,
        *arguments: object,
        before: str = "",
        output: int | None = None,
        command: str = "chat",
        **env: str,
    ) -> None:
        self._here, theirs = pty.openpty()
        fcntl.ioctl(self._here, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process: subprocess.Popen[bytes] = start(
            command,
            *arguments,
            before=OWN_TERMINAL + before,
            stdin=theirs,
            stdout=theirs if output is None else output,
            stderr=theirs,
            env={"TERM": "xterm", "COLUMNS": "80", "XDG_STATE_HOME": str(state), **env},
            start_new_session=True,
        )
        os.close(theirs)
        self.raw = b""
        self._seen = 0

    @property
    def text(self) -> str:
        """Everything shown so far, without what moves the cursor."""
        return ESCAPES.sub("", self.raw.decode(errors="replace"))

    def until(self, mark: str = PROMPT) -> str:
        """What is shown from the last mark to this one."""
        while (at := self.text.find(mark, self._seen)) < 0:
            assert self.read(), f"the program ended, and there was no {mark!r} in {self.text[self._seen :]!r}"
        shown, self._seen = self.text[self._seen : at], at + len(mark)
        return shown

    def type(self, *keys: str) -> None:
        data = "".join(keys).encode()
        while data:
            written = os.write(self._here, data[:512])
            data = data[written:]

    def paste(self, text: str) -> None:
        """As a terminal does it: line ends are those of Enter, and there are marks around it if the program asked for them.

        https://invisible-island.net/xterm/ctlseqs/ctlseqs.html
        """
        text = text.replace("\n", "\r")
        is_marked = self.raw.rfind(b"\x1b[?2004h") > self.raw.rfind(b"\x1b[?2004l")
        self.type(f"\x1b[200~{text}\x1b[201~" if is_marked else text)

    def end(self) -> int:
        """Read to the end; the exit status."""
        while self.read():
            pass
        os.close(self._here)
        return self.process.wait(timeout=PATIENCE_S)

    def read(self) -> bool:
        """Take what is shown next; False at the end."""
        ready, _, _ = select.select([self._here], [], [], PATIENCE_S)
        assert ready, f"nothing more after {self.text[-2000:]!r}"
        try:
            data = os.read(self._here, 4096)
        except OSError:  # Linux says so when the other side is gone
            data = b""
        self.raw += data
        return bool(data)
