"""Where every expert lies in the checkpoint, and reading one into a slot.

An expert's rows in a stacked tensor, in a tensor of its own or in a fused one are runs of bytes all the same, so any checkpoint
the runtime loads can be streamed as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.checkpoint import Checkpoint
from mlx_mixtral.weights.direct import BLOCK_BYTES, BOUNCE_BYTES, ExpertFileReader, Identity
from mlx_mixtral.weights.fill import CHUNK_BYTES, READ_THREADS, ReadRange, fill_piece, pieces
from mlx_mixtral.weights.safetensors import TensorInfo

__all__ = ["Counters", "ExpertPart", "ExpertStore", "Loading"]


@dataclass(frozen=True)
class ExpertPart:
    """Rows of one array of a slot, from ``row`` of the slot on: rows ``start`` to ``stop`` of a tensor, or ``columns`` of them.

    ``name`` is what ``ExpertBank.arrays`` calls the array, ``dtype`` the safetensors name of its type.
    """

    name: str
    row: int
    dtype: str
    info: TensorInfo
    start: int
    stop: int
    columns: range | None = None

    def into(self, array: mx.array, slot: int) -> ReadRange:
        """The read that puts it into ``slot`` of ``array [S, rows, columns]``."""
        row = slot * array.shape[1] + self.row
        return ReadRange(array, row, self.dtype, self.info, self.start, self.stop, self.columns)

    @property
    def is_down(self) -> bool:
        """Whether it is needed only when gate and up have been multiplied."""
        return self.name.startswith("down.")

    @property
    def nbytes(self) -> int:
        """Bytes on disk: of whole rows, for those are read."""
        return (self.stop - self.start) * self.info.row_bytes


@dataclass
class Counters:
    """What streaming did so far. A hit or miss is one expert that one call of one layer needed."""

    hits: int = 0
    misses: int = 0
    readbacks: int = 0
    """Times the router's choice was read back from the device."""
    bytes_read: int = 0
    wait_s: float = 0.0
    """Time this thread waited for reads; the device may have computed meanwhile."""
    predicted: int = 0
    """Experts that were prefetched, and of these the ones that were needed."""
    predicted_right: int = 0
    predicted_needed: int = 0
    """Experts that were missing when the guess was made."""

    @property
    def hit_rate(self) -> float:
        """Share of the experts needed that were in memory."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 0.0

    def copy(self) -> Counters:
        return Counters(**vars(self))

    def since(self, before: Counters) -> Counters:
        return Counters(**{name: value - getattr(before, name) for name, value in vars(self).items()})


class Loading:
    """One expert on its way into a slot: gate and up first, so that their products need not wait for down."""

    def __init__(
        self,
        slot: int,
        nbytes: int,
        gate_up: list[Future[int]],
        down: list[Future[int]],
        check: Callable[[], None],
    ) -> None:
        self.slot, self.nbytes = slot, nbytes
        self._gate_up, self._reads, self._check = gate_up, gate_up + down, check

    def wait(self) -> BaseException | None:
        """Until no thread writes to the slot any more; what went wrong, if anything: a change of the files meanwhile, too."""
        if (problem := _problem(self._reads)) is not None:
            return problem
        try:
            self._check()
        except CheckpointError as error:
            return error
        return None

    def wait_for_gate_up(self) -> BaseException | None:
        """Until gate and up are complete, down perhaps not; what went wrong with them, if anything."""
        return _problem(self._gate_up)

    @property
    def is_done(self) -> bool:
        return all(read.done() for read in self._reads)


def _problem(reads: list[Future[int]]) -> BaseException | None:
    wait(reads)
    return next((error for read in reads if (error := read.exception()) is not None), None)


@dataclass
class ExpertStore:
    """Reads experts of ``checkpoint``: ``parts[layer][expert]`` tell where one lies.

    Files are opened when the first expert is read. One thread calls; several read.
    """

    checkpoint: Checkpoint
    identities: Mapping[Path, Identity]
    parts: Mapping[int, Sequence[Sequence[ExpertPart]]]
    page_cache: bool = False
    counters: Counters = field(default_factory=Counters)

    def file_bytes(self, layer: int) -> int:
        """Bytes on disk of the largest expert of a layer."""
        return max(sum(part.nbytes for part in parts) for parts in self.parts[layer])

    @property
    def reading_bytes(self) -> int:
        """Memory that reading takes: a buffer a thread, and one more where columns are copied out of whole rows."""
        parts = [part for layer in self.parts.values() for parts in layer for part in parts]
        largest = max(part.nbytes for part in parts)
        cut = max((part.nbytes for part in parts if part.columns is not None), default=0)
        return READ_THREADS * (min(largest + 2 * BLOCK_BYTES, BOUNCE_BYTES) + min(cut, CHUNK_BYTES))

    def ranges(self, layer: int, expert: int, arrays: Mapping[str, mx.array], slot: int) -> list[ReadRange]:
        """The reads that fill a slot of a bank's ``arrays``."""
        return [part.into(arrays[part.name], slot) for part in self.parts[layer][expert]]

    def start(self, layer: int, expert: int, arrays: Mapping[str, mx.array], slot: int) -> Loading:
        """Begin to read an expert. Nothing in flight may use the slot.

        Raises:
            CheckpointError: a file is not what it was when the model was loaded.
        """
        reader = self._reader
        ranges = self.ranges(layer, expert, arrays, slot)
        files = {item.info.file for item in ranges}

        def check() -> None:
            for file in files:
                reader.check_unchanged(file)

        check()
        gate_up, down = (
            [
                self._pool.submit(fill_piece, reader, chunk)
                for part, item in zip(self.parts[layer][expert], ranges, strict=True)
                if part.is_down == is_down
                for chunk in pieces(item)
            ]
            for is_down in (False, True)
        )
        return Loading(slot, sum(item.nbytes for item in ranges), gate_up, down, check)

    def finish_gate_up(self, loading: Loading) -> BaseException | None:
        """Wait for gate and up of an expert; what went wrong with them. Their time is counted."""
        started = time.perf_counter()
        problem = loading.wait_for_gate_up()
        self.counters.wait_s += time.perf_counter() - started
        return problem

    def finish(self, loadings: Iterable[Loading]) -> BaseException | None:
        """Wait for all of them; the first error. Their time and bytes are counted."""
        started = time.perf_counter()
        problem = None
        for loading in loadings:
            error = loading.wait()
            problem = problem or error
            self.counters.bytes_read += loading.nbytes
        self.counters.wait_s += time.perf_counter() - started
        return problem

    def close(self) -> None:
        """Close the files; they open again when an expert is read."""
        for name in ("_pool", "_reader"):
            held = self.__dict__.pop(name, None)
            if isinstance(held, ThreadPoolExecutor):
                held.shutdown(wait=True, cancel_futures=True)
            elif held is not None:
                held.close()

    @cached_property
    def _reader(self) -> ExpertFileReader:
        return ExpertFileReader(self.checkpoint, self.identities, page_cache=self.page_cache)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(READ_THREADS, thread_name_prefix="mlx-mixtral-expert")

    @property
    def reader(self) -> ExpertFileReader:
        """The open files."""
        return self._reader
