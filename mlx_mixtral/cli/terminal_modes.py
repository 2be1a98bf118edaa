"""What a terminal does at Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import termios
from collections.abc import Iterator
from typing import TextIO

__all__ = ["keeping_output"]


@contextlib.contextmanager
def keeping_output(stream: TextIO, *, without: int = 0) -> Iterator[None]:
    """While entered, Ctrl-C does not throw away what is on its way to the screen, nor what was typed ahead.

    A terminal does both unless it is told otherwise (``NOFLSH``): an answer would be shown with a hole that it does not have.
    https://pubs.opengroup.org/onlinepubs/9799919799/basedefs/V1_chap11.html

    Args:
        stream: one end of the terminal. Nothing is done where it is none, or one at which another program has the foreground.
        without: other local modes of the terminal, which are off meanwhile.
    """
    if not _in_foreground(stream):
        yield
        return
    before = termios.tcgetattr(stream)
    changed = list(before)
    changed[3] = (changed[3] | termios.NOFLSH) & ~without
    termios.tcsetattr(stream, termios.TCSANOW, changed)
    try:
        yield
    finally:
        termios.tcsetattr(stream, termios.TCSANOW, before)


def _in_foreground(stream: TextIO) -> bool:
    """Whether Ctrl-C at the terminal is for this process. One in the background would be stopped for changing modes."""
    try:
        return stream.isatty() and os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False
