"""What the shell and ``man`` know: completion in real shells, typed at a terminal, and the manual page through its readers."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mlx_mixtral.cli.app import COMMANDS, app
from mlx_mixtral.cli.manual import manual
from tests.markdown import blocks_of_code
from tests.processes import PYTHONPATH

from .test_app import heavy_modules_of

ROOT = Path(__file__).parents[2]
# How a shell is started so that it reads the file that the page's line adds to.
SHELLS = {"bash": ["bash", "-i"], "zsh": ["zsh", "-i"], "fish": ["fish", "-i"]}
DEADLINE_S = 60


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with the program on the path, a model in the cache, and a folder of one."""
    program = tmp_path / "bin" / "mlx-mixtral"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mlx_mixtral "$@"\n')
    program.chmod(0o755)
    (tmp_path / ".config" / "fish").mkdir(parents=True)
    snapshot = tmp_path / ".cache/huggingface/hub/models--owner--Mixtral-tiny/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "mixtral"}')
    (snapshot / "model.safetensors").touch()
    (tmp_path / "here" / "mixtral-4bit" / "inner").mkdir(parents=True)
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


class Typing:
    """A shell at a terminal."""

    def __init__(self, command: list[str]) -> None:
        self._process, self._terminal = pty.fork()
        if self._process == 0:
            os.execvp(command[0], command)

    def type(self, keys: str, until: str) -> None:
        """Type, and wait for a text that the keys themselves do not have."""
        os.write(self._terminal, keys.encode())
        said, end = "", time.monotonic() + DEADLINE_S
        while until not in said:
            assert time.monotonic() < end, f"{keys!r} was answered with {said!r}"
            if select.select([self._terminal], [], [], 1)[0]:
                said += os.read(self._terminal, 4096).decode(errors="replace")

    def close(self) -> None:
        os.close(self._terminal)
        os.kill(self._process, 9)
        os.waitpid(self._process, 0)


@pytest.fixture
def shell(request: pytest.FixtureRequest, home: Path) -> Iterator[Typing]:
    name = str(request.param)
    if shutil.which(name) is None:
        pytest.skip(f"there is no {name}")
    version = subprocess.run([name, "--version"], capture_output=True, text=True).stdout
    if name == "bash" and tuple(map(int, re.findall(r"\d+", version)[:2])) < (4, 4):
        pytest.skip("an old bash")
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    (line,) = [
        line
        for language, code in blocks_of_code(page)
        for line in code.splitlines()
        if language == "sh" and f"completion {name}" in line
    ]
    subprocess.run(["sh", "-c", line], check=True)
    typing = Typing(SHELLS[name])
    yield typing
    typing.close()


@pytest.mark.parametrize("shell", SHELLS, indirect=True)
def test_a_shell_completes_after_the_line_of_the_page(shell: Typing) -> None:
    shell.type("echo rea''dy\n", until="ready\r")
    shell.type("mlx-mixtral gene\t", until="rate ")
    shell.type("--temper\t", until="ature ")
    shell.type("\x15mlx-mixtral chat own\t", until="er/Mixtral-tiny ")
    shell.type("\x15mlx-mixtral chat mixtral-4\t", until="bit")
    shell.type("i\t", until="inner")
    shell.type("\x15mlx-mixtral convert x y --mo\t", until="de ")


def complete(words: str) -> subprocess.CompletedProcess[str]:
    """What the program answers to bash."""
    environment = {**os.environ, "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - (words[-1] != " "))}
    environment |= {"_MLX_MIXTRAL_COMPLETE": "bash_complete", "PYTHONPATH": PYTHONPATH}
    return subprocess.run(
        [sys.executable, "-m", "mlx_mixtral"], capture_output=True, text=True, env=environment, check=True
    )


def test_completion_is_of_every_command_and_of_what_each_takes(home: Path) -> None:
    assert [line.partition(",")[2] for line in complete("mlx-mixtral ").stdout.splitlines()] == list(COMMANDS)
    assert complete("mlx-mixtral compl").stdout == "plain,completion\n"
    assert complete("mlx-mixtral convert ").stdout.splitlines() == ["plain,mixtral-4bit", "plain,owner/Mixtral-tiny"]
    assert complete("mlx-mixtral generate OWNER/mix").stdout == "plain,owner/Mixtral-tiny\n"
    assert complete("mlx-mixtral generate x --draft o").stdout == "plain,owner/Mixtral-tiny\n"
    assert complete("mlx-mixtral generate ./").stdout == "dir,./\n"
    assert complete("mlx-mixtral evaluate x --output e").stdout == "file,e\n"
    assert complete("mlx-mixtral info --chip").stdout == "plain,--chip\n"


def test_a_broken_settings_file_does_not_disturb_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "bad.toml").write_text("[")
    monkeypatch.setenv("MLX_MIXTRAL_CONFIG", str(home / "bad.toml"))
    assert complete("mlx-mixtral generate o").stdout == "plain,owner/Mixtral-tiny\n"


def test_completing_a_model_imports_nothing_heavy(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("COMP_WORDS", "mlx-mixtral chat o"),
        ("COMP_CWORD", "2"),
        ("_MLX_MIXTRAL_COMPLETE", "bash_complete"),
    ):
        monkeypatch.setenv(name, value)
    done = heavy_modules_of(environment=dict(os.environ))
    assert (done.stdout, done.stderr.strip()) == ("plain,owner/Mixtral-tiny\n", "[]")


def test_the_manual_page_that_is_installed_is_of_today() -> None:
    written = (ROOT / "docs" / "mlx-mixtral.1").read_text(encoding="utf-8")
    assert written == CliRunner().invoke(app, ["man"]).stdout == manual(app), "make man writes it anew"


@pytest.mark.parametrize("reader", [["groff", "-man", "-Tutf8", "-ww"], ["mandoc", "-Tutf8"]], ids=["groff", "mandoc"])
def test_the_manual_page_has_every_command_and_option(reader: list[str]) -> None:
    if shutil.which(reader[0]) is None:
        pytest.skip(f"there is no {reader[0]}")
    environment = {**os.environ, "MANWIDTH": "200", "GROFF_NO_SGR": "1"}
    done = subprocess.run(reader, input=manual(app), capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
    text = re.sub(r"\s+", " ", re.sub(r".\x08", "", done.stdout))
    for name in COMMANDS:
        command = app.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        assert f"mlx-mixtral {name}" in text
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert all(flag in text for flag in option.opts), option.opts


def test_what_the_page_escapes_is_shown_as_it_is() -> None:
    @click.group(help="A program - with a \\n in it.", epilog=".dots begin lines\n\n'quotes too")
    def odd() -> None: ...

    text = manual(odd)
    assert "A program \\- with a \\en in it" in text
    assert "\n\\&.dots begin lines\n.PP\n\\&'quotes too" in text
