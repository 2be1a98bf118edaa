"""What an unfinished conversion has done, so that the same command goes on where it was.

``journal.jsonl`` lies in the partial folder beside the shards it lists. Its first line says what is being converted and how;
each further line is one finished shard:

    {"journal": 1, "identity": {"converter": "0.1.0", "source": {…}, "recipe": {…}, "dtype": "bfloat16", …}}
    {"file": "model-00001-of-00033.safetensors", "bytes": 811204608, "sha256": "…", "errors": [{…}, …]}

A line is written once its shard is on the disk, and a shard counts only when its size and sha256 are those of its line.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mlx_mixtral.errors import CheckpointError, ConfigError, ConversionError, DestinationError, DiskSpaceError
from mlx_mixtral.files import Journal, disk_errors, sync_folder
from mlx_mixtral.weights.manifest import file_sha256
from mlx_mixtral_convert.output.plan import ShardPlan
from mlx_mixtral_convert.packing.measure import MatrixError

__all__ = [
    "JOURNAL", "CancelledError", "ConversionJournal", "Finished", "check_cancelled", "clear_folder", "is_bad_input",
]  # fmt: skip

JOURNAL = "journal.jsonl"


class CancelledError(ConversionError):
    """The caller's ``cancelled`` said so."""


def check_cancelled(cancelled: Callable[[], bool] | None) -> None:
    """Raise CancelledError where the caller says so."""
    if cancelled is not None and cancelled():
        raise CancelledError("conversion cancelled")


@dataclass(frozen=True)
class Finished:
    """One shard on the disk: its size, sha256, and the error of each packed matrix in it."""

    file: str
    nbytes: int
    sha256: str
    errors: tuple[MatrixError, ...]


class ConversionJournal:
    """The journal of the partial folder ``folder``, which must be locked. Opening it removes what is not proved finished.

    As a context manager it decides, when the conversion fails, what the next one finds: an interruption leaves the journal
    and its shards, a source that is bad, or a failure before any shard was finished, leaves no journal.

    Args:
        identity: what the shards' bytes follow from, as JSON: the source and its hashes, recipe, types, converter.
        shards: all shards of the conversion.
        restart: forget what was done.

    Raises:
        DestinationError: another conversion left finished shards here; the first difference is named with both values.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], shards: Sequence[ShardPlan], *, restart: bool = False
    ) -> None:
        self.folder, self.path = folder, folder / JOURNAL
        self.finished: dict[str, Finished] = {}
        self._shards = {shard.file: shard for shard in shards}
        self._layers = sum(shard.layer is not None for shard in shards)
        # Compared as it will be read back: tuples are lists in JSON.
        identity = json.loads(json.dumps(identity))
        self._file = Journal(self.path)
        known, lines = (None, []) if restart else self._read()
        # Without a finished shard there is nothing to lose.
        if lines and known != identity:
            raise DestinationError(_difference(folder, known, identity, len(lines)))
        for entry in lines:
            if (found := self._prove(entry)) is not None:
                self.finished[found.file] = found
        self.kept = tuple(self.finished)
        with disk_errors(self.path):
            clear_folder(self.folder, {JOURNAL, *self.finished})
        # Written anew, without torn or disproved lines.
        self._file.start(identity, map(_line, self.finished.values()))

    def __enter__(self) -> ConversionJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        if not self.finished or is_bad_input(error):
            with contextlib.suppress(OSError):
                self.path.unlink()
            return
        with contextlib.suppress(OSError):
            clear_folder(self.folder, {JOURNAL, *self.finished})
        error.add_note(f"repeat the command to continue from {self._place()}")

    @property
    def kept_bytes(self) -> int:
        """Bytes of the shards found finished when the journal was opened."""
        return sum(self.finished[file].nbytes for file in self.kept)

    @property
    def kept_layers(self) -> int:
        """Decoder layers found finished when the journal was opened."""
        return sum(self._shards[file].layer is not None for file in self.kept)

    def record(self, file: str, nbytes: int, sha256: str, errors: Iterable[MatrixError]) -> None:
        """Add a shard that was flushed to the disk.

        Raises:
            DiskSpaceError: the disk is full.
            DestinationError: any other failure to write.
        """
        done = Finished(file, nbytes, sha256, tuple(errors))
        with disk_errors(self.path):
            sync_folder(self.folder)
        self._file.append(_line(done))
        self.finished[file] = done

    def _read(self) -> tuple[Any, list[dict[str, Any]]]:
        with contextlib.suppress(OSError, CheckpointError):
            if (found := self._file.read()) is not None:
                return found
        return None, []

    def _prove(self, entry: Any) -> Finished | None:
        try:
            errors = tuple(MatrixError(**error) for error in entry["errors"])
            done = Finished(entry["file"], entry["bytes"], entry["sha256"], errors)
            shard = self._shards[done.file]
            path = self.folder / done.file
            if shard.nbytes == done.nbytes == path.stat().st_size and file_sha256(path) == done.sha256:
                return done
        except (KeyError, TypeError, OSError):
            pass
        return None

    def _place(self) -> str:
        done = sum(self._shards[file].layer is not None for file in self.finished)
        return f"layer {done + 1} of {self._layers}" if done < self._layers else "the last file"


def _line(done: Finished) -> dict[str, Any]:
    errors = [asdict(error) for error in done.errors]
    return {"file": done.file, "bytes": done.nbytes, "sha256": done.sha256, "errors": errors}


def is_bad_input(error: BaseException) -> bool:
    """Whether the source is at fault, so that what was made of it is worth nothing.

    A disk that was unplugged or a file that could not be read is not: its error comes from the operating system.
    """
    if isinstance(error, CancelledError | DestinationError | DiskSpaceError) or isinstance(error.__cause__, OSError):
        return False
    return isinstance(error, CheckpointError | ConfigError | ConversionError)


def _difference(folder: Path, known: Any, identity: Mapping[str, Any], done: int) -> str:
    before, now = dict(_flat(known)), dict(_flat(identity))
    name = next(name for name in (*now, *before) if before.get(name, "absent") != now.get(name, "absent"))
    dest = folder.with_name(folder.name.removeprefix(".").removesuffix(".partial"))
    return (
        f"{dest} has an unfinished conversion ({done} files done) with {name} {_shown(before, name)}, but this one has "
        f"{_shown(now, name)}; continue the first one, or start over with --restart"
    )


# What a recipe that leaves them out means.
_DEFAULTS = {"recipe.rounding": "plain", "recipe.exact": False, "recipe.calibration": "none"}


def _shown(entries: Mapping[str, Any], name: str) -> str:
    value = entries.get(name, _DEFAULTS.get(name, "absent"))
    return value[:80] if isinstance(value, str) else json.dumps(value)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """``{"recipe": {"bits": 4}}`` as ``("recipe.bits", 4)``."""
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from _flat(entry, f"{name}.{key}" if name else key)
    else:
        yield name, value


def clear_folder(folder: Path, kept: Collection[str] = ()) -> None:
    """Remove everything from a folder but the names in ``kept``. Raises OSError."""
    for entry in folder.iterdir():
        if entry.name in kept:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
