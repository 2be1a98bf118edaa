"""Files of a repository in the Hub's cache, where other programs find them as well:

    models--OWNER--NAME/blobs/HASH                  a file's content
                       /snapshots/COMMIT/FILE       a link to it
                       /refs/REVISION               the commit a branch or tag stood for

A name from the hub becomes part of a path only after it was checked. A file has another name until it is whole, and the next
download goes on from there.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlx_mixtral.config.folder import is_adapter
from mlx_mixtral.errors import HubError
from mlx_mixtral.files import put_in_place, replace_file
from mlx_mixtral.hub.answers import logger
from mlx_mixtral.hub.failures import HubUnreachableError, hub_errors
from mlx_mixtral.hub.listing import COMMIT, Listing, list_files
from mlx_mixtral.hub.ranges import NoRangesError, RangeReader
from mlx_mixtral.reading import read_json
from mlx_mixtral.sizes import format_bytes

__all__ = ["INDEX", "WEIGHTS", "BytesDone", "download", "gguf_part", "store_files"]

BytesDone = Callable[[int, int], None]

INDEX = "model.safetensors.index.json"
DEFAULT_REVISION = "main"
_GGUF_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pth", ".pt", ".npz")
# Configuration, tokenizer and the like.
MAX_SMALL_BYTES = 256 * 2**20
# From here on by byte range, several pieces at once.
LARGE_BYTES = 32 * 2**20
FILES_AT_ONCE = 8
LOCK_S = 10.0


def download(
    repository: str,
    revision: str | None,
    choose: Callable[[Iterable[str]], list[str]],
    progress: BytesDone | None = None,
) -> Path:
    """The folder with those files of a repository that ``choose`` picks by name, out of the Hub's cache.

    Raises:
        InvalidRequestError: ``revision`` cannot be the name of one.
        HubError: as for ``resolve``.
    """
    with hub_errors(repository):
        try:
            listing = list_files(repository, revision)
        except HubUnreachableError as error:
            return _complete(_cached(repository, revision, error), choose)
        return store_files(listing, choose(listing.files), revision, progress)


def store_files(
    listing: Listing, names: list[str], revision: str | None = None, progress: BytesDone | None = None
) -> Path:
    """The folder with the files ``names`` of a listing, downloaded unless they are in the Hub's cache.

    Args:
        revision: what the listing's commit is remembered as, for the times without a connection.

    Raises:
        HubError: they cannot be fetched, are not what the listing says, or do not fit the disk.
    """
    with contextlib.closing(_Cache(listing, progress)) as cache:
        cache.remember(revision or DEFAULT_REVISION)
        cache.store(names)
    return cache.snapshot


def gguf_part(name: str) -> re.Match[str] | None:
    """The parts of the name of one file of a split GGUF: what all have in common, and how many there are."""
    return _GGUF_PART.fullmatch(name)


class _Cache:
    """A repository's folder in the Hub's cache."""

    def __init__(self, listing: Listing, progress: BytesDone | None) -> None:
        self._listing, self._progress = listing, progress
        self._folder = _cache_folder(listing.repository)
        self.snapshot = self._folder / "snapshots" / listing.commit
        self._reader = RangeReader(listing, self._received)
        self._lock = threading.Lock()
        self._done = self._total = 0

    def close(self) -> None:
        self._reader.close()

    def remember(self, revision: str) -> None:
        place, commit = self._folder / "refs" / revision, self._listing.commit.encode()
        if revision == self._listing.commit or (place.is_file() and place.read_bytes() == commit):
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, commit)

    def store(self, names: list[str]) -> None:
        sizes = {name: self._listing.size(name) for name in names}
        for name, size in sizes.items():
            if size > MAX_SMALL_BYTES and not name.endswith(WEIGHTS):
                raise HubError(
                    f"{name} has {format_bytes(size)}; the limit is {format_bytes(MAX_SMALL_BYTES)} for what is not weights"
                )
        self.snapshot.mkdir(parents=True, exist_ok=True)
        missing = [name for name in names if not (self.snapshot / name).is_file()]
        needed = sum(sizes[name] - self._held_bytes(name) for name in missing)
        free = shutil.disk_usage(self.snapshot).free
        if needed > free:
            raise HubError(
                f"{format_bytes(needed)} have to be downloaded and the disk of the hub's cache has {format_bytes(free)} free; "
                "free some room or set HF_HOME to another disk"
            )
        self._total = sum(sizes.values())
        self._received(self._total - sum(sizes[name] for name in missing))
        with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="mlx-mixtral-download") as pool:
            running = [pool.submit(self._store, name) for name in missing if sizes[name] < LARGE_BYTES]
            try:
                for each in running:
                    each.result()
            except BaseException:
                self._reader.stop()
                for each in running:
                    each.cancel()
                raise
        for name in missing:
            if sizes[name] >= LARGE_BYTES:
                self._store(name)
        if self._progress is not None:
            self._progress(self._total, self._total)

    def _blob(self, name: str) -> Path:
        return self._folder / "blobs" / self._listing.blob(name)

    def _held_bytes(self, name: str) -> int:
        blob = self._blob(name)
        for path in (blob, _partial(blob)):
            with contextlib.suppress(FileNotFoundError):
                return path.stat().st_size
        return 0

    def _store(self, name: str) -> None:
        blob, size = self._blob(name), self._listing.size(name)
        blob.parent.mkdir(parents=True, exist_ok=True)
        with _locked(blob, name):
            if not blob.is_file() or blob.stat().st_size != size:
                self._fetch(name, size, _partial(blob))
                put_in_place(_partial(blob), blob)
            else:
                self._received(size)
        _link(blob, self.snapshot / name)

    def _fetch(self, name: str, size: int, partial: Path) -> None:
        with partial.open("ab") as file:
            if file.tell() > size:
                file.truncate(0)
            if size >= LARGE_BYTES:
                held = file.seek(0, os.SEEK_END)
                self._received(held)
                with contextlib.suppress(NoRangesError):
                    for piece in self._reader.pieces(name, held, size):
                        file.write(piece)
                    return
                self._received(-held)
            self._reader.write_whole(name, file)

    def _received(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None and count:
                self._progress(min(self._done, self._total), self._total)


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


@contextlib.contextmanager
def _locked(blob: Path, name: str) -> Iterator[None]:
    """Alone with one content of the cache, as the Hub's client locks it."""
    lock_of: Any = importlib.import_module("huggingface_hub.utils").WeakFileLock
    too_long: Any = importlib.import_module("filelock").Timeout
    folder = blob.parents[1]
    path = folder.parent / ".locks" / folder.name / f"{blob.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(lock_of(path, timeout=LOCK_S))
                break
            except too_long:
                logger.info("waiting for another program that downloads %s", name)
        yield


