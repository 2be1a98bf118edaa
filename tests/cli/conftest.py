"""Running the program: in this process for results and errors, in one of its own for signals and pipes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlx_mixtral.cli.app import app
from mlx_mixtral.demo import checkpoint_path
from tests.processes import PYTHONPATH

Invoke = Callable[..., Result]
Spawn = Callable[..., "subprocess.Popen[bytes]"]

# A process started in the background inherits ignored interrupts; a terminal's foreground process does not.
LAUNCH = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
{before}
from mlx_mixtral.cli import main
main()
"""
# Every read of a checkpoint takes its time and says so, so that there is a middle to interrupt.
SLOW_READS = """
import os, time
# Before anything has taken the function by its name.
import mlx_mixtral.weights.safetensors as safetensors
read_into = safetensors.read_into
def slow(*arguments):
    os.write(2, b"reading\\n")
    time.sleep(0.1)
    read_into(*arguments)
safetensors.read_into = slow
"""

# So that an answer cannot end before a signal reaches the program, however busy the machine is.
SLOW_TOKENS = """
import time
import mlx_mixtral.generation.loop as loop
read_token = loop.read_token
def slow(*arguments):
    time.sleep(0.03)
    return read_token(*arguments)
loop.read_token = slow
"""
# With SLOW_TOKENS: a line on stderr with the third token.
SAYS_IT_BEGAN = """
import sys
tokens, slow_token = iter(range(10**6)), loop.read_token
def said(*arguments):
    if next(tokens) == 2:
        print("begun", file=sys.stderr, flush=True)
    return slow_token(*arguments)
loop.read_token = said
"""
# With SLOW_TOKENS: a file that appears with the twentieth token.
TOUCHES = """
from pathlib import Path
tokens, slow_token = iter(range(10**6)), loop.read_token
def said(*arguments):
    if next(tokens) == 20:
        Path({!r}).touch()
    return slow_token(*arguments)
loop.read_token = said
"""


@pytest.fixture
def invoke() -> Invoke:
    """``invoke("generate", folder, "-p", "Hi", input=b"…")`` gives exit_code, stdout, stderr."""

    def run(*arguments: object, **options: Any) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], **options)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def spawn() -> Any:
    """Starts the program as a process with pipes; whatever still runs at the end of the test is killed."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*arguments: object, before: str = "", **options: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH.format(before=before), *map(str, arguments)],
            stdin=options.pop("stdin", subprocess.PIPE),
            stdout=options.pop("stdout", subprocess.PIPE),
            stderr=options.pop("stderr", subprocess.PIPE),
            env={**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONWARNINGS": "error", **options.pop("env", {})},
            **options,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint in 4 bits, made by the program's own command."""
    folder = tmp_path_factory.mktemp("converted") / "tiny-4bit"
    result = CliRunner().invoke(app, ["convert", str(checkpoint_path()), str(folder), "--json"])
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture
def checkpoint_copy(tmp_path: Path, tiny: Path) -> Path:
    """A copy of the bundled checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def without_tokenizer(checkpoint_copy: Path) -> Path:
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (checkpoint_copy / name).unlink()
    return checkpoint_copy


def assert_one_error(result: Result, *parts: str) -> None:
    """Exit status 1, or 2 for a wrong call; nothing on stdout, one line on stderr: ``error:`` and something with ``parts``."""
    assert result.exit_code in (1, 2), (result.stdout, result.stderr)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]
