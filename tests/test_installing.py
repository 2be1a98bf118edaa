"""What is installed how, said in one way by the project's file, the page, the messages and the code that needs it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from mlx_mixtral.installing import how_to_install
from tests.markdown import blocks_of_code, code_spans, tables_as_written

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PAGE = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
SOURCES = [*(ROOT / "mlx_mixtral").rglob("*.py"), *(ROOT / "convert").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "Makefile"]


def _package(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]


INSTALLED = {_package(each) for each in PROJECT["dependencies"]}


def _calls() -> list[tuple[str, list[str]]]:
    """Every call of ``how_to_install`` in the sources, with its arguments."""
    return [
        (path.name, [str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)])
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "how_to_install"
    ]


def test_the_table_of_extras_is_the_projects() -> None:
    (table,) = [table for table in tables_as_written(PAGE) if table[0][0] == "extra"]
    told = {row[0].strip("`"): set(code_spans(row[1])) for row in table[1:]}
    assert told == {name: set(map(_package, packages)) for name, packages in EXTRAS.items()}


def test_messages_name_what_the_extra_brings_or_what_is_installed_anyway() -> None:
    calls = _calls()
    assert len(calls) >= 8
    for where, (package, *extra) in calls:
        if extra:
            assert package in map(_package, EXTRAS[extra[0]]), where
        else:
            assert package in INSTALLED | {"mlx-lm"}, where
    assert {extra[0] for _, (_, *extra) in calls if extra} == set(EXTRAS) - {"cpu", "cuda"}


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda path: path.name)
def test_extras_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for extras in re.findall(r"(?<![\w.])(?:mlx-mixtral|\.)\[([a-z][a-z,]*)\]", text):
        assert set(extras.split(",")) <= set(EXTRAS), (path, extras)
    if path.suffix == ".py" and path.name not in ("installing.py", "platforms.py", "card.py"):
        assert not re.search(r"""pip install (?!--)['"\w]""", text), f"{path} tells how to install on its own"


def test_lines_to_install_from_a_checkout_name_it() -> None:
    lines = [
        line[2:].partition("#")[0].strip()
        for path in PAGES
        if path.suffix == ".md"
        for language, code in blocks_of_code(path.read_text(encoding="utf-8"))
        for line in code.splitlines()
        if language == "console" and re.match(r"\$ (pip|uv|pipx) ", line)
    ]
    assert len(lines) > 7
    for line in lines:
        wanted = r"'?\.(\[[a-z,]+\])?'?$|'mlx-mixtral\[[a-z]+\]'$|--group \w+$|inject mlx-mixtral [\w-]+$|--wheel-dir dist \.$"
        assert re.search(wanted, line), line


def test_the_command_is_that_of_the_programs_own_installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert how_to_install("matplotlib", "plots") == "`pip install 'mlx-mixtral[plots]'`"
    assert how_to_install("gguf") == "`pip install gguf`"
    (tmp_path / "uv-receipt.toml").touch()
    assert how_to_install("matplotlib", "plots") == f"`uv pip install --python {tmp_path} matplotlib`"
    (tmp_path / "pipx_metadata.json").touch()
    assert how_to_install("lm-eval", "eval") == "`pipx inject mlx-mixtral lm-eval`"