def _link(blob: Path, place: Path) -> None:
    """Show a content under a file's name; it moves there on a file system without links."""
    temporary = place.with_name(f".{os.getpid()}.{threading.get_ident()}.link")
    try:
        temporary.symlink_to(os.path.relpath(blob, place.parent))
        temporary.replace(place)
    except OSError:
        temporary.unlink(missing_ok=True)
        blob.replace(place)


def _cache_folder(repository: str) -> Path:
    constants: Any = importlib.import_module("huggingface_hub.constants")
    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / "--".join(("models", *repository.split("/")))


def _cached(repository: str, revision: str | None, error: HubUnreachableError) -> Path:
    """The snapshot in the cache that a revision stood for when the hub was last asked.

    Raises:
        HubError: there is none.
    """
    hub: Any = importlib.import_module("huggingface_hub")
    absent: Any = importlib.import_module("huggingface_hub.errors").LocalEntryNotFoundError
    try:
        # No pattern: whether everything is there that is needed is not for the client to say.
        found = hub.snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=[])
        if COMMIT.fullmatch((folder := Path(found)).name) and folder.parent.name == "snapshots":
            return folder
    except absent:
        pass
    raise HubError(
        f"the hub cannot be reached and there is no cached copy ({error}); check the connection or HF_HUB_OFFLINE"
    ) from error


def _complete(folder: Path, choose: Callable[[Iterable[str]], list[str]]) -> Path:
    """The cached snapshot, if it has everything; the Hub cannot be asked."""
    present = {path.name for path in folder.iterdir() if path.is_file()}
    try:
        chosen = choose(present)
    except HubError as error:
        raise HubError(f"the cached copy is not complete ({error}) and the hub cannot be reached; go online") from error
    alone = any(name.endswith(".gguf") or name == "params.json" or is_adapter(name) for name in chosen)
    needed = [] if alone else ["config.json"]
    for index in {INDEX, "pytorch_model.bin.index.json"} & set(chosen):
        weight_map = read_json(folder / index).get("weight_map")
        needed += sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    for name in chosen:
        if (part := gguf_part(name)) is not None:
            needed += [f"{part[1]}-{number:05}-of-{part[2]}.gguf" for number in range(1, int(part[2]) + 1)]
    for name in needed:
        if name not in present:
            raise HubError(f"the cached copy lacks {name} and the hub cannot be reached; go online and try again")
    return folder
