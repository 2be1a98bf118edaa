"""Headers are checked before they are believed: every way to damage one ends in a CheckpointError, never in wrong bytes."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.safetensors import ITEM_BYTES, TensorInfo, read_header, read_into

Entry = dict[str, Any]


def _file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _tensor(dtype: Any, shape: Any, begin: Any, end: Any) -> Entry:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SMALL = _file(
    {
        "__metadata__": {"format": "pt"},
        "a": _tensor("F32", [2, 3], 0, 24),
        "b": _tensor("U8", [5], 24, 29),
        "scalar": _tensor("BF16", [], 29, 31),
        "empty": _tensor("F16", [0, 4], 31, 31),
    },
    bytes(range(31)),
)


@pytest.fixture
def make(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return path

    return write


def test_a_valid_file_gives_names_shapes_and_byte_ranges(make: Callable[[bytes], Path]) -> None:
    path = make(SMALL)
    tensors = read_header(path)
    start = len(SMALL) - 31
    assert tensors == {
        "a": TensorInfo("a", path, "F32", (2, 3), start, 24),
        "b": TensorInfo("b", path, "U8", (5,), start + 24, 5),
        "scalar": TensorInfo("scalar", path, "BF16", (), start + 29, 2),
        "empty": TensorInfo("empty", path, "F16", (0, 4), start + 31, 0),
    }
    assert [(t.rows, t.row_bytes) for t in tensors.values()] == [(2, 12), (1, 5), (1, 2), (0, 0)]


def test_a_file_cut_at_any_byte_is_refused(make: Callable[[bytes], Path]) -> None:
    for length in range(len(SMALL)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read_header(make(SMALL[:length]))


def _one(**changes: Any) -> dict[str, Entry]:
    return {"a": _tensor("U8", [4], 0, 4) | changes}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has 0 bytes; a safetensors file starts with 8"),
        (b"1234567", "has 7 bytes"),
        (_file(b"{}", length=3), "the header claims 3 bytes, but the file has 10"),
        (_file(b"{}", length=2**64 - 1), f"the header claims {2**64 - 1} bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4221\n", "is a git-lfs pointer"),
        (_file(b"\xff\xfe{}"), "not valid JSON"),
        (_file(b"[" * 100_000), "not valid JSON"),
        (_file(b""), "not valid JSON"),
        (_file([1]), "holds a JSON list, not an object"),
        (_file(None), "holds a JSON NoneType, not an object"),
        (_file({"a": 3}), "'a' has no description"),
        (_file({"a": {}}, b""), "'a' has dtype None"),
        (_file(_one(dtype="F33"), b"1234"), "'a' has dtype 'F33', which is not known"),
        (_file(_one(dtype=["U8"]), b"1234"), "'a' has dtype"),
        (_file(_one(dtype=5), b"1234"), "'a' has dtype 5"),
        (_file(_one(shape=4), b"1234"), "'a' has shape 4"),
        (_file(_one(shape=[-4]), b"1234"), r"'a' has shape \[-4\]"),
        (_file(_one(shape=[-2, -2]), b"1234"), "'a' has shape"),
        (_file(_one(shape=[4.0]), b"1234"), "'a' has shape"),
        (_file(_one(shape=[True, 4]), b"1234"), "'a' has shape"),
        (_file(_one(shape=None), b"1234"), "'a' has shape None"),
        (_file(_one(shape=[2**63]), b"1234"), "'a' has shape"),
        (_file(_one(shape=[2**63, 0], data_offsets=[0, 0]), b""), "'a' has shape"),
        (_file(_one(shape=[2**62, 2**62]), b"1234"), f"needs {2**124} bytes"),
        (_file(_one(shape=[1] * 33 + [4]), b"1234"), "'a' has shape"),
        (_file(_one(shape=[3]), b"1234"), "needs 3 bytes, its range has 4"),
        (_file(_one(dtype="F32"), b"1234"), "needs 16 bytes, its range has 4"),
        (_file(_one(data_offsets=[-4, 0]), b"1234"), "'a' has data offsets"),
        (_file(_one(data_offsets=[4, 0]), b"1234"), "its range has -4"),
        (_file(_one(data_offsets=[0]), b"1234"), "'a' has data offsets"),
        (_file(_one(data_offsets=[0, 2, 4]), b"1234"), "'a' has data offsets"),
        (_file(_one(data_offsets=[0.0, 4.0]), b"1234"), "'a' has data offsets"),
        (_file(_one(data_offsets=None), b"1234"), "'a' has data offsets None"),
        (_file(_one(data_offsets=[False, 4]), b"1234"), "'a' has data offsets"),
        (_file(_one(data_offsets=[2**62, 2**62 + 4]), b"1234"), "only 4 are there; the file is truncated"),
        (_file(_one(), b"123"), "only 3 are there; the file is truncated"),
        (_file(_one(), b"12345"), "1 bytes at the end belong to no tensor"),
        (_file(_one(data_offsets=[1, 5]), b"12345"), "1 bytes before tensor 'a' belong to no tensor"),
        (_file(_one() | {"b": _tensor("U8", [4], 0, 4)}, b"1234"), "'a' and 'b' share bytes"),
        (_file(_one() | {"b": _tensor("U8", [4], 2, 6)}, b"123456"), "'a' and 'b' share bytes"),
        (_file(_one() | {"b": _tensor("U8", [1], 5, 6)}, b"123456"), "1 bytes before tensor 'b'"),
        (_file({}, b"1"), "1 bytes at the end"),
    ],
)
def test_a_damaged_header_is_named(make: Callable[[bytes], Path], content: bytes, said: str) -> None:
    path = make(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_shape_of_a_million_axes_is_refused_at_once(make: Callable[[bytes], Path]) -> None:
    # Their product would take hours.
    with pytest.raises(CheckpointError, match="'a' has shape") as caught:
        read_header(make(_file(_one(shape=[2**62] * 1_000_000), b"1234")))
    assert len(str(caught.value)) < 1000


def test_a_claimed_header_is_not_allocated_before_it_is_believed(make: Callable[[bytes], Path]) -> None:
    path = make(_file(b"{}", length=2**40))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_huge_header_in_a_huge_file_is_refused_unread(make: Callable[[bytes], Path]) -> None:
    path = make(struct.pack("<Q", 2**32))
    os.truncate(path, 2**33)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"the header has {2**32} bytes; at most"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_missing_file_or_a_folder_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


def _accepted_by_the_package(path: Path) -> dict[str, tuple[list[int], str]] | None:
    try:
        with safe_open(path, "numpy") as file:
            return {
                name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in list(file.keys())
            }
    except (SafetensorError, OverflowError):
        return None


@settings(max_examples=400, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 3),
)
def test_random_damage_gives_an_error_or_a_mapping_within_the_file(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], cut: int
) -> None:
    content = bytearray(SMALL)
    for at, value in edits:
        content[at] = value
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(bytes(content[: len(content) - cut]))
    tracemalloc.start()
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20
    size = path.stat().st_size
    for info in tensors.values():
        assert 8 <= info.offset <= info.offset + info.nbytes <= size
        assert info.nbytes == int(np.prod(info.shape, dtype=object)) * ITEM_BYTES[info.dtype]
    # Whatever is taken, the reference implementation takes too, and reads the same.
    reference = _accepted_by_the_package(path)
    if reference is not None:
        assert {name: (list(info.shape), info.dtype) for name, info in tensors.items()} == reference


NUMPY = {"F64": np.float64, "I64": np.int64, "F32": np.float32, "I32": np.int32, "F16": np.float16, "I16": np.int16,
         "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "I8": np.int8, "BOOL": np.bool_}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(NUMPY)), st.lists(st.integers(0, 5), max_size=4)),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 2**32 - 1),
    metadata=st.booleans(),
)
def test_files_of_the_safetensors_package_are_read_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: dict[str, tuple[str, list[int]]],
    seed: int,
    metadata: bool,
) -> None:
    generator = np.random.default_rng(seed)
    arrays = {
        name: generator.integers(0, 2, shape).astype(NUMPY[dtype])
        if dtype == "BOOL"
        else np.frombuffer(
            generator.bytes(int(np.prod(shape)) * np.dtype(NUMPY[dtype]).itemsize), NUMPY[dtype]
        ).reshape(shape)
        for name, (dtype, shape) in shapes.items()
    }
    path = tmp_path_factory.getbasetemp() / "theirs.safetensors"
    safetensors.numpy.save_file(arrays, path, {"format": "np"} if metadata else None)
    tensors = read_header(path)
    assert tensors.keys() == arrays.keys()
    with path.open("rb") as file:
        for name, array in arrays.items():
            info = tensors[name]
            assert (info.dtype, list(info.shape)) == (shapes[name][0], shapes[name][1])
            buffer = bytearray(info.nbytes)
            read_into(file.fileno(), memoryview(buffer), info.offset, name)
            assert bytes(buffer) == array.tobytes()


def test_read_into_reads_from_the_offset_and_names_what_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(100)))
    with path.open("rb") as file:
        buffer = bytearray(10)
        read_into(file.fileno(), memoryview(buffer), 90, "tensor x")
        assert bytes(buffer) == bytes(range(90, 100))
        with pytest.raises(CheckpointError, match="tensor x ends 4 bytes early; the file was truncated"):
            read_into(file.fileno(), memoryview(buffer), 94, "tensor x")
        with pytest.raises(CheckpointError, match="tensor x ends 10 bytes early"):
            read_into(file.fileno(), memoryview(buffer), 10**9, "tensor x")


def test_read_into_goes_on_after_a_short_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(100)))
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: whole(fd, [buffers[0][:7]], at))
    with path.open("rb") as file:
        buffer = bytearray(50)
        read_into(file.fileno(), memoryview(buffer), 20, "x")
    assert bytes(buffer) == bytes(range(20, 70))


def test_a_failing_disk_is_a_checkpoint_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match="tensor x cannot be read: Input/output error"):
        read_into(0, memoryview(bytearray(4)), 0, "tensor x")


def test_more_tensors_than_any_model_has_are_refused(make: Callable[[bytes], Path]) -> None:
    header = {f"t{number}": _tensor("U8", [0], 0, 0) for number in range(2**17 + 1)}
    with pytest.raises(CheckpointError, match="lists 131073 tensors; no model has more than 131072"):
        read_header(make(_file(header, b"")))


@pytest.mark.parametrize("dtype", ["x" * 60_000, ["U8"] * 10_000])
def test_what_a_header_says_is_repeated_in_part_only(make: Callable[[bytes], Path], dtype: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_header(make(_file(_one(dtype=dtype), b"1234")))
    assert len(str(caught.value)) < 500
    with pytest.raises(CheckpointError, match="a tensor's name has 60000 characters; at most 512"):
        read_header(make(_file({"x" * 60_000: _tensor("U8", [4], 0, 4)}, b"1234")))


def test_a_name_that_is_there_twice_is_refused(make: Callable[[bytes], Path]) -> None:
    """Which of them wins differs from reader to reader."""
    one = json.dumps(_one())[1:-1]
    raw = f"{{{one}, {one}}}".encode()
    with pytest.raises(CheckpointError, match="the key 'a' occurs twice"):
        read_header(make(struct.pack("<Q", len(raw)) + raw + b"1234"))
