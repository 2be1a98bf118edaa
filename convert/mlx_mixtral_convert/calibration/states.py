"""Hidden states of a text: what is held of them does not grow with the text.

16,384 tokens of 8x7B are 270 MB, 65,536 are 1.1 GB, and a walk through the layers needs them more than once. What is more than
``HELD_BYTES`` lies in a file without a name, which goes when its process does, however that ends.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.files import disk_errors
from mlx_mixtral.reading import open_file

__all__ = ["States", "Stored", "pieces"]

HELD_BYTES = 2**25
# Tokens at once: 8x7B's hidden units of them are 59 MB.
PIECE = 1024

Indices = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


def pieces(count: int) -> Iterator[slice]:
    """Runs of at most ``PIECE`` tokens."""
    return (slice(start, min(start + PIECE, count)) for start in range(0, count, PIECE))


@dataclass(frozen=True)
class Stored:
    """States ``[B, L, D]`` float32 in another file, from ``offset`` on."""

    file: Path
    offset: int
    shape: tuple[int, ...]


class States:
    """States ``[B, L, D]`` float32 of B sequences, ``tokens`` of them in one row; none at first.

    Args:
        folder: where the file is, if there is one; the system's folder for such files when None.

    What writes raises DiskSpaceError or DestinationError where that folder takes no file, or no more.
    """

    def __init__(self, length: int, width: int, folder: Path | None = None) -> None:
        self.length, self.width, self.count = length, width, 0
        self._place = Path(tempfile.gettempdir()) if folder is None else folder
        self._row = 4 * width
        self._held = np.empty((0, width), np.float32)
        self._file: int | None = None

    @property
    def tokens(self) -> int:
        return self.count * self.length

    @property
    def nbytes(self) -> int:
        return self.tokens * self._row

    def append(self, x: mx.array) -> None:
        """Add sequences ``[b, L, D]`` at the end."""
        self._write(self.tokens, np.array(x))
        self.count += len(x)

    def sequences(self, start: int = 0, stop: int | None = None) -> mx.array:
        """Sequences ``[b, L, D]`` from ``start`` to before ``stop``, or to the end."""
        stop = self.count if stop is None else min(stop, self.count)
        return self._read(start * self.length, (stop - start) * self.length).reshape(-1, self.length, self.width)

    def put(self, start: int, x: mx.array) -> None:
        """Sequences ``[b, L, D]`` in place of those from ``start`` on."""
        self._write(start * self.length, np.array(x))

    def rows(self, piece: slice) -> mx.array:
        """Tokens ``[n, D]`` of a run."""
        return self._read(piece.start, piece.stop - piece.start)

    def take(self, tokens: Indices) -> mx.array:
        """Tokens ``[n, D]`` in any order."""
        if self._file is None:
            return mx.array(self._held[tokens])
        found = np.empty((len(tokens), self.width), np.float32)
        for token, run in _runs(tokens):
            self._move(os.preadv, self._file, found[run], token)
        return mx.array(found)

    def add(self, tokens: Indices, x: mx.array) -> None:
        """Add ``x [n, D]`` to n tokens, each once."""
        changed = np.array(self.take(tokens) + x)
        if self._file is None:
            self._held[tokens] = changed
            return
        with disk_errors(self._place):
            for token, run in _runs(tokens):
                self._move(os.pwritev, self._file, changed[run], token)

    def fill(self, count: int, make: Callable[[slice], mx.array]) -> None:
        """Become ``count`` sequences, tokens ``[n, D]`` made a piece at a time."""
        self.count = count
        for piece in pieces(self.tokens):
            self._write(piece.start, np.array(make(piece)))

    def load(self, stored: Stored) -> None:
        """Become what is in another file.

        Raises:
            CheckpointError: it cannot be opened.
        """
        with open_file(stored.file) as file:
            file.seek(stored.offset)
            self.count = stored.shape[0]
            for piece in pieces(self.tokens):
                data = file.read((piece.stop - piece.start) * self._row)
                self._write(piece.start, np.frombuffer(data, np.float32))

    def chunks(self) -> Iterator[bytes]:
        """All bytes, some at a time."""
        return (np.array(self.rows(piece)).tobytes() for piece in pieces(self.tokens))

    def close(self) -> None:
        """Let go of everything; it goes with the object too."""
        self._held = self._held[:0].copy()
        if self._file is not None:
            self._close()

    def _read(self, token: int, count: int) -> mx.array:
        if self._file is None:
            return mx.array(self._held[token : token + count])
        found = np.empty((count, self.width), np.float32)
        self._move(os.preadv, self._file, found, token)
        return mx.array(found)

    def _write(self, token: int, values: Floats) -> None:
        values = values.reshape(-1, self.width)
        end = token + len(values)
        if self._file is None and end * self._row <= HELD_BYTES:
            if end > len(self._held):
                self._held = np.concatenate([self._held, np.empty((end - len(self._held), self.width), np.float32)])
            self._held[token:end] = values
            return
        with disk_errors(self._place):
            if self._file is None:
                self._open()
            assert self._file is not None
            self._move(os.pwritev, self._file, np.ascontiguousarray(values, np.float32), token)

    def _open(self) -> None:
        """From now on in a file."""
        with tempfile.TemporaryFile(dir=self._place) as file:
            self._file = os.dup(file.fileno())
        self._close = weakref.finalize(self, os.close, self._file)
        self._move(os.pwritev, self._file, self._held, 0)
        self._held = self._held[:0].copy()

    def _move(self, how: Callable[..., int], file: int, values: Floats, token: int) -> None:
        data, done = values.reshape(-1).view(np.uint8).data, 0
        while done < len(data):
            moved = how(file, [data[done:]], token * self._row + done)
            if not moved:
                raise OSError("the file is shorter than it was")
            done += moved


def _runs(tokens: Indices) -> Iterator[tuple[int, slice]]:
    """Tokens that follow each other: the first, and where they are among all."""
    ends = [*(np.flatnonzero(np.diff(tokens) != 1) + 1).tolist(), len(tokens)]
    start = 0
    for end in ends:
        if end > start:
            yield int(tokens[start]), slice(start, end)
        start = end
