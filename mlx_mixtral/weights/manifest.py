"""``conversion.json``, what a conversion says it wrote: the size and sha256 of every file beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_mixtral.arguments import is_integer
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.reading import is_there, open_file, read_json
from mlx_mixtral.weights.checkpoint import Checkpoint

__all__ = [
    "EDITED",
    "MANIFEST",
    "MAX_MANIFEST_BYTES",
    "FileEntry",
    "check_files",
    "check_sizes",
    "file_problem",
    "file_sha256",
    "read_manifest",
    "unlisted",
]

MANIFEST = "conversion.json"
EDITED = "was changed after the conversion"
# What is not for people to edit.
_WEIGHTS = (".safetensors", ".safetensors.index.json")
HASH_BYTES = 8 * 2**20
# Two lines for each matrix of a model that has an error.
MAX_MANIFEST_BYTES = 32 * 2**20
# Written by people and by the hub, not by conversions.
_NOT_OURS = ("README.md", MANIFEST)


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
    if not is_there(path):
        return None
    files = read_json(path, MAX_MANIFEST_BYTES).get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path}: there is no list of files; convert again")
    entries: dict[str, FileEntry] = {}
    for name, entry in files.items():
        nbytes, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not is_integer(nbytes) or not isinstance(sha256, str) or Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{path}: the entry of {name!r} is not the size and sha256 of a file in this folder")
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
        CheckpointError: no manifest, a file that is missing or not what was written, or one that is read and not listed.
    """
    entries = read_manifest(folder)
    if entries is None:
        raise CheckpointError(f"{folder} has no {MANIFEST} to verify it with; load it without verifying")
    for name, entry in entries.items():
        if (problem := file_problem(folder, name, entry)) is not None:
            fix = ", or load without verifying if the change was intended" if problem.startswith(EDITED) else ""
            raise CheckpointError(f"{folder / name}: {problem}{fix}")
    weights = _weight_files(folder)
    for name in unlisted(folder, entries):
        if _is_read(name) or name in weights:
            raise CheckpointError(f"{folder / name}: {MANIFEST} does not list it; move it, or convert again")


def unlisted(folder: Path, entries: Mapping[str, FileEntry]) -> list[str]:
    """Files of a folder that its manifest does not list: those one sees, and weights whatever their name."""
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return sorted((present | _weight_files(folder)) - set(entries) - {*_NOT_OURS})


def _weight_files(folder: Path) -> set[str]:
    try:
        return {file.name for file in Checkpoint(folder).files}
    except CheckpointError:  # said where they are read
        return set()


def _is_read(name: str) -> bool:
    """Whether a file beside the weights changes what a model is or says."""
    return name.endswith((".safetensors", ".json")) or name.startswith(("tokenizer.model", "chat_template."))


def file_problem(folder: Path, name: str, entry: FileEntry, read: Callable[[int], None] | None = None) -> str | None:
    """What is wrong with a listed file: missing, another size, other bytes; of a small one, that it was edited.

    ``read`` is told each number of bytes hashed.
    """
    path = folder / name
    try:
        if not is_there(path):
            return f"missing; {MANIFEST} lists it"
        if not path.is_file():
            return "is not a file"
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
    with open_file(path) as file:
        while data := file.read(HASH_BYTES):
            digest.update(data)
            if read is not None:
                read(len(data))
    return digest.hexdigest()
