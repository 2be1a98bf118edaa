"""Reading files of a hub repository by byte range: several pieces in flight, each resumed where its connection broke."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mlx_mixtral import __version__
from mlx_mixtral.errors import HubError
from mlx_mixtral.hub import hub_errors, is_unreachable
from mlx_mixtral.sizes import format_bytes

__all__ = ["Listing", "RangeReader", "RemoteFile", "list_files"]

PIECE_BYTES = 16 * 2**20
CONNECTIONS = 8
TIMEOUT_S = 10.0
# Attempts in a row that bring nothing, and the seconds waited after the first; twice as long after each further one.
ATTEMPTS = 8
WAIT_S = 0.5
MAX_WAIT_S = 30.0
RETRIED = (408, 425, 429)


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository: bytes, and the sha256 of its content where the hub knows it, as for all large files."""

    nbytes: int
    sha256: str | None


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    repository: str
    commit: str
    files: Mapping[str, RemoteFile]


def list_files(repository: str, revision: str | None) -> Listing:
    """What a repository holds, and the commit its revision stands for now.

    Raises:
        HubError: the repository is gated, absent, has no such revision, or cannot be reached.
    """
    with hub_errors(repository, revision):
        import huggingface_hub as hub

        info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
    files = {
        item.rfilename: RemoteFile(item.size or 0, item.lfs.sha256 if item.lfs else None)
        for item in info.siblings or ()
    }
    return Listing(repository, str(info.sha), files)


class RangeReader:
    """Reads byte ranges of the files of ``listing``, at its commit: a repository that changes meanwhile is not seen.

    ``received_bytes`` and ``retries`` count what went over the network. Close it when done.
    """

    def __init__(self, listing: Listing) -> None:
        hub: Any = importlib.import_module("huggingface_hub.utils")
        self.listing = listing
        self.received_bytes = self.retries = 0
        self._client: Any = hub.get_session()
        self._headers = {
            **hub.build_hf_headers(library_name="mlx-mixtral", library_version=__version__),
            "Accept-Encoding": "identity",
        }
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="mlx-mixtral-fetch")

    def read_into(self, file: str, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` (bytes, writable) from ``offset`` of a file.

        Raises:
            HubError: the hub refuses, does not serve ranges, serves another file, or cannot be reached time and again.
        """
        starts = range(0, len(buffer), PIECE_BYTES)
        pieces = [
            self._pool.submit(self._piece, file, buffer[start : start + PIECE_BYTES], offset + start)
            for start in starts
        ]
        try:
            for piece in pieces:
                piece.result()
        except BaseException:
            # An interrupt must not wait for attempts to come.
            self.stop()
            raise
        finally:
            # Nobody writes to the buffer once this returns.
            for piece in pieces:
                piece.cancel()
            for piece in pieces:
                if not piece.cancelled():
                    piece.exception()

    def stop(self) -> None:
        """End reads that wait for the network with HubError, soon."""
        self._stopped.set()

    def close(self) -> None:
        self.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _piece(self, file: str, buffer: memoryview, offset: int) -> None:
        done, failures, reason = 0, 0, ""
        while done < len(buffer):
            if self._stopped.is_set():
                raise HubError(f"{self.listing.repository}: stopped while {file} was fetched")
            count, problem = self._attempt(file, buffer[done:], offset + done)
            done += count
            with self._lock:
                self.received_bytes += count
                self.retries += problem is not None
            if problem is None:
                continue
            reason, failures = problem.reason, 1 if count else failures + 1
            if failures >= ATTEMPTS:
                raise HubError(
                    f"{self.listing.repository}: {file} cannot be fetched at {format_bytes(offset + done)}, "
                    f"{ATTEMPTS} attempts failed ({reason}); check the connection and run the same command again"
                )
            self._stopped.wait(min(MAX_WAIT_S, max(problem.wait_s, WAIT_S * 2 ** (failures - 1))))

    def _attempt(self, file: str, buffer: memoryview, offset: int) -> tuple[int, _Broken | None]:
        """Bytes that arrived, and what broke unless all did."""
        import huggingface_hub as hub
        from huggingface_hub.errors import OfflineModeIsEnabled

        done, end = 0, offset + len(buffer) - 1
        url = hub.hf_hub_url(self.listing.repository, file, revision=self.listing.commit)
        headers = {**self._headers, "Range": f"bytes={offset}-{end}"}
        try:
            with self._client.stream("GET", url, headers=headers, timeout=TIMEOUT_S) as response:
                if (broken := self._check(file, response, offset)) is not None:
                    return 0, broken
                for data in response.iter_raw():
                    data = data[: len(buffer) - done]
                    buffer[done : done + len(data)] = data
                    done += len(data)
                    if self._stopped.is_set():
                        break
        except OfflineModeIsEnabled as error:
            raise HubError(
                f"{self.listing.repository}: HF_HUB_OFFLINE is set, and weights have to be fetched"
            ) from error
        except Exception as error:
            if not is_unreachable(error):
                raise
            return done, _Broken(str(error) or type(error).__name__)
        return done, None if done == len(buffer) else _Broken(f"{len(buffer) - done} bytes did not arrive")

    def _check(self, file: str, response: Any, offset: int) -> _Broken | None:
        """None for the bytes asked for; what is worth another attempt; HubError for what is not."""
        status, repository, commit = response.status_code, self.listing.repository, self.listing.commit
        if status >= 500 or status in RETRIED:
            wait = response.headers.get("Retry-After", "")
            return _Broken(f"status {status}", float(wait) if wait.isdecimal() else 0.0)
        if status == 200:
            raise HubError(f"{repository}: the hub does not serve byte ranges of {file}; convert without --stream")
        if status != 206:
            hub: Any = importlib.import_module("huggingface_hub.utils")
            with hub_errors(repository, commit):
                hub.hf_raise_for_status(response)
            raise HubError(f"{repository}: the hub answered with status {status} for {file}")
        size = self.listing.files[file].nbytes
        served = response.headers.get("Content-Range", "")
        if not served.startswith(f"bytes {offset}-") or not served.endswith(f"/{size}"):
            raise HubError(
                f"{repository}: {file} has {size} bytes, the hub served {served!r}; it changed, start afresh"
            )
        for answer in (*response.history, response):
            if (found := answer.headers.get("X-Repo-Commit", commit)) != commit:
                raise HubError(f"{repository}: {file} was asked for at commit {commit}, the hub served {found}")
        return None


@dataclass(frozen=True)
class _Broken:
    """Why an attempt failed, and the seconds the hub asked to wait."""

    reason: str
    wait_s: float = 0.0
