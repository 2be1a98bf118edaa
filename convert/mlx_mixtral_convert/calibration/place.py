"""Where a calibration file may go."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mlx_mixtral.arguments import as_path
from mlx_mixtral.errors import CheckpointError, DestinationError
from mlx_mixtral.files import check_destination, disk_errors, is_special
from mlx_mixtral.reading import open_file

__all__ = ["FORMAT", "check_place", "is_calibration"]

FORMAT = "mlx-mixtral-calibration-1"


def check_place(path: str | Path, source: str | Path | None = None) -> Path:
    """The file a calibration is written to, links followed; asked before the hours that measuring takes.

    Only a calibration file is ever replaced, and nothing is put into ``source``, the folder that is measured.

    Raises:
        DestinationError: it cannot be written, or must not be.
    """
    # Unlike Path.resolve this takes a loop of links.
    place = Path(os.path.realpath(as_path("the calibration file", path)))
    folder = None if source is None else as_path("source", source)
    with disk_errors(place):
        if folder is not None and folder.exists():
            for above in (place, *place.parents):
                if above.exists() and above.samefile(folder):
                    what = "is the source itself" if above == place else f"lies in the source {folder}"
                    raise DestinationError(f"{place} {what}; give a file outside it")
        place = check_destination("the calibration file", path)
        if place.exists() and not is_special(place) and not is_calibration(place):
            raise DestinationError(f"{place} exists and is not a calibration file; give another name")
    return place


def is_calibration(place: Path) -> bool:
    """Whether a file is a calibration."""
    try:
        open_file(place).close()
        with safe_open(str(place), "numpy") as file:
            return FORMAT in (file.metadata() or {})
    except (CheckpointError, OSError, SafetensorError):
        return False
