"""Where a calibration file may go, and how it gets there: whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mlx_mixtral.arguments import as_path
from mlx_mixtral.errors import DestinationError
from mlx_mixtral_convert.output.write import explain, sync_folder

__all__ = ["FORMAT", "check_place", "replace_file"]

FORMAT = "mlx-mixtral-calibration-1"


def check_place(path: str | Path, source: str | Path | None = None) -> None:
    """Raise DestinationError unless a calibration can be written to ``path``; asked before the hours that measuring takes.

    Only a calibration file is ever replaced, and nothing is put into ``source``, the folder that is measured.
    """
    place = _resolved(path)
    folder = None if source is None else as_path("source", source)
    if folder is not None and folder.exists():
        for above in (place, *place.parents):
            if above.exists() and above.samefile(folder):
                what = "is the source itself" if above == place else f"lies in the source {folder}"
                raise DestinationError(f"{place} {what}; give a file outside it")
    try:
        place.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise explain(error, place, 0, 0) from error
    else:
        if place.is_dir():
            raise DestinationError(f"{place} is a folder; give a file")
        if not place.is_file() or not _is_calibration(place):
            raise DestinationError(f"{place} exists and is not a calibration file; give another name")
    if not place.parent.is_dir():
        raise DestinationError(f"{place} cannot be written: there is no folder {place.parent}; make it first")
    try:
        temporary = _temporary(place)
        os.close(_create(temporary))
        temporary.unlink()
    except OSError as error:
        raise explain(error, place, 0, 0) from error


def replace_file(path: str | Path, data: bytes) -> None:
    """Write ``data`` beside ``path`` and rename it when it is on the disk.

    Raises:
        DestinationError: it cannot be written.
        DiskSpaceError: the disk is full.
    """
    place, done = _resolved(path), 0
    temporary = _temporary(place)
    try:
        descriptor = _create(temporary)
        try:
            while done < len(data):
                done += os.write(descriptor, memoryview(data)[done:])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(place)
        sync_folder(place.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise explain(error, place, done, len(data)) from error
        raise


def _resolved(path: str | Path) -> Path:
    # A link stays: what it leads to is written. Unlike Path.resolve this takes a loop of links.
    return Path(os.path.realpath(as_path("the calibration file", path)))


def _temporary(place: Path) -> Path:
    # Not made of the file's own name, which may be as long as names can be.
    return place.with_name(f".calibration-{os.getpid()}.partial")


def _create(temporary: Path) -> int:
    return os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)


def _is_calibration(place: Path) -> bool:
    try:
        with safe_open(str(place), "numpy") as file:
            return FORMAT in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False
