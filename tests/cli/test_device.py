"""``--device``: where a command computes, set before anything is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_mixtral.cli.options import LoadOptions
from mlx_mixtral.machine.bandwidth import copy_rates

from .conftest import Invoke, assert_one_error
from .test_app import ENVIRONMENT

# Enough of a command to be refused by its device alone.
COMMANDS = {
    "demo": (),
    "doctor": (),
    "convert": ("source", "dest"),
    "calibrate": ("source", "file"),
    "bench": ("model",),
    "evaluate": ("model", "--passkey"),
    "routing": ("model", "--text", "x"),
    "report": ("model",),
    "generate": ("model", "-p", "x"),
    "chat": ("model",),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_gpu_that_is_not_there_is_one_line(invoke: Invoke, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "is_available", lambda device: False)
    assert_one_error(invoke(command, *COMMANDS[command], "--device", "gpu"), "device 'gpu' is not available", "use cpu")


def test_another_device_is_a_usage_error(invoke: Invoke) -> None:
    assert invoke("generate", "model", "-p", "x", "--device", "npu").exit_code == 2


def test_results_name_the_device(invoke: Invoke, quantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_mixtral.bench.run.copy_rates", lambda repeats: copy_rates(2**22, repeats))
    few = ("--prompt", 3, "--depth", "none", "--batch", "none", "--repeats", 1)
    found = json.loads(invoke("bench", quantised, *few, "--device", "cpu", "--json").stdout)
    assert (found["device"]["kind"], found["compute_dtype"]) == ("cpu", "float32")


def test_the_device_is_that_of_the_whole_process_before_the_rest_is_imported(quantised: Path) -> None:
    """Also of libraries that take MLX's default when they are imported, as mlx-lm does."""
    code = (
        "import sys, mlx.core as mx\n"
        "def set_device(device):\n"
        "    print(device == mx.Device(mx.cpu), 'mlx_mixtral.runtime.load' in sys.modules, file=sys.stderr)\n"
        "mx.set_default_device = set_device\n"
        "from mlx_mixtral.cli import main\nmain()"
    )
    command = [sys.executable, "-c", code, "generate", str(quantised), "-p", "And", "-n", "2", "--device", "cpu"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.splitlines()[0] == "True False"


def test_a_run_that_goes_on_is_of_the_device_it_began_on() -> None:
    here, there = LoadOptions().identity(), LoadOptions(device="cpu").identity()
    assert "device" not in here
    assert there == here | {"device": "cpu"}
