"""Hidden states in a file, against the same in an array."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlx_mixtral.errors import DestinationError, DiskSpaceError
from mlx_mixtral_convert.calibration import states as room
from mlx_mixtral_convert.calibration.states import States, Stored, pieces

LENGTH, WIDTH, COUNT = 5, 8, 7


@pytest.fixture(autouse=True, params=[0, 4 * WIDTH * 17, 2**20], ids=["in a file", "some in a file", "held"])
def small_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PIECE", 4)
    monkeypatch.setattr(room, "HELD_BYTES", request.param)


def numbers(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.fixture
def filled(tmp_path: Path) -> tuple[States, npt.NDArray[np.float32]]:
    x = numbers(COUNT, LENGTH, WIDTH)
    states = States(LENGTH, WIDTH, tmp_path)
    states.append(mx.array(x[:3]))
    states.append(mx.array(x[3:]))
    return states, x


def test_what_is_written_is_read(filled: tuple[States, npt.NDArray[np.float32]]) -> None:
    states, x = filled
    assert (states.count, states.tokens, states.nbytes) == (COUNT, COUNT * LENGTH, x.nbytes)
    assert np.array_equal(np.array(states.sequences()), x)
    assert np.array_equal(np.array(states.sequences(2, 4)), x[2:4])
    assert np.array_equal(np.array(states.sequences(6, 99)), x[6:])
    assert np.array_equal(np.array(states.rows(slice(3, 11))), x.reshape(-1, WIDTH)[3:11])
    assert b"".join(states.chunks()) == x.tobytes()


def test_tokens_are_taken_in_any_order_and_added_to(filled: tuple[States, npt.NDArray[np.float32]]) -> None:
    states, x = filled
    flat = x.reshape(-1, WIDTH).copy()
    drawn = np.array([7, 3, 4, 5, 34, 0, 0, 1], np.int32)
    assert np.array_equal(np.array(states.take(drawn)), flat[drawn])
    tokens, more = np.array([0, 1, 2, 9, 11, 12, 34], np.int32), numbers(7, WIDTH)
    states.add(tokens, mx.array(more))
    flat[tokens] += more
    assert np.array_equal(np.array(states.sequences()).reshape(-1, WIDTH), flat)
    states.add(np.zeros(0, np.int32), mx.zeros((0, WIDTH)))
    assert states.take(np.zeros(0, np.int32)).shape == (0, WIDTH)


def test_sequences_are_put_in_place_and_copied(filled: tuple[States, npt.NDArray[np.float32]], tmp_path: Path) -> None:
    states, x = filled
    states.put(2, mx.array(x[:2] * 3))
    x[2:4] = x[:2] * 3
    other = States(LENGTH, WIDTH, tmp_path)
    other.fill(states.count, lambda piece: states.rows(piece) * 2)
    assert np.array_equal(np.array(other.sequences()), x * 2)
    stored = tmp_path / "stored"
    stored.write_bytes(b"x" * 24 + x.tobytes() + b"after")
    other.load(Stored(stored, 24, x.shape))
    assert np.array_equal(np.array(other.sequences()), x)


def test_pieces_cover_all_tokens_once() -> None:
    assert list(pieces(10)) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert list(pieces(0)) == []


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def test_nothing_is_left_of_it(tmp_path: Path) -> None:
    """No name while it is there, no open file when it has gone."""
    gc.collect()
    before, many = open_files(), mx.zeros((COUNT, LENGTH, WIDTH))
    states = States(LENGTH, WIDTH, tmp_path)
    states.append(many)
    assert list(tmp_path.iterdir()) == []
    assert open_files() == before + (states.nbytes > room.HELD_BYTES)
    del states
    gc.collect()
    assert open_files() == before
    closed = States(LENGTH, WIDTH, tmp_path)
    closed.append(many)
    closed.close()
    closed.close()
    assert open_files() == before


def test_a_folder_that_takes_no_file_and_a_full_disk_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "HELD_BYTES", 0)
    with pytest.raises(DestinationError, match="absent cannot be written"):
        States(LENGTH, WIDTH, tmp_path / "absent").append(mx.zeros((1, LENGTH, WIDTH)))
    states = States(LENGTH, WIDTH, tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(DiskSpaceError, match="the disk is full"):
        states.append(mx.zeros((1, LENGTH, WIDTH)))
