"""A real disk that fills up at random moments of a conversion: one clear line each time, and the same bytes in the end."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_mixtral.errors import DiskSpaceError
from mlx_mixtral_convert import Progress, convert
from tests.convert.support import hashes, make_checkpoint

LAYERS = 6
TIMES = int(os.environ.get("MLX_MIXTRAL_TEST_FULL_DISKS", "6"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "source", num_hidden_layers=LAYERS)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a file system needs Linux and root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path, spare_bytes: int) -> None:
    """All room but a little, taken by a file."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(path, max(0, path.stat().st_size - spare_bytes))


def test_a_disk_that_fills_up_at_random_moments(tmp_path: Path, disk: Path, source: Path) -> None:
    steps: list[Progress] = []
    convert(source, tmp_path / "whole", progress=steps.append)
    expected = hashes(tmp_path / "whole")
    moments = random.Random(11)
    hog, dest, failures, kept = disk / "hog", disk / "out", 0, 0
    for _ in range(TIMES):
        at, seen = moments.randrange(len(steps)), 0

        def step(_: Progress) -> None:
            nonlocal seen
            if seen == at:  # noqa: B023
                fill(hog, moments.randrange(150_000))
            seen += 1

        try:
            convert(source, dest, progress=step)
        except DiskSpaceError as error:
            failures += 1
            assert "the disk is full" in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            assert not dest.exists()
            hog.unlink()
            kept += convert(source, dest).resumed_layers
        hog.unlink(missing_ok=True)
        assert hashes(dest) == expected
        assert sorted(path.name for path in disk.iterdir()) == ["out"]
        for path in dest.iterdir():
            path.unlink()
        dest.rmdir()
    assert failures > TIMES // 2
    assert kept > 0
