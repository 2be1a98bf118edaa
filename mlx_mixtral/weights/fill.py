"""Filling arrays from disk: allocated once at their final size, read into place by several threads.

A tensor whose bytes are what the array holds goes straight from the file into the array's memory; float tensors of another
type pass through a small buffer, as do rows of which only some columns are wanted. Either way no second copy of the model ever
exists, and nothing is mapped.

Fresh memory costs as much as reading: the system clears each page when it is first written. Arrays are therefore asked for
ahead of time and made while earlier ones are read.

Threads that read get a view of an array's memory, never the array: asking an array for its memory waits for it, and two
threads that wait for one array at once can crash MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from itertools import cycle

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.errors import CheckpointError, DtypeRangeError, NonFiniteWeightsError
from mlx_mixtral.weights.checkpoint import CheckpointReader
from mlx_mixtral.weights.dtypes import FLOATS, MLX_DTYPES, NUMPY_DTYPES, as_numpy, bytes_of, convert, is_finite
from mlx_mixtral.weights.safetensors import ITEM_BYTES, TensorInfo

__all__ = ["READ_THREADS", "ReadRange", "allocate", "fill", "fill_piece", "pieces"]

CHUNK_BYTES = 4 * 2**20
READ_THREADS = 8
ALLOCATION_STREAMS = 4


@dataclass(frozen=True)
class ReadRange:
    """Rows ``start`` to ``stop`` of a tensor go to the rows of ``array`` from ``row`` on (leading axes flattened).

    ``dtype`` is the safetensors name of the array's dtype. ``columns`` are the numbers of each row that go there, as the
    tensor has them (words where it is packed); all of them when None.
    """

    array: mx.array
    row: int
    dtype: str
    info: TensorInfo
    start: int
    stop: int
    columns: range | None = None

    @property
    def nbytes(self) -> int:
        """Bytes read from disk: whole rows, of which ``columns`` are kept."""
        return (self.stop - self.start) * self.info.row_bytes


def fill(reader: CheckpointReader, ranges: list[ReadRange], progress: Callable[[int], None] | None = None) -> None:
    """Read ``ranges`` into arrays that ``allocate`` made; ``progress`` is told the bytes read so far, from this thread.

    Raises:
        CheckpointError: a file that is short or unreadable.
        NonFiniteWeightsError: NaN or infinity in a float tensor.
        DtypeRangeError: a value that the target type cannot hold.
    """
    done = 0
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="mlx-mixtral-read") as pool:
        pending: set[Future[int]] = set()
        waiting = (piece for item in ranges for piece in pieces(item))
        try:
            for piece in waiting:
                pending.add(pool.submit(fill_piece, reader, piece))
                # A bounded queue keeps an interrupted load from reading on for seconds.
                while len(pending) >= 4 * READ_THREADS:
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    done += sum(future.result() for future in finished)
                    if progress is not None:
                        progress(done)
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                done += sum(future.result() for future in finished)
                if progress is not None:
                    progress(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@dataclass(frozen=True)
class ReadPiece:
    """What one read takes of a ``ReadRange``: rows ``start`` to ``stop`` of a tensor, or ``columns`` of them, go to ``into``,
    numbers of ``dtype``."""

    into: npt.NDArray[np.uint8]
    dtype: str
    info: TensorInfo
    start: int
    stop: int
    columns: range | None = None


def pieces(item: ReadRange) -> Iterator[ReadPiece]:
    """A range in pieces of about ``CHUNK_BYTES``, once its array is made."""
    columns = item.info.row_bytes // ITEM_BYTES[item.info.dtype] if item.columns is None else len(item.columns)
    row_bytes = columns * ITEM_BYTES[item.dtype]
    memory = bytes_of(item.array)[item.row * row_bytes :]
    rows = max(1, CHUNK_BYTES // max(item.info.row_bytes, 1))
    for start in range(item.start, item.stop, rows):
        stop = min(start + rows, item.stop)
        into = memory[(start - item.start) * row_bytes : (stop - item.start) * row_bytes]
        yield ReadPiece(into, item.dtype, item.info, start, stop, item.columns)


def fill_piece(reader: CheckpointReader, item: ReadPiece) -> int:
    """Carry out one piece; the bytes read. Raises as ``fill``."""
    nbytes = (item.stop - item.start) * item.info.row_bytes
    if item.info.dtype == item.dtype:
        if item.columns is None:
            reader.read(item.info, item.into.data, item.start * item.info.row_bytes)
        else:
            kept = _rows(reader, item)
            np.copyto(item.into.reshape(kept.shape), kept)
        _check(item, item.into.view(NUMPY_DTYPES[item.dtype]), item.dtype)
        return nbytes
    if item.info.dtype not in FLOATS or item.dtype not in FLOATS:
        raise CheckpointError(
            f"{item.info.file}: tensor {item.info.name!r} has dtype {item.info.dtype}; {item.dtype} was expected"
        )
    values = as_numpy(_rows(reader, item), item.info.dtype)
    _check(item, values, item.info.dtype)
    converted = convert(values, item.info.dtype, item.dtype)
    if not is_finite(converted, item.dtype):
        largest = float(np.abs(convert(values, item.info.dtype, "F32")).max())
        limit = "float16's 65504; use --dtype bfloat16 or float32"
        if item.dtype == "BF16":
            limit = "bfloat16's 3.39e38; use --dtype float32"
        raise DtypeRangeError(f"{item.info.file}: tensor {item.info.name!r} holds {largest:.5g}, beyond {limit}")
    item.into.view(NUMPY_DTYPES[item.dtype])[:] = converted.reshape(-1)
    return nbytes


def _rows(reader: CheckpointReader, item: ReadPiece) -> npt.NDArray[np.uint8]:
    """Bytes ``[rows, bytes of the columns wanted]``, in fresh memory.

    Whole rows are read and the columns copied out of them. A read that scatters, and drops what lies between, is no faster
    for rows of 7 KB in pieces of ``CHUNK_BYTES``, and several times slower for scales, whose rows are short.
    """
    rows = reader.rows(item.info, item.start, item.stop)
    if item.columns is None:
        return rows
    item_bytes = ITEM_BYTES[item.info.dtype]
    return rows[:, item.columns.start * item_bytes : item.columns.stop * item_bytes]


def _check(item: ReadPiece, values: np.ndarray[tuple[int, ...], np.dtype[np.generic]], dtype: str) -> None:
    if dtype in FLOATS and not is_finite(values, dtype):
        rows = values.reshape(item.stop - item.start, -1)
        row = next(index for index, one in enumerate(rows) if not is_finite(one, dtype))
        raise NonFiniteWeightsError(
            f"{item.info.file}: tensor {item.info.name!r} holds NaN or infinity in row {item.start + row}; "
            "the checkpoint is damaged"
        )


def allocate(shape: tuple[int, ...], dtype: str) -> mx.array:
    """An array of its final size, contents to be filled in. It is still being made: asking for its memory waits for it, which
    one thread at a time may do."""
    device = mx.default_device()
    array = mx.zeros(shape, MLX_DTYPES[dtype], stream=next(_streams(device.type == mx.DeviceType.cpu)))
    mx.async_eval(array)
    return array


@cache
def _streams(on_cpu: bool) -> Iterator[mx.Stream | None]:
    """Streams to make arrays on, in turn: those of a CPU clear memory each on a thread of its own; a GPU is quick with it."""
    if not on_cpu:
        return cycle([None])
    return cycle([mx.new_thread_unsafe_stream(mx.Device(mx.cpu)) for _ in range(ALLOCATION_STREAMS)])
