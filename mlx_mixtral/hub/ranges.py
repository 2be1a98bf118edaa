"""Reading files of a hub repository: whole, or by byte range with several pieces in flight, each resumed where its connection
broke. Of what has n bytes no more than n are read."""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

from mlx_mixtral.errors import HubError
from mlx_mixtral.hub.answers import HubAnswer, HubClient, logger
from mlx_mixtral.hub.failures import HubUnreachableError, status_error
from mlx_mixtral.hub.listing import Listing
from mlx_mixtral.sizes import format_bytes

__all__ = ["NoRangesError", "RangeReader"]

PIECE_BYTES = 16 * 2**20
CONNECTIONS = 8
# The longest silence, and the least that must arrive: less than that each second is no more than silence.
TIMEOUT_S = 10.0
MIN_BYTES_PER_S = 1024
# Attempts in a row that bring nothing, the seconds they may spend without an answer, and the seconds waited after the first;
# twice as long after each further one.
ATTEMPTS = 8
MAX_SILENT_S = 35.0
WAIT_S = 0.5
MAX_WAIT_S = 16.0
# The longest pause that the hub may ask for.
MAX_ASKED_S = 30.0
# How often the connection of one piece may break, though each brought something.
MAX_BREAKS = 100
SAID_S = 4.0
RETRIED = (408, 425, 429)

Received = Callable[[int], None]
"""Told of bytes as they arrive; a negative number where a file is begun again."""


class NoRangesError(HubError):
    """The hub sends files whole only."""


