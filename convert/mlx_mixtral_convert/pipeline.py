"""Reading, packing and writing, one expert's matrix at a time: while one is packed, the next is read and the last is written.

Three matrices and their packed forms are alive at most, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Field, Matrix, module_tensor
from mlx_mixtral.weights.dtypes import MLX_DTYPES, NUMPY_DTYPES, bytes_of
from mlx_mixtral_convert.output.journal import ConversionJournal, check_cancelled
from mlx_mixtral_convert.output.plan import Plan, ShardPlan
from mlx_mixtral_convert.output.write import ShardWriter
from mlx_mixtral_convert.packing.measure import ErrorSum, MatrixError
from mlx_mixtral_convert.packing.quantize import cast, quantize
from mlx_mixtral_convert.packing.values import Values
from mlx_mixtral_convert.rounding import Rounder
from mlx_mixtral_convert.sources import PackedSource, TensorSource, matrix_bytes, tensor_place

__all__ = ["Piece", "Written", "pack_piece", "packed_arrays", "read_piece", "write_weights"]

_NAMES = {dtype: name for name, dtype in MLX_DTYPES.items()}
OnMatrix = Callable[[Matrix, int], None]
Packed = Mapping[str, mx.array] | Mapping[str, Values] | Mapping[Field, Values]


@dataclass(frozen=True)
class Written:
    """sha256 of every shard by file name, and the error of every packed matrix in the model's order."""

    hashes: dict[str, str]
    errors: tuple[MatrixError, ...]


def write_weights(
    source: TensorSource,
    plan: Plan,
    folder: Path,
    *,
    journal: ConversionJournal,
    step: OnMatrix,
    cancelled: Callable[[], bool] | None = None,
    rounder: Rounder | None = None,
) -> Written:
    """Write the shards of ``plan`` into ``folder`` that ``journal`` does not have.

    Args:
        journal: told each shard that is on the disk.
        step: told each matrix and the source bytes just done, from this thread; what it raises stops the conversion.
        cancelled: asked before each matrix.
        rounder: packs affine matrices, from this thread and layer by layer; ``mx.quantize`` when None.

    Raises:
        ConversionError: cancelled, a source that changed, a full disk, a destination that cannot be written.
        CheckpointError: a source that cannot be read or holds NaN, infinity or values beyond the target type.
    """
    errors = {path: ErrorSum() for path, spec in plan.specs.items() if spec is not None}
    remaining = [shard for shard in plan.shards if shard.file not in journal.finished]
    # The threads end before the files they write to are closed.
    with ExitStack() as files, _thread("read") as reader, _thread("write") as writer, ExitStack() as ending:
        ending.callback(source.files.stop_waiting)
        pieces = _pieces(source, remaining)
        ahead = _read_next(reader, source, plan, pieces)
        written: Future[None] | None = None
        for shard in remaining:
            out = files.enter_context(ShardWriter(folder, shard))
            for _ in range(sum(matrix.num_experts or 1 for matrix in shard.matrices)):
                check_cancelled(cancelled)
                assert ahead is not None
                piece = ahead.result()
                ahead = _read_next(reader, source, plan, pieces)
                packed = pack_piece(plan, piece, rounder)
                if written is not None:
                    written.result()
                written = writer.submit(_store, out, plan, piece, packed, errors.get(piece.matrix.path))
                step(piece.matrix, piece.values.nbytes)
            if written is not None:
                written.result()
            writer.submit(_store_norms, out, source, shard, plan.dtype).result()
            # Before the shard counts as finished: everything in it has been read.
            source.files.check_unchanged()
            written = writer.submit(_finish, out, journal, plan, errors)
        if written is not None:
            written.result()
    known = {error.path: error for done in journal.finished.values() for error in done.errors}
    hashes = {shard.file: journal.finished[shard.file].sha256 for shard in plan.shards}
    return Written(hashes, tuple(known[path] for path in plan.specs if path in known))


@contextmanager
def _thread(name: str) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(1, thread_name_prefix=f"mlx-mixtral-{name}")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class Piece:
    """One expert of a matrix: values as read, the same in the conversion's float type, and the memory they were read into."""

    matrix: Matrix
    expert: int
    place: str
    values: Values
    typed: Values
    scratch: mx.array
    packed: Mapping[Field, Values] | None = None
    """The source's own packing, where it is kept."""


