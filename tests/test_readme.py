"""The README says what the code does: its table is computed, its Python runs, its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_mixtral.cli.app import app
from mlx_mixtral.info.shape import memory_table_markdown

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
CONSOLE = [line[2:] for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL) for line in block.splitlines()
           if line.startswith("$ ")]  # fmt: skip
COMMANDS = sorted({line for line in CONSOLE if line.startswith("mlx-mixtral ")})


def test_the_memory_table_is_the_one_info_computes() -> None:
    assert memory_table_markdown() in README


def test_the_python_session_runs(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code.replace('"mixtral-4bit"', repr(str(tiny))), "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 200


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_shown_parses(line: str) -> None:
    """Parsed by the real program, stopped before it does anything: the model does not exist."""
    name, *arguments = shlex.split(line)[1:]
    command = app.get_command(None, name)  # type: ignore[arg-type]
    assert command is not None
    command.make_context(name, arguments)


def test_every_command_of_the_program_is_in_the_table() -> None:
    listed = set(re.findall(r"^\| `mlx-mixtral (\w+)", README, re.MULTILINE))
    result = CliRunner().invoke(app, ["--help"])
    shown = set(re.findall(r"^  (\w+)  ", result.output.split("Commands:")[1], re.MULTILINE))
    assert listed == shown
