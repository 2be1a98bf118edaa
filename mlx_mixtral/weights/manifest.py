"""``conversion.json``, what a conversion says it wrote: the size and sha256 of every file beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.files import read_json

__all__ = [
    "EDITED",
    "MANIFEST",
    "FileEntry",
    "check_files",
    "check_sizes",
    "file_problem",
    "file_sha256",
    "read_manifest",
]

MANIFEST = "conversion.json"
EDITED = "was changed after the conversion"
# What is not for people to edit.
_WEIGHTS = (".safetensors", ".safetensors.index.json")
HASH_BYTES = 8 * 2**20


@dataclass(frozen=True)
class FileEntry:
    """One file as it was written: bytes, and sha256 in hex digits."""

    nbytes: int
    sha256: str


def read_manifest(folder: Path) -> Mapping[str, FileEntry] | None:
    """What the folder's ``conversion.json`` lists, by file name; None for a checkpoint without one.

    Raises:
        CheckpointError: the file is damaged, or lists something outside the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    files = read_json(path).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: there is no list of files; convert again")
    entries: dict[str, FileEntry] = {}
    for name, entry in files.items():
        nbytes, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not isinstance(nbytes, int) or not isinstance(sha256, str) or Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{path}: the entry of {name!r} is not a size and a sha256 of a file of this folder")
        entries[name] = FileEntry(nbytes, sha256)
    return entries


def check_sizes(folder: Path) -> None:
    """Compare the sizes of a conversion's weight files with its manifest's. Small files may be edited, so they are left out.

    Raises:
        CheckpointError: a weight file has another size, or the manifest is damaged.
    """
    for name, entry in (read_manifest(folder) or {}).items():
        path = folder / name
        if path.suffix == ".safetensors" and path.is_file() and path.stat().st_size != entry.nbytes:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, {MANIFEST} says {entry.nbytes}; copy or convert it again"
            )


def check_files(folder: Path) -> None:
    """Compare every file of a conversion with its manifest, by sha256.

    Raises:
        CheckpointError: no manifest, or a file that is missing or not what was written.
    """
    entries = read_manifest(folder)
    if entries is None:
        raise CheckpointError(f"{folder} has no {MANIFEST} to verify it by; load it without verifying")
    for name, entry in entries.items():
        if (problem := file_problem(folder, name, entry)) is not None:
            fix = ", or load without verifying if it was on purpose" if problem.startswith(EDITED) else ""
            raise CheckpointError(f"{folder / name}: {problem}{fix}")


def file_problem(folder: Path, name: str, entry: FileEntry, read: Callable[[int], None] | None = None) -> str | None:
    """What is wrong with a listed file: missing, another size, other bytes; of a small one, that it was edited.

    ``read`` is told each number of bytes hashed.
    """
    path = folder / name
    try:
        if not path.is_file():
            return f"missing; {MANIFEST} lists it"
        if (size := path.stat().st_size) != entry.nbytes:
            told = f"has {size} bytes, {MANIFEST} says {entry.nbytes}"
        elif (found := file_sha256(path, read)) != entry.sha256:
            told = f"has sha256 {found}, {MANIFEST} says {entry.sha256}"
        else:
            return None
        if name.endswith(_WEIGHTS):
            return told
        return f"{EDITED}: it {told}; copy it again unless you changed it"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def file_sha256(path: Path, read: Callable[[int], None] | None = None) -> str:
    """sha256 of a file in hex digits."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while data := file.read(HASH_BYTES):
            digest.update(data)
            if read is not None:
                read(len(data))
    return digest.hexdigest()
