"""What an unfinished evaluation has done, so that the same command goes on where it was.

A file of JSON lines. The first says what is evaluated and how; each further line is one finished part, a window for instance,
with its numbers:

    {"journal": 1, "identity": {"model": "…", "text": "…", "window": 2048, …}}
    {"part": "model", "index": 7, "logprobs": "…base64…", …}

A line is on the disk before the next part begins.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.errors import CheckpointError, DestinationError
from mlx_mixtral.files import Journal, check_destination

__all__ = ["EvaluationJournal", "pack", "unpack"]

Entry = Mapping[str, Any]


class EvaluationJournal:
    """The journal at ``path``; of None nothing is kept.

    Args:
        identity: what the results follow from, as JSON.
        restart: forget what was done.

    Raises:
        DestinationError: another evaluation's finished parts are there; the first difference is named. Or it cannot be written.
    """

    def __init__(self, path: Path | None = None, identity: Entry | None = None, *, restart: bool = False) -> None:
        self.path = path
        self._entries: dict[tuple[str, int], Entry] = {}
        if path is None:
            return
        # The links' target: that is what is removed when all is done.
        self.path = check_destination("the journal", path, regular=True)
        self._file = Journal(self.path)
        identity = json.loads(json.dumps(identity or {}))
        known, lines = ({}, []) if restart else _read(self._file)
        if lines and known != identity:
            raise DestinationError(_difference(path, known, identity, len(lines)))
        self._entries = {(str(line.get("part")), int(line.get("index", -1))): line for line in lines}
        # Written anew, without a torn line.
        self._file.start(identity, lines)

    def __enter__(self) -> EvaluationJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finished: nothing stays. Failed or interrupted: what was done does, and the error says so."""
        if self.path is None:
            return
        if error is None or not self._entries:
            with contextlib.suppress(OSError):
                self.path.unlink()
        else:
            error.add_note(f"finished parts are kept in {self.path}; repeat the command to continue from there")

    def get(self, part: str, index: int) -> Entry | None:
        """What was recorded of a part."""
        return self._entries.get((part, index))

    def add(self, part: str, entries: Iterable[tuple[int, Entry]]) -> None:
        """Record finished parts, and wait until they are on the disk.

        Raises:
            DiskSpaceError, DestinationError: they cannot be.
        """
        if self.path is None:
            return
        lines = [{"part": part, "index": index, **entry} for index, entry in entries]
        self._file.append(*lines)
        self._entries |= {(part, line["index"]): line for line in lines}


def pack(values: npt.NDArray[Any]) -> str:
    """Numbers as base64, little-endian."""
    return base64.b64encode(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()).decode()


def unpack(text: object, kind: str, count: int) -> npt.NDArray[Any]:
    """``count`` numbers of a NumPy type that ``pack`` wrote.

    Raises:
        CheckpointError: something else is there.
    """
    try:
        values = np.frombuffer(base64.b64decode(str(text), validate=True), kind)
    except ValueError:
        values = np.empty(0)
    if len(values) != count:
        raise CheckpointError("the journal is damaged; start over with --restart")
    return values


def _read(file: Journal) -> tuple[Any, list[dict[str, Any]]]:
    """The identity, and finished parts.

    Raises:
        DestinationError: it is some other file, or cannot be read.
    """
    try:
        if (found := file.read()) is None and file.path.exists() and file.path.stat().st_size:
            raise DestinationError(f"{file.path} exists and is not the journal of an evaluation; give another name")
    except CheckpointError as error:
        raise DestinationError(f"journal {error}") from error
    except OSError as error:
        raise DestinationError(f"journal {file.path} cannot be read: {error.strerror or error}") from error
    return found or ({}, [])


def _difference(path: Path, known: Any, identity: Entry, done: int) -> str:
    before = known if isinstance(known, dict) else {}
    name = next((name for name in (*identity, *before) if before.get(name) != identity.get(name)), "identity")
    return (
        f"{path} has an unfinished evaluation ({done} parts done) with {name} {_shown(before.get(name))}, but this one has "
        f"{_shown(identity.get(name))}; continue the first one, or start over with --restart"
    )


def _shown(value: object) -> str:
    return f"{value:.16}" if isinstance(value, str) else json.dumps(value)[:60]
