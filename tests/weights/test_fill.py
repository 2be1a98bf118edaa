"""Filling arrays from disk: exact bytes in exact places, and never wrong data in silence."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy

from mlx_mixtral.errors import CheckpointError, DtypeRangeError, NonFiniteWeightsError
from mlx_mixtral.weights import fill as fill_module
from mlx_mixtral.weights.checkpoint import Checkpoint, CheckpointReader
from mlx_mixtral.weights.dtypes import FLOATS, MLX_DTYPES
from mlx_mixtral.weights.fill import ReadRange, allocate, fill

Arrays = dict[str, mx.array]
WriteCheckpoint = Callable[[Arrays], Checkpoint]


@pytest.fixture
def write(tmp_path: Path) -> WriteCheckpoint:
    def save(arrays: Arrays) -> Checkpoint:
        mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
        return Checkpoint(tmp_path)

    return save


def _random(shape: tuple[int, ...], dtype: str, seed: int = 0) -> mx.array:
    generator = np.random.default_rng(seed)
    if dtype in FLOATS:
        return mx.array(generator.standard_normal(shape).astype(np.float32)).astype(MLX_DTYPES[dtype])
    return mx.array(generator.integers(0, 256, shape)).astype(MLX_DTYPES[dtype])


def _bits(array: mx.array) -> npt.NDArray[np.uint8]:
    """The array's bytes as MLX computes them, not as our own view shows them."""
    return np.asarray(mx.contiguous(array).view(mx.uint8) + mx.array(0, mx.uint8))


def _whole(checkpoint: Checkpoint, name: str, dtype: str) -> ReadRange:
    info = checkpoint[name]
    return ReadRange(allocate(info.shape, dtype), 0, dtype, info, 0, info.rows)


@pytest.fixture(params=[1, 100, 4096, fill_module.CHUNK_BYTES], ids=lambda n: f"chunks of {n}")
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(fill_module, "CHUNK_BYTES", request.param)
    return int(request.param)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "U32", "U8"])
def test_bytes_of_the_same_type_arrive_unchanged(write: WriteCheckpoint, dtype: str, chunk_bytes: int) -> None:
    wanted = _random((37, 19), dtype)
    checkpoint = write({"w": wanted})
    item = _whole(checkpoint, "w", dtype)
    with CheckpointReader(checkpoint) as reader:
        fill(reader, [item])
    np.testing.assert_array_equal(_bits(item.array), _bits(wanted))


@pytest.mark.parametrize(("source", "target"), [(s, t) for s in FLOATS for t in FLOATS if s != t])
def test_other_float_types_arrive_as_mlx_casts_them(
    write: WriteCheckpoint, source: str, target: str, chunk_bytes: int
) -> None:
    stored = _random((37, 19), source)
    checkpoint = write({"w": stored})
    item = _whole(checkpoint, "w", target)
    with CheckpointReader(checkpoint) as reader:
        fill(reader, [item])
    np.testing.assert_array_equal(_bits(item.array), _bits(stored.astype(MLX_DTYPES[target])))


@pytest.mark.parametrize("target", ["BF16", "F32"])
def test_rows_go_to_the_rows_they_are_sent_to_and_nowhere_else(
    write: WriteCheckpoint, target: str, chunk_bytes: int
) -> None:
    # Two experts of two tensors into one stacked array with gate rows above up rows, in another order, one row unused.
    gate, up = _random((3, 5, 4), "BF16", 1), _random((3, 5, 4), "BF16", 2)
    checkpoint = write({"gate": gate, "up": up})
    array = allocate((2, 11, 4), target)
    fills = []
    for slot, expert in enumerate([2, 0]):
        fills.append(ReadRange(array, slot * 11, target, checkpoint["gate"], expert * 5, (expert + 1) * 5))
        fills.append(ReadRange(array, slot * 11 + 5, target, checkpoint["up"], expert * 5, (expert + 1) * 5))
    with CheckpointReader(checkpoint) as reader:
        fill(reader, fills[::-1])
    spare = mx.zeros((1, 4), mx.bfloat16)
    wanted = mx.stack([mx.concatenate([gate[e], up[e], spare]) for e in (2, 0)]).astype(MLX_DTYPES[target])
    np.testing.assert_array_equal(_bits(array), _bits(wanted))


def test_vectors_are_one_row(write: WriteCheckpoint, chunk_bytes: int) -> None:
    norm = _random((64,), "BF16")
    checkpoint = write({"norm": norm})
    item = _whole(checkpoint, "norm", "F32")
    assert (item.stop, item.nbytes) == (1, 128)
    with CheckpointReader(checkpoint) as reader:
        fill(reader, [item])
    np.testing.assert_array_equal(_bits(item.array), _bits(norm.astype(mx.float32)))


