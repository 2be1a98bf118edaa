"""``doctor``: every check is shown when it ends, a failure says what it means, and a GPU's first calls are announced."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from mlx_mixtral.doctor.checks import Check, CheckFailedError
from mlx_mixtral.machine.device import Device

from .conftest import Invoke


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the doctor's checks."""
    monkeypatch.setattr("mlx_mixtral.doctor.memory_bandwidth", lambda: 2e9)
    monkeypatch.setattr("mlx_mixtral.doctor.disk_bandwidth", lambda: 1e9)

    def replace(*given: Check) -> None:
        monkeypatch.setattr("mlx_mixtral.doctor.CHECKS", given)

    return replace


def passes(dtype: str) -> str:
    return "as it should"


def fails(dtype: str) -> str:
    raise CheckFailedError("off by 7")


def test_what_ended_is_shown_when_a_later_check_does_not_end(invoke: Invoke, checks: Callable[..., None]) -> None:
    def interrupted(dtype: str) -> str:
        raise KeyboardInterrupt

    checks(Check("first", "", passes), Check("second", "", interrupted))
    result = invoke("doctor")
    assert result.exit_code == 130
    first, second = result.stdout.splitlines()[-2:]
    assert first.split() == ["first", "ok", "as", "it", "should"]
    assert second.split() == ["second"]


def test_a_failure_says_what_it_means(invoke: Invoke, checks: Callable[..., None]) -> None:
    checks(Check("good", "nothing", passes), Check("bad", "text is wrong " * 10, fails))
    result = invoke("doctor", env={"COLUMNS": "80"})
    assert (result.exit_code, result.stderr) == (1, "")
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines if line.split()[0] in ("good", "bad")] == [
        ["good", "ok"],
        ["bad", "FAILED"],
    ]
    assert "nothing" not in result.stdout
    assert "text is wrong " * 9 in " ".join(result.stdout.split())
    assert max(map(len, lines[2:])) <= 80
    assert lines[-2:] == ["memory copies at 2 GB/s, disk reads at 1 GB/s", "1 of 2 checks failed"]


def test_json_is_all_there_is_on_stdout(invoke: Invoke, checks: Callable[..., None]) -> None:
    checks(Check("bad", "bad news", fails))
    result = invoke("doctor", "--json")
    assert (result.exit_code, result.stderr) == (1, "")
    found = json.loads(result.stdout)
    assert (found["passed"], found["results"][0]["measured"]) == (False, "off by 7")


@pytest.mark.parametrize("kind", ["metal", "cuda"])
def test_a_gpu_says_up_front_that_first_calls_take_long(
    invoke: Invoke, checks: Callable[..., None], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    checks(Check("good", "", passes))
    monkeypatch.setattr("mlx_mixtral.machine.device.current_device", lambda: Device(kind, "a GPU", ""))
    for options in ((), ("--json",)):
        result = invoke("doctor", *options)
        assert result.exit_code == 0
        assert len(result.stderr.splitlines()) == 1
        assert "compiles each kernel" in result.stderr
