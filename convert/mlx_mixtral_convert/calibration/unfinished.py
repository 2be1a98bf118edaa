"""What an interrupted calibration had measured, in a file beside the one it was for: the same call goes on from there.

A safetensors file: the hidden states as they were, the sums so far, and in its metadata which calibration it is. It is written
whole after a layer, and again after a later one once measuring has taken ``LEAST_RATIO`` times as long as writing did.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlx_mixtral.errors import CheckpointError, DestinationError
from mlx_mixtral.files import disk_errors, partial_path, put_in_place
from mlx_mixtral.weights.safetensors import read_header
from mlx_mixtral_convert.calibration.states import States, Stored
from mlx_mixtral_convert.output.journal import is_bad_input

__all__ = ["Unfinished", "digest_of", "journal_of"]

KEY = "mlx-mixtral-unfinished-calibration-1"
LEAST_RATIO = 20.0
# A calibration that takes no longer than this is not worth a file.
LEAST_SECONDS = 1.0


def journal_of(place: Path) -> Path:
    """Where the unfinished calibration for the file ``place`` lies."""
    return place.with_name(f"{place.name}.journal")


@dataclass
class Unfinished:
    """The file at ``path``; of None nothing is kept. As a context manager it tells an interruption how to go on.

    Args:
        identity: what the measurements follow from, as JSON.
        restart: forget what was measured.

    Raises:
        DestinationError: another calibration's measurements are there, or some other file.
    """

    path: Path | None
    identity: Mapping[str, Any]
    restart: bool = False
    _written: bool = field(default=False, init=False)
    _last: float = field(default_factory=time.perf_counter, init=False)
    _wait: float = field(default_factory=lambda: LEAST_SECONDS, init=False)

    def __post_init__(self) -> None:
        # Compared as it will be read back: tuples are lists in JSON.
        self.identity = json.loads(json.dumps(self.identity))

    def read(self) -> tuple[dict[str, mx.array], dict[str, Stored], dict[str, Any]] | None:
        """The arrays, where states are, and the figures of an earlier run; None where there is none."""
        if self.path is None or not self.path.exists():
            return None
        try:
            # The overload for a format with metadata is not in MLX's stubs.
            loaded: Any = mx.load(str(self.path), format="safetensors", return_metadata=True)
            arrays: dict[str, mx.array] = loaded[0]
            header = json.loads(loaded[1][KEY])
            placed = read_header(self.path)
            states = {
                name: Stored(self.path, info.offset, info.shape)
                for name, info in placed.items()
                if name in header["states"]
            }
        except (RuntimeError, ValueError, KeyError, OSError, RecursionError, CheckpointError) as error:
            raise DestinationError(
                f"{self.path} is not the journal of a calibration; move it, or give another file to write"
            ) from error
        if self.restart:
            self._written = True  # and goes when the new one is saved
            return None
        if (known := header["identity"]) != self.identity:
            name = next(name for name in self.identity if known.get(name) != self.identity[name])
            raise DestinationError(
                f"{self.path} has an unfinished calibration with other {name}; continue that one, or start over with "
                "--restart"
            )
        self._written = True
        # Evaluated, for they are read when they are needed and the file will be replaced.
        arrays = {name: array for name, array in arrays.items() if name not in states}
        mx.eval(arrays)
        figures: dict[str, Any] = header["figures"]
        return arrays, states, figures

    def offer(self, measured: Callable[[], tuple[dict[str, mx.array | States], dict[str, Any]]]) -> None:
        """Write the arrays (float32) and figures that ``measured`` gives, unless it is too soon for that.

        Raises:
            DiskSpaceError, DestinationError: it cannot be written.
        """
        started = time.perf_counter()
        if self.path is None or started - self._last < self._wait:
            return
        arrays, figures = measured()
        states = [name for name, array in arrays.items() if isinstance(array, States)]
        told = {"identity": self.identity, "figures": figures, "states": states}
        partial = partial_path(self.path)
        try:
            with disk_errors(self.path):
                with partial.open("wb") as file:
                    _write(file, arrays, json.dumps(told))
                put_in_place(partial, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        self._written = True
        self._last = time.perf_counter()
        self._wait = max(LEAST_SECONDS, LEAST_RATIO * (self._last - started))

    def remove(self) -> None:
        """The calibration is saved."""
        if self.path is not None and self._written:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and is_bad_input(error):
            self.remove()
        elif error is not None and self._written:
            error.add_note(f"finished layers are kept in {self.path}; repeat the command to continue from there")


def _write(file: BinaryIO, arrays: Mapping[str, mx.array | States], told: str) -> None:
    """A safetensors file, some states at a time."""
    header: dict[str, Any] = {"__metadata__": {KEY: told}}
    end = 0
    for name, array in arrays.items():
        shape = (array.count, array.length, array.width) if isinstance(array, States) else array.shape
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end := end + array.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for array in arrays.values():
        file.writelines(array.chunks() if isinstance(array, States) else [np.array(array).tobytes()])


def digest_of(array: Any) -> str:
    """sha256 of numbers."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