def _pieces(source: TensorSource, shards: list[ShardPlan]) -> Iterator[tuple[Matrix, int, mx.array]]:
    """Every expert of every matrix, and memory to read it into.

    There is memory for three: one being read, one packed, one written. Used again and again, it is paged in once; new is taken
    where a shard's largest matrix is of another size, so that no layer holds the memory of an embedding.
    """
    buffers, place = [mx.zeros(0, mx.uint8)], 0
    for shard in shards:
        size = max(matrix_bytes(source, matrix) for matrix in shard.matrices)
        if buffers[0].size != size:
            buffers = [mx.zeros(size, mx.uint8) for _ in range(3)]
            mx.eval(buffers)
        # In the order of the file, so that hashing seldom has to read back.
        for matrix in sorted(shard.matrices, key=lambda m: shard.tensors[module_tensor(m, "weight")].offset):
            for expert in range(matrix.num_experts or 1):
                yield matrix, expert, buffers[place % 3]
                place += 1


def _read_next(
    reader: ThreadPoolExecutor, source: TensorSource, plan: Plan, pieces: Iterator[tuple[Matrix, int, mx.array]]
) -> Future[Piece] | None:
    if (following := next(pieces, None)) is None:
        return None
    matrix, expert, scratch = following
    return reader.submit(read_piece, source, plan, matrix, expert, scratch)


def read_piece(source: TensorSource, plan: Plan, matrix: Matrix, expert: int, scratch: mx.array) -> Piece:
    values, where = source.read(matrix, expert, bytes_of(scratch)), tensor_place(source, matrix, expert)
    if not plan.keeps(matrix.path):
        return Piece(matrix, expert, where, values, cast(values, plan.dtype, where), scratch)
    assert isinstance(source, PackedSource)
    # The values are searched for NaN, and measured against.
    typed = cast(values, values.dtype, where)
    packed = {
        field: cast(Values(array, "F16"), plan.dtype, f"{where} {field}")
        if array.dtype == np.float16
        else Values(array, "U32" if field == "weight" else "U8")
        for field, array in source.read_packed(matrix, expert).items()
    }
    return Piece(matrix, expert, where, values, typed, scratch, packed)


def pack_piece(plan: Plan, piece: Piece, rounder: Rounder | None) -> Packed:
    spec = plan.specs[piece.matrix.path]
    if piece.packed is not None:
        return piece.packed
    if spec is None:
        return {"weight": piece.typed}
    if rounder is None:
        return quantize(piece.typed, spec, piece.place, piece.scratch)

    def rounding(weights: mx.array) -> dict[str, mx.array]:
        return rounder.pack(piece.matrix, piece.expert, weights, spec)

    return quantize(piece.typed, spec, piece.place, piece.scratch, rounding)


def packed_arrays(packed: Packed) -> dict[str, npt.NDArray[Any]]:
    """The fields in numpy, where they lie; bfloat16 as uint16."""
    return {
        str(field): array.array
        if isinstance(array, Values)
        else bytes_of(array).view(NUMPY_DTYPES[_NAMES[array.dtype]]).reshape(array.shape)
        for field, array in packed.items()
    }


def _store(
    out: ShardWriter,
    plan: Plan,
    piece: Piece,
    packed: Packed,
    error: ErrorSum | None,
) -> None:
    arrays = packed_arrays(packed)
    for field, array in arrays.items():
        out.append(f"{piece.matrix.path}.{field}", array)
    spec = plan.specs[piece.matrix.path]
    if error is not None and spec is not None:
        error.add(piece.values, arrays, plan.dtype, spec)


def _store_norms(out: ShardWriter, source: TensorSource, shard: ShardPlan, dtype: str) -> None:
    for norm in shard.norms:
        out.append(f"{norm.path}.weight", cast(source.read_norm(norm), dtype, tensor_place(source, norm)).array)


def _finish(out: ShardWriter, journal: ConversionJournal, plan: Plan, errors: dict[str, ErrorSum]) -> None:
    shard, sha256 = out.shard, out.finish()
    journal.record(shard.file, shard.nbytes, sha256, _summary(plan, shard, errors))


def _summary(plan: Plan, shard: ShardPlan, errors: dict[str, ErrorSum]) -> Iterator[MatrixError]:
    for matrix in shard.matrices:
        if (spec := plan.specs[matrix.path]) is not None:
            yield errors[matrix.path].summary(matrix.path, spec)
