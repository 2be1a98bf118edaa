"""kill -9 at random moments of a conversion, and at each step of its end: the same command always finishes the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_mixtral.errors import DestinationError
from mlx_mixtral_convert import convert
from mlx_mixtral_convert.output.journal import JOURNAL
from tests.convert.support import hashes, make_checkpoint
from tests.forks import run_python
from tests.processes import PYTHONPATH

LAYERS = 6
KILLS = int(os.environ.get("MLX_MIXTRAL_TEST_KILLS", "5"))
# Slow enough to be killed in the middle, and able to kill itself at a given call that changes the disk.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from mlx_mixtral_convert import convert

source, dest, die_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = 0

def deadly(owner, name):
    genuine = getattr(owner, name)
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return genuine(*arguments, **options)
    setattr(owner, name, call)

for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")):
    deadly(owner, name)
print("ready", flush=True)
def step(_):
    if not die_at:
        print("step", flush=True)
        time.sleep(0.008)

report = convert(source, dest, progress=step)
print(report.resumed_layers, calls, flush=True)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "source", num_hidden_layers=LAYERS)


def start(source: Path, dest: Path, die_at: int = 0) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(source), str(dest), str(die_at)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def finished(partial: Path) -> int:
    """Complete lines of the journal but the first."""
    path = partial / JOURNAL
    return max(0, path.read_bytes().count(b"\n") - 1) if path.is_file() else 0


def test_killed_at_random_moments(tmp_path: Path, source: Path) -> None:
    steps: list[object] = []
    convert(source, tmp_path / "whole", progress=steps.append)
    expected = hashes(tmp_path / "whole")
    random_moments = random.Random(7)
    interrupted = layers_kept = 0
    for kill in range(KILLS):
        dest = tmp_path / f"out{kill}"
        process = start(source, dest)
        # By what it has done, not by the clock, and then at any point of the next step.
        assert process.stdout is not None
        for _ in range(random_moments.randrange(len(steps))):
            assert process.stdout.readline() == b"step\n"
        time.sleep(random_moments.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done = finished(dest.with_name(f".{dest.name}.partial"))
        if dest.is_dir():  # too late
            assert process.returncode in (0, -signal.SIGKILL)
        else:
            interrupted += 1
            report = convert(source, dest)
            assert report.resumed_layers == min(done, LAYERS)
            layers_kept += report.resumed_layers
        assert hashes(dest) == expected
    assert interrupted >= KILLS * 0.6
    assert layers_kept > 0
    print(f"{interrupted} of {KILLS} killed in the middle, {layers_kept} of {LAYERS * interrupted} layers kept")


def _converted(source: Path, dest: Path, die_at: int) -> subprocess.CompletedProcess[str]:
    return run_python(SCRIPT, [str(source), str(dest), str(die_at)], {**os.environ, "PYTHONPATH": PYTHONPATH})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A conversion of ``source`` that nobody killed, and how many calls that change the disk it took."""
    folder = tmp_path_factory.mktemp("whole")
    done = _converted(make_checkpoint(folder / "source", num_hidden_layers=LAYERS), folder / "out", -1)
    assert done.returncode == 0, done.stderr
    return folder / "out", int(done.stdout.split()[-1])


@pytest.mark.parametrize("from_the_end", range(0, 11, 2 if KILLS <= 5 else 1))
def test_killed_at_each_step_of_the_end(
    tmp_path: Path, source: Path, whole: tuple[Path, int], from_the_end: int
) -> None:
    """Writing the small files, the rename that makes the destination, and what follows it."""
    unbroken, last = whole
    killed = _converted(source, tmp_path / "out", last - from_the_end)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if (tmp_path / "out").exists():
        with pytest.raises(DestinationError, match="already a finished conversion"):
            convert(source, tmp_path / "out")
    else:
        assert convert(source, tmp_path / "out").resumed_layers == LAYERS
    assert hashes(tmp_path / "out") == hashes(unbroken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