def test_many_small_fills_all_arrive(write: WriteCheckpoint) -> None:
    stored = _random((500, 8), "F32")
    checkpoint = write({"w": stored})
    array = allocate((500, 8), "F32")
    fills = [ReadRange(array, 499 - row, "F32", checkpoint["w"], row, row + 1) for row in range(500)]
    with CheckpointReader(checkpoint) as reader:
        fill(reader, fills)
    np.testing.assert_array_equal(_bits(array), _bits(stored[::-1]))


def test_nothing_to_fill_is_nothing_done(write: WriteCheckpoint) -> None:
    checkpoint = write({"w": _random((2, 2), "F32")})
    with CheckpointReader(checkpoint) as reader:
        fill(reader, [], lambda done: pytest.fail("nothing was read"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("source", "target"), [(s, t) for s in FLOATS for t in FLOATS])
def test_nan_and_infinity_are_refused_with_tensor_and_row(
    tmp_path: Path, write: WriteCheckpoint, monkeypatch: pytest.MonkeyPatch, bad: float, source: str, target: str
) -> None:
    values = np.ones((10, 4), np.float32)
    values[6, 1] = bad
    checkpoint = write({"model.norm": _random((4,), source), "lm_head": mx.array(values).astype(MLX_DTYPES[source])})
    monkeypatch.setattr(fill_module, "CHUNK_BYTES", 3 * checkpoint["lm_head"].row_bytes)
    items = [_whole(checkpoint, name, target) for name in ("model.norm", "lm_head")]
    with (
        CheckpointReader(checkpoint) as reader,
        pytest.raises(NonFiniteWeightsError, match="tensor 'lm_head' holds NaN or infinity in row 6;"),
    ):
        fill(reader, items)


def test_bit_patterns_that_would_be_nan_are_no_concern_of_packed_words(write: WriteCheckpoint) -> None:
    words = mx.full((4, 4), 0x7FC00000, mx.uint32)
    checkpoint = write({"w": words})
    item = _whole(checkpoint, "w", "U32")
    with CheckpointReader(checkpoint) as reader:
        fill(reader, [item])
    np.testing.assert_array_equal(_bits(item.array), _bits(words))


@pytest.mark.parametrize(
    ("source", "target", "value", "said"),
    [
        ("F32", "F16", 65520.0, "tensor 'w' holds 65520, beyond float16's 65504; use --dtype bfloat16 or float32"),
        ("BF16", "F16", -131072.0, "tensor 'w' holds 1.3107e\\+05, beyond float16's 65504"),
        ("F32", "BF16", 3.4028234e38, "tensor 'w' holds 3.4028e\\+38, beyond bfloat16's 3.39e38; use --dtype float32"),
    ],
)
def test_a_value_the_type_cannot_hold_is_refused_with_the_types_that_can(
    write: WriteCheckpoint, source: str, target: str, value: float, said: str
) -> None:
    values = np.ones((5, 4), np.float32)
    values[3, 2] = value
    checkpoint = write({"w": mx.array(values).astype(MLX_DTYPES[source])})
    with CheckpointReader(checkpoint) as reader, pytest.raises(DtypeRangeError, match=said):
        fill(reader, [_whole(checkpoint, "w", target)])


def test_the_largest_float16_is_not_refused(write: WriteCheckpoint) -> None:
    # 65519.99 still rounds down to 65504.
    checkpoint = write({"w": mx.array([[65504.0, -65504.0, 65519.99, 1e-30]])})
    item = _whole(checkpoint, "w", "F16")
    with CheckpointReader(checkpoint) as reader:
        fill(reader, [item])
    assert item.array.tolist() == [[65504.0, -65504.0, 65504.0, 0.0]]


@pytest.mark.parametrize(("stored", "target"), [("U32", "F32"), ("F32", "U32"), ("U8", "BF16"), ("BF16", "U8")])
def test_integers_are_never_taken_for_floats(write: WriteCheckpoint, stored: str, target: str) -> None:
    checkpoint = write({"w": _random((4, 4), stored)})
    item = _whole(checkpoint, "w", target)
    with (
        CheckpointReader(checkpoint) as reader,
        pytest.raises(CheckpointError, match=f"tensor 'w' has dtype {stored}; {target} was expected"),
    ):
        fill(reader, [item])


@pytest.mark.parametrize("target", ["F32", "BF16"])
@pytest.mark.parametrize("missing_bytes", [1, 300, 4000])
def test_a_file_cut_after_its_header_was_read_is_an_error(
    write: WriteCheckpoint, monkeypatch: pytest.MonkeyPatch, target: str, missing_bytes: int
) -> None:
    monkeypatch.setattr(fill_module, "CHUNK_BYTES", 256)
    checkpoint = write({"w": _random((64, 16), "F32")})
    file = checkpoint["w"].file
    with CheckpointReader(checkpoint) as reader:
        os.truncate(file, file.stat().st_size - missing_bytes)
        with pytest.raises(CheckpointError, match=r"tensor 'w' ends \d+ bytes early; the file was truncated"):
            fill(reader, [_whole(checkpoint, "w", target)])


def test_progress_never_goes_back_and_ends_at_the_bytes_read(write: WriteCheckpoint, chunk_bytes: int) -> None:
    checkpoint = write({"a": _random((50, 30), "BF16"), "b": _random((7, 9), "U32"), "c": _random((11,), "F16")})
    fills = [_whole(checkpoint, name, dtype) for name, dtype in (("a", "F32"), ("b", "U32"), ("c", "BF16"))]
    fills.append(ReadRange(allocate((3, 30), "BF16"), 0, "BF16", checkpoint["a"], 10, 13))
    told: list[int] = []
    with CheckpointReader(checkpoint) as reader:
        fill(reader, fills, told.append)
    assert told == sorted(told)
    assert told[-1] == checkpoint.nbytes + 3 * 60
    assert sum(item.nbytes for item in fills) == told[-1]


def test_progress_is_told_on_the_calling_thread(write: WriteCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill_module, "CHUNK_BYTES", 64)
    checkpoint = write({"w": _random((200, 16), "F32")})
    threads: set[int] = set()
    with CheckpointReader(checkpoint) as reader:
        fill(reader, [_whole(checkpoint, "w", "F32")], lambda done: threads.add(threading.get_ident()))
    assert threads == {threading.get_ident()}


def _reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mlx-mixtral-read")]


def test_an_interrupt_stops_the_reading_and_leaves_no_threads(
    write: WriteCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill_module, "CHUNK_BYTES", 64)
    checkpoint = write({"w": _random((5000, 16), "F32")})
    started: list[int] = []
    released = threading.Event()

    class SlowReader(CheckpointReader):
        """One read is quick; the others last until after the interrupt."""

        def read(self, *arguments: Any, **options: Any) -> None:
            started.append(len(started))
            if len(started) > 1:
                assert released.wait(30)
            super().read(*arguments, **options)

    def interrupt(done: int) -> None:
        if done:
            threading.Timer(0.5, released.set).start()
            raise KeyboardInterrupt

    with SlowReader(checkpoint) as reader, pytest.raises(KeyboardInterrupt):
        fill(reader, [_whole(checkpoint, "w", "F32")], interrupt)
    assert _reading_threads() == []
    # The quick one and what the threads had in hand; of 5000 chunks, and of the queue, nothing more.
    assert len(started) <= 1 + fill_module.READ_THREADS


@pytest.mark.parametrize("target", ["F32", "F16"])
def test_an_error_in_one_chunk_ends_the_others_and_leaves_no_threads(
    write: WriteCheckpoint, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr(fill_module, "CHUNK_BYTES", 64)
    values = np.ones((3000, 16), np.float32)
    values[0, 0] = np.nan
    checkpoint = write({"w": mx.array(values)})
    told: list[int] = []
    with CheckpointReader(checkpoint) as reader, pytest.raises(NonFiniteWeightsError, match="in row 0;"):
        fill(reader, [_whole(checkpoint, "w", target)], told.append)
    assert _reading_threads() == []
    assert not told or told[-1] < checkpoint.nbytes


def test_files_of_the_safetensors_package_fill_too(tmp_path: Path) -> None:
    values = np.random.default_rng(3).standard_normal((4, 6, 8)).astype(np.float16)
    safetensors.numpy.save_file({"w": values}, tmp_path / "any-name.safetensors", {"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    item = _whole(checkpoint, "w", "F16")
    with CheckpointReader(checkpoint) as reader:
        fill(reader, [item])
    np.testing.assert_array_equal(np.asarray(item.array), values)


@pytest.mark.parametrize("dtype", sorted(MLX_DTYPES))
def test_allocated_arrays_have_memory_of_their_own(dtype: str) -> None:
    one, two = allocate((3, 4), dtype), allocate((3, 4), dtype)
    assert (one.shape, one.dtype) == ((3, 4), MLX_DTYPES[dtype])
    np.frombuffer(one, np.uint8)[:] = 1  # type: ignore[call-overload]
    assert _bits(one).sum() == one.nbytes
    assert _bits(two).sum() == 0


def test_threads_that_read_never_ask_an_array_for_its_memory(
    write: WriteCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads that wait for one array at once can crash MLX: a segmentation fault once in a thousand loads."""
    asked: list[tuple[int, int]] = []
    real = fill_module.bytes_of

    def bytes_of(array: mx.array) -> npt.NDArray[np.uint8]:
        asked.append((id(array), threading.get_ident()))
        return real(array)

    monkeypatch.setattr(fill_module, "bytes_of", bytes_of)
    monkeypatch.setattr(fill_module, "CHUNK_BYTES", 512)
    checkpoint = write({"a": _random((64, 64), "F32"), "b": _random((64, 64), "BF16")})
    fills = [_whole(checkpoint, "a", "F32"), _whole(checkpoint, "b", "F32")]
    with CheckpointReader(checkpoint) as reader:
        fill(reader, fills)
    assert asked == [(id(item.array), threading.get_ident()) for item in fills]
