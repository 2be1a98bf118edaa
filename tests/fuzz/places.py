"""What lies in the place of a file: its bytes, or something that is no file at all."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import chdir
from pathlib import Path

__all__ = ["KINDS", "Special", "put"]


class Special(bytes):
    """Stands for the bytes of a file where there is none; its own bytes are the name of its kind."""


def put(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by their names."""
    for name, data in files.items():
        if isinstance(data, Special):
            KINDS[data.decode()](folder / name)
        else:
            (folder / name).write_bytes(data)


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 20 * 2**30)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made, chdir(path.parent):  # names of sockets are short
        made.bind(path.name)


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "dangling": lambda path: path.symlink_to("gone"),
    "cyclic": lambda path: path.symlink_to(path.name),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": _socket,
    "sparse": _sparse,
}