class RangeReader:
    """Reads the files of ``listing``, at its commit: a repository that changes meanwhile is not seen.

    ``received_bytes`` and ``retries`` count what went over the network. Close it when done.
    """

    def __init__(self, listing: Listing, received: Received | None = None) -> None:
        self.listing = listing
        self.received_bytes = self.retries = 0
        self._received = received
        self._client = HubClient()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="mlx-mixtral-fetch")

    def read_into(self, file: str, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` (bytes, writable) from ``offset`` of a file.

        Raises:
            HubError: the hub refuses, does not serve ranges, serves another file, or cannot be reached time and again.
        """
        pieces = deque(
            self._pool.submit(self._piece, file, buffer[start : start + PIECE_BYTES], offset + start)
            for start in range(0, len(buffer), PIECE_BYTES)
        )
        with self._given_up(pieces):
            for piece in pieces:
                piece.result()

    def pieces(self, file: str, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes from ``start`` to ``stop`` of a file in order, while those that follow are fetched.

        Raises:
            HubError: as ``read_into``.
        """
        running: deque[Future[memoryview]] = deque()
        with self._given_up(running):
            while start < stop or running:
                while start < stop and len(running) < CONNECTIONS:
                    buffer = memoryview(bytearray(min(PIECE_BYTES, stop - start)))
                    running.append(self._pool.submit(self._piece, file, buffer, start))
                    start += len(buffer)
                yield running[0].result()
                running.popleft()

    def write_whole(self, file: str, out: BinaryIO) -> None:
        """Write a file of the repository to ``out``, begun again where its connection breaks.

        Raises:
            HubError: as ``read_into``.
        """
        patience = _Patience(self, file)
        while True:
            out.seek(0)
            out.truncate()
            done = 0

            def put(data: memoryview) -> None:
                nonlocal done
                out.write(data)
                done += len(data)

            broken = self._attempt(file, None, self.listing.size(file), put)
            if broken is None:
                return
            if self._received is not None:
                self._received(-done)
            patience.wait(broken, done)

    def stop(self) -> None:
        """End reads that wait for the network with HubError, soon."""
        self._stopped.set()

    def close(self) -> None:
        self.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)

    @contextlib.contextmanager
    def _given_up(self, pieces: deque[Future[memoryview]]) -> Iterator[None]:
        """Nobody writes to a buffer once this is left; an interrupt does not wait for attempts to come."""
        try:
            yield
        except NoRangesError:
            # The others get the same answer, and whole files may still be asked for.
            raise
        except BaseException:
            self.stop()
            raise
        finally:
            for piece in pieces:
                piece.cancel()
            for piece in pieces:
                if not piece.cancelled():
                    piece.exception()

    def _piece(self, file: str, buffer: memoryview, offset: int) -> memoryview:
        done, patience = 0, _Patience(self, file, offset)

        def put(data: memoryview) -> None:
            nonlocal done
            buffer[done : done + len(data)] = data
            done += len(data)

        while done < len(buffer):
            before = done
            broken = self._attempt(file, offset + done, len(buffer) - done, put)
            if broken is not None:
                patience.wait(broken, done - before, done)
        return buffer

    def _attempt(self, file: str, offset: int | None, count: int, put: Callable[[memoryview], None]) -> _Broken | None:
        """Ask once for ``count`` bytes, from ``offset`` or, if None, without a range: what broke, None if all arrived."""
        done, started = 0, time.monotonic()
        asked = {} if offset is None else {"Range": f"bytes={offset}-{offset + count - 1}"}
        try:
            with self._client.ask(
                self._url(file), file, headers=asked, timeout_s=TIMEOUT_S, stopped=self._stopped
            ) as answer:
                if (broken := self._check(file, answer, offset, count)) is not None:
                    return broken
                for data in answer.chunks() if count else ():
                    part = memoryview(data)[: count - done]
                    put(part)
                    done += len(part)
                    self._count(len(part))
                    if done == count:
                        return None
                    if (silent_s := self._silent_s(done, started)) > 0:
                        return _Broken(f"{done} bytes in {silent_s:.0f} s", silent_s=silent_s)
                    if self._stopped.is_set():
                        break
        except HubUnreachableError as error:
            return _Broken(str(error), silent_s=self._silent_s(done, started))
        if done < count:
            return _Broken(f"{count - done} bytes did not arrive", silent_s=self._silent_s(done, started))
        return None

    @staticmethod
    def _silent_s(done: int, started: float) -> float:
        """The seconds since ``started`` if they brought as good as nothing, 0 if they are too few to tell."""
        elapsed = time.monotonic() - started
        return elapsed if elapsed >= TIMEOUT_S and done < elapsed * MIN_BYTES_PER_S else 0.0

    def _count(self, count: int) -> None:
        with self._lock:
            self.received_bytes += count
        if self._received is not None:
            self._received(count)

    def _check(self, file: str, answer: HubAnswer, offset: int | None, count: int) -> _Broken | None:
        """None for the bytes asked for; what is worth another attempt; HubError for what is not."""
        if answer.status not in (200, 206):
            return self._refused(file, answer)
        size, commit = self.listing.size(file), self.listing.commit
        for head in (*answer.passed, answer.headers):
            if (found := head.get("X-Repo-Commit", commit)) != commit:
                raise HubError(f"{file} was asked for at commit {commit}, the hub served {found[:80]}")
        if answer.status == 200:
            if offset is not None:
                raise NoRangesError(f"the hub does not serve byte ranges of {file}; convert without --stream")
            served = answer.headers.get("Content-Length", str(count))
            if served != str(count):
                raise HubError(f"{file} has {size} bytes, the hub serves {served[:40]}; it changed, start afresh")
            return None
        served = answer.headers.get("Content-Range", "")
        if not served.startswith(f"bytes {offset or 0}-") or not served.endswith(f"/{size}"):
            raise HubError(f"{file} has {size} bytes, the hub served {served[:80]!r}; it changed, start afresh")
        return None

    def _refused(self, file: str, answer: HubAnswer) -> _Broken:
        if answer.status < 500 and answer.status not in RETRIED:
            raise status_error(answer.status, answer.headers, self.listing.repository, self.listing.commit, file)
        wait = answer.headers.get("Retry-After", "")
        return _Broken(f"status {answer.status}", float(wait) if wait.isdecimal() and len(wait) < 9 else 0.0)

    def _url(self, file: str) -> str:
        hub: Any = importlib.import_module("huggingface_hub")
        return str(hub.hf_hub_url(self.listing.repository, file, revision=self.listing.commit))


@dataclass(frozen=True)
class _Broken:
    """Why an attempt failed, the seconds the hub asked to wait, and those that went by for nothing."""

    reason: str
    wait_s: float = 0.0
    silent_s: float = 0.0


class _Patience:
    """How many more attempts a file, or a piece of one, is worth."""

    def __init__(self, reader: RangeReader, file: str, offset: int | None = None) -> None:
        self._reader, self._file, self._offset = reader, file, offset
        self._failures = self._breaks = 0
        self._silent_s = 0.0

    def wait(self, broken: _Broken, brought: int = 0, done: int = 0) -> None:
        """Until the next attempt.

        Args:
            brought: bytes that the last attempt brought and that need not be fetched again.
            done: bytes that all have.

        Raises:
            HubError: it is not worth another, or the reader was stopped.
        """
        reader = self._reader
        with reader._lock:
            reader.retries += 1
        # What is begun again from the start has brought nothing.
        progressed = brought > 0 and broken.silent_s == 0 and self._offset is not None
        self._breaks += 1
        self._failures = 1 if progressed else self._failures + 1
        self._silent_s = 0.0 if progressed else self._silent_s + broken.silent_s
        if reader._stopped.is_set():
            raise HubError(f"stopped while {self._file} was fetched")
        if self._failures >= ATTEMPTS or self._silent_s >= MAX_SILENT_S or self._breaks >= MAX_BREAKS:
            where = "" if self._offset is None else f" at {format_bytes(self._offset + done)}"
            tries = self._breaks if self._breaks >= MAX_BREAKS else self._failures
            raise HubError(
                f"{self._file} cannot be fetched{where}, {tries} attempt{'s' * (tries != 1)} failed ({broken.reason}); "
                "check the connection and run the same command again"
            )
        pause = min(MAX_WAIT_S, WAIT_S * 2 ** (self._failures - 1))
        pause = max(pause, min(MAX_ASKED_S, broken.wait_s))
        if pause + broken.silent_s > SAID_S:
            logger.info("waiting for the hub: %s (%s); next attempt in %.0f s", self._file, broken.reason, pause)
        reader._stopped.wait(pause)
