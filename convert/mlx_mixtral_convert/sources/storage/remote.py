"""A hub repository as a source whose weights are never stored: each matrix is fetched when its turn comes.

Configuration, tokenizer and index are small and come through the hub's cache; weight files are read by byte range.
"""

from __future__ import annotations

import io
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.hub import Source, wanted_files
from mlx_mixtral.hub.download import WEIGHTS, store_files
from mlx_mixtral.hub.failures import hub_errors
from mlx_mixtral.hub.listing import Listing, list_files
from mlx_mixtral.hub.ranges import RangeReader
from mlx_mixtral.weights.fingerprint import describe_bytes
from mlx_mixtral_convert.sources.storage.local import StoredFile

__all__ = ["RemoteStorage", "open_remote"]

# Most heads are shorter: one request then brings all of one. GGUF's have the tokenizer inside.
HEAD_BYTES, GGUF_HEAD_BYTES = 2**17, 2**20
# A packed matrix of 8x22B, so that one that is read in small parts comes in one piece; several connections share it.
AHEAD_BYTES = 64 * 2**20


def open_remote(source: Source) -> RemoteStorage:
    """A repository at the commit its revision stands for now, with the files that a download would bring.

    Raises:
        InvalidRequestError: not a repository.
        HubError: it cannot be reached, or has no weights that can be converted.
    """
    if (repository := source.repository) is None:
        raise InvalidRequestError(f"{source.name} is not a hub repository; stream applies only to those")
    with hub_errors(repository):
        listing = list_files(repository, source.revision)
        wanted = wanted_files(listing.files, convertible=True, file=source.file)
        weights = [name for name in wanted if name.endswith(WEIGHTS)]
        for name in weights:
            listing.size(name)
        folder = store_files(listing, [name for name in wanted if name not in weights], listing.commit)
    return RemoteStorage(listing, folder, weights, source.file)


class RemoteStorage:
    """Weight files of a repository, pinned to a commit: they cannot change. A ``Storage``.

    Args:
        listing: what the repository holds.
        folder: where its small files are.
        weights: the weight files that count.
        named: the one the user named, if any.
    """

    ahead_bytes = AHEAD_BYTES

    def __init__(self, listing: Listing, folder: Path, weights: list[str], named: str | None) -> None:
        self.folder = folder
        self.named = None if named is None else self._path(listing, named)
        self.path = Path(listing.repository) if self.named is None else self.named
        self._listing, self._weights = listing, sorted(weights)
        self._ranges = RangeReader(listing)

    def again(self) -> RemoteStorage:
        """The same files at the same commit, to be read and closed apart."""
        return RemoteStorage(self._listing, self.folder, self._weights, None if self.named is None else self.named.name)

    def glob(self, pattern: str) -> list[Path]:
        return [self.at(name) for name in self._weights if fnmatchcase(name, pattern)]

    def at(self, name: str) -> Path:
        return self._path(self._listing, name)

    def has(self, name: str) -> bool:
        return name in self._weights

    def look(self, file: Path) -> tuple[int, int]:
        return self._listing.size(file.name), 0

    def open(self, file: Path) -> BinaryIO:
        return io.BufferedReader(StoredFile(self, file), GGUF_HEAD_BYTES if file.suffix == ".gguf" else HEAD_BYTES)

    def read_into(self, file: Path, buffer: memoryview, offset: int) -> None:
        with hub_errors(self._listing.repository):
            self._ranges.read_into(file.name, buffer, offset)

    def describe(self, file: Path) -> dict[str, Any]:
        # As a file in the hub's cache is described, so that a conversion may go on from a downloaded copy and back.
        nbytes, sha256 = self._listing.size(file.name), self._listing.files[file.name].sha256
        if sha256 is not None:
            return {"bytes": nbytes, "sha256": sha256}

        def read(offset: int, count: int) -> bytes:
            buffer = bytearray(count)
            self.read_into(file, memoryview(buffer), offset)
            return bytes(buffer)

        return describe_bytes(nbytes, read)

    def stop(self) -> None:
        self._ranges.stop()

    def close(self) -> None:
        self._ranges.close()

    @staticmethod
    def _path(listing: Listing, name: str) -> Path:
        return Path(listing.repository, name)
