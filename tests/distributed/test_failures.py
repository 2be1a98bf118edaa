"""What becomes of a group when one of its machines is missing, differs, fails, stalls, is killed or interrupted."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.launching import Rank, ended, ranks


def generate(folder: Path, *options: str) -> tuple[str, ...]:
    """A generation that goes on for long enough to be disturbed."""
    bias = ("--logit-bias", "2=-100")
    return ("-m", "mlx_mixtral", "generate", str(folder), "-p", "Once", "-n", "900", *bias, "--device", "cpu", *options)


def one_line(rank: Rank) -> str:
    """What it said: a line, and no traceback."""
    lines = [line for line in rank.said.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_machine_ends_the_others_at_once(tiny: Path, victim: int) -> None:
    with ranks(2, *generate(tiny, "--split", "experts")) as found:
        found[0].wait_for_text()
        found[victim].process.kill()
        started = time.monotonic()
        other = found[1 - victim]
        assert ended([other], 20) == [1]
        assert time.monotonic() - started < 20
        assert "was lost" in one_line(other)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_machine_that_stalls_is_waited_for_so_long_and_no_longer(tiny: Path, victim: int) -> None:
    with ranks(2, *generate(tiny, "--split", "layers", "--peer-timeout", "2")) as found:
        found[0].wait_for_text()
        found[victim].process.send_signal(signal.SIGSTOP)
        other = found[1 - victim]
        assert ended([other], 20) == [1]
        said = one_line(other)
        assert f"rank {1 - victim} of 2: nothing came from " in said
        assert " for 2 s; " in said


def test_machines_that_have_nothing_to_do_wait_for_a_leader_that_lives(tiny: Path) -> None:
    """For longer than they wait for an answer; and not for one that is gone."""
    script = (
        "import sys, time; from mlx_mixtral import join_group, load; group = join_group(30)\n"
        f"model = load({str(tiny)!r}, group=group, split='layers', peer_timeout_s=1.5)\n"
        "if not model.is_leader:\n    model.follow(); sys.exit(0)\n"
        "first = model.generate('Once', max_tokens=4).text; time.sleep(3)\n"
        "assert model.generate('Once', max_tokens=4).text == first\n"
        "print('done', flush=True); time.sleep(1); model.close()"
    )
    with ranks(2, "-c", script) as found:
        assert ended(found, 90) == [0, 0], [each.said for each in found]
    with ranks(3, "-c", script) as found:
        found[0].wait_for_text()
        found[0].process.kill()
        assert 0 not in ended(found[1:], 30)


def test_ctrl_c_at_the_leader_ends_all(tiny: Path) -> None:
    with ranks(2, *generate(tiny, "--split", "experts")) as found:
        found[0].wait_for_text()
        found[0].process.send_signal(signal.SIGINT)
        assert ended(found, 20) == [130, 0]
        assert found[1].said == ""


def test_ctrl_c_at_another_machine_ends_all(tiny: Path) -> None:
    with ranks(2, *generate(tiny, "--split", "experts")) as found:
        found[0].wait_for_text()
        found[1].process.send_signal(signal.SIGINT)
        assert ended(found, 20) == [1, 130]
        assert "rank 1: interrupted" in one_line(found[1])
        assert "was lost" in one_line(found[0])


def test_a_missing_machine_is_named_in_time(tiny: Path) -> None:
    script = "from mlx_mixtral import join_group; join_group(2)"
    with ranks(2, "-c", script, started=1) as found:
        started = time.monotonic()
        assert ended(found, 30) == [-signal.SIGKILL]
        assert time.monotonic() - started < 20
        assert "rank 0: not all machines of the group answered within 2 s" in one_line(found[0])


def test_machines_that_differ_say_so(tiny: Path, short: Path) -> None:
    common = ("-m", "mlx_mixtral", "generate")
    rest = ("-p", "Once", "-n", "4", "--device", "cpu")
    for own, other, said in (
        ((str(tiny), *rest), (str(short), *rest), "rank 1 has checkpoint"),
        (
            (str(tiny), *rest),
            (str(tiny), *rest, "--dtype", "float32"),
            "rank 1 has dtype 'float32', but rank 0 has 'auto'",
        ),
    ):
        with ranks(2, *common, each=[own, other]) as found:
            assert ended(found, 60) == [1, 1]
            assert said in one_line(found[0])
            assert said in one_line(found[1])


def test_what_one_finds_wrong_all_say(tiny: Path, tmp_path: Path) -> None:
    """A budget that is too small on one machine, and a folder that is not there."""
    rest = ("-p", "Once", "-n", "4", "--device", "cpu")
    own = (str(tiny), *rest)
    with ranks(2, "-m", "mlx_mixtral", "generate", each=[own, (*own, "--memory", "5MB")]) as found:
        assert ended(found, 60) == [1, 1]
        assert "rank 1: a budget of 5 MB is too small" in one_line(found[0])
        assert "rank 1: a budget of 5 MB is too small" in one_line(found[1])


def test_an_expert_that_cannot_be_read_on_one_machine_ends_all(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    budget = ("--memory", "19MB", "--context", "256", "--split", "experts")
    arguments = [generate(folder, *budget) for folder in (tiny, copy)]
    with ranks(2, each=arguments) as found:
        found[0].wait_for_text()
        for file in copy.glob("*.safetensors"):
            file.write_bytes(b"")
        assert ended(found, 30) == [1, 1]
        assert "rank 1: " in one_line(found[1])
        assert "safetensors" in one_line(found[1])
        assert "was lost" in one_line(found[0])


def test_mlx_launch_starts_it(tiny: Path) -> None:
    """The launcher itself, which exits with status 0 whatever happened."""
    import subprocess
    import sys

    from tests.distributed.launching import free_ports

    launcher = Path(sys.executable).with_name("mlx.launch")
    own = ["generate", str(tiny), "-p", "Once upon a time", "-n", "8", "--device", "cpu"]
    for _ in range(8):
        # It counts ports up from one that is free, and the next may be somebody's.
        (port,) = free_ports(1)
        started = [
            str(launcher),
            "-n",
            "2",
            "--starting-port",
            str(port),
            "--",
            sys.executable,
            "-m",
            "mlx_mixtral",
            *own,
        ]
        found = subprocess.run(
            started, capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL, check=True
        )
        if "Couldn't bind socket" not in found.stdout + found.stderr:
            break
    assert "and" in found.stdout
    assert "Traceback" not in found.stderr
