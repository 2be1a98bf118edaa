"""What was typed in earlier chats: a file of the user's own, which nobody else can read."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import History

from mlx_mixtral.errors import CheckpointError, DestinationError, DiskSpaceError
from mlx_mixtral.files import atomic_write, disk_errors
from mlx_mixtral.reading import is_there, read_file

__all__ = ["FileHistory", "history_path"]

MAX_FILE_BYTES = 2**20
"""A longer file is cut to the newest half of this when a chat begins."""
MAX_READ_BYTES = 2**26
MAX_MESSAGE_CHARACTERS = 2**16
"""A longer message, a book that was pasted for instance, is not kept."""


def history_path() -> Path | None:
    """``mlx-mixtral/chat-history`` in the folder for the state of programs; None for a user without a home.

    https://specifications.freedesktop.org/basedir-spec/latest/
    """
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        state = given if given.is_absolute() else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return state / "mlx-mixtral" / "chat-history"


class FileHistory(History):
    """Messages in a file of JSON strings, one a line, added when they are sent. Several chats may add to it.

    Where the file cannot be used the messages of this chat are kept in memory, and ``new_problem`` says why.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._problem, self._is_told = path, "", False
        self._earlier = self._read()

    def new_problem(self) -> str:
        """Why the file cannot be used, the first time it is asked for after it turned out; else nothing."""
        new = "" if self._is_told else self._problem
        self._is_told = bool(self._problem)
        return new

    def load_history_strings(self) -> Iterable[str]:
        """The messages of earlier chats, the newest first."""
        return self._earlier

    def _read(self) -> list[str]:
        """The same from the file; lines that are no messages are passed over."""
        try:
            if not is_there(self._path):
                return []
            lines = read_file(self._path, MAX_READ_BYTES).splitlines(keepends=True)
            if sum(map(len, lines)) > MAX_FILE_BYTES:
                lines = self._cut(lines)
        except (CheckpointError, DestinationError, DiskSpaceError) as error:
            self._problem = str(error)
            return []
        return [text for line in reversed(lines) if (text := _message(line))]

    def store_string(self, string: str) -> None:
        """Add a message at the end of the file."""
        if self._problem or len(string) > MAX_MESSAGE_CHARACTERS:
            return
        try:
            with disk_errors(self._path):
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)
                try:
                    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                        raise DestinationError(f"{self._path} is not a file")
                    os.fchmod(descriptor, 0o600)
                    os.write(descriptor, f"{json.dumps(string)}\n".encode())
                finally:
                    os.close(descriptor)
        except (DestinationError, DiskSpaceError) as error:
            self._problem = str(error)

    def _cut(self, lines: list[bytes]) -> list[bytes]:
        """Write the file again with its newest lines only."""
        kept, left = [], MAX_FILE_BYTES // 2
        for line in reversed(lines):
            left -= len(line)
            if left < 0:
                break
            kept.append(line)
        kept.reverse()
        with atomic_write(self._path) as file:
            os.fchmod(file.fileno(), 0o600)
            file.writelines(kept)
        return kept


def _message(line: bytes) -> str:
    try:
        found = json.loads(line)
        return found if isinstance(found, str) and found.encode() else ""
    except (ValueError, RecursionError):
        return ""
