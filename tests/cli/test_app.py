"""The program as a whole: what starts, what it costs, how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_mixtral import __version__
from mlx_mixtral.cli.app import COMMANDS, app
from mlx_mixtral.errors import CheckpointError
from tests.processes import PYTHONPATH

from .conftest import Invoke, Spawn, assert_one_error

ENVIRONMENT = {**os.environ, "PYTHONPATH": PYTHONPATH}


HEAVY = (
    "mlx.core", "numpy", "rich", "mlx_mixtral_convert", "transformers", "torch", "matplotlib", "huggingface_hub", "jinja2",
    "sentencepiece", "tokenizers", "safetensors", "gguf", "mlx_lm", "asyncio", "prompt_toolkit",
)  # fmt: skip


def heavy_modules_of(*arguments: str, environment: dict[str, str] = ENVIRONMENT) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own; the last line of stderr is the heavy modules it imported, in brackets."""
    code = (
        "import sys\nfrom mlx_mixtral.cli import main\nsys.argv = ['mlx-mixtral', *sys.argv[1:]]\n"
        f"try:\n    main()\nfinally:\n    print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option: str) -> None:
    done = heavy_modules_of(option)
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    assert done.stdout.startswith("Usage: mlx-mixtral" if option == "--help" else f"mlx-mixtral {__version__}")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_imports_nothing_heavy(command: str) -> None:
    done = heavy_modules_of(command, "--help")
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert f"mlx-mixtral {command}" in done.stdout


def test_python_dash_m_is_the_same_program() -> None:
    command = [sys.executable, "-m", "mlx_mixtral", "--version"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"mlx-mixtral {__version__}\n")


def test_every_listed_command_exists_and_shows_its_help(invoke: Invoke) -> None:
    listing = invoke("--help").stdout
    for name, (_, line) in COMMANDS.items():
        assert line in listing
        shown = invoke(name, "--help")
        assert shown.exit_code == 0
        assert shown.stdout.startswith(f"Usage: {app.name or 'app'} {name}") or f" {name} " in shown.stdout


def test_unknown_command_and_missing_argument_are_usage_errors(invoke: Invoke) -> None:
    assert invoke("genrate").exit_code == 2
    assert invoke("generate").exit_code == 2
    assert invoke("convert", "source-only").exit_code == 2


def test_a_reader_that_goes_away_ends_the_program_quietly(spawn: Spawn, tiny: Path) -> None:
    process = spawn("generate", tiny, "-p", "And it came to pass", "-n", 900, "--logit-bias", "2=-100")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(5)
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr.read() == b""


def test_tables_end_quietly_too_when_nobody_reads_them(spawn: Spawn) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = spawn("info", "8x7b", stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (141, b"")


def test_a_terminal_that_cannot_show_a_character_gets_an_escape(invoke: Invoke, spawn: Spawn, tiny: Path) -> None:
    arguments = ("generate", tiny, "-p", "Au commencement, Dieu", "-n", 36, "--temperature", 0.8, "--seed", 3)
    ascii_only, _ = spawn(*arguments, env={"PYTHONIOENCODING": "ascii"}).communicate(timeout=30)
    text = invoke(*arguments).stdout
    assert not text.isascii()
    assert ascii_only == text.encode("ascii", "backslashreplace")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_one_line(spawn: Spawn, tiny: Path) -> None:
    for arguments in (("info", "8x7b"), ("info", "8x7b", "--json"), ("generate", tiny, "-p", "And", "-n", "3")):
        with Path("/dev/full").open("wb") as full:
            process = spawn(*arguments, stdout=full)
            _, stderr = process.communicate()
        assert process.returncode == 1
        lines = [line for line in stderr.decode().splitlines() if "tok/s" not in line]
        assert lines == ["error: No space left on device"]


def test_closed_streams_are_empty_input_and_lost_output(tiny: Path) -> None:
    def run(redirection: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        program = "from mlx_mixtral.cli import main; main()"
        command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-c", program, *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    assert run("<&-", "chat", tiny).returncode == 0
    empty = run("<&-", "generate", tiny, "-p", "-")
    assert (empty.returncode, empty.stderr.count("\n")) == (2, 1)
    assert "the prompt is empty" in empty.stderr
    assert run(">&-", "info", "8x7b").returncode == 0


def test_a_file_of_another_format_says_how_to_convert_it(invoke: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert_one_error(invoke("generate", file, "-p", "x"), "has to be converted first: mlx-mixtral convert")
    assert_one_error(invoke("info", tmp_path), "holds a GGUF file", "mlx-mixtral convert")


@pytest.mark.parametrize(
    ("typed", "advice"),
    [("genrate", "did you mean generate?"), ("conver", "did you mean convert?"), ("xyz", "run mlx-mixtral --help")],
)
def test_a_slip_in_a_command_is_answered_with_the_one_that_was_meant(invoke: Invoke, typed: str, advice: str) -> None:
    for words in ([typed], ["help", typed]):
        result = invoke(*words)
        assert result.exit_code == 2
        assert f"there is no command '{typed}'; " in result.stderr
        assert advice in result.stderr


def test_help_and_version_are_commands_too(invoke: Invoke) -> None:
    assert invoke("help").stdout == invoke("--help").stdout
    assert invoke("help", "convert").stdout == invoke("convert", "--help").stdout
    assert invoke("version").stdout == invoke("--version").stdout


@pytest.mark.parametrize("raised", [RuntimeError("release unlocked lock"), CheckpointError("stopped"), OSError(5, "x")])
def test_what_an_interrupt_makes_fail_on_the_way_out_is_an_interruption(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raised.add_note("repeat the command to continue")
            raise raised

    monkeypatch.setattr("mlx_mixtral_convert.verify", interrupted)
    result = invoke("verify", ".")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "interrupted; repeat the command to continue\n"


def test_a_fault_of_the_programs_own_is_not_hidden(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("mlx_mixtral_convert.verify", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        invoke("verify", ".")
