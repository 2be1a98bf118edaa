"""docs/server.md says what the server does: its commands are carried out, its tables are those of the code."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import plistlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from mlx_mixtral import load
from mlx_mixtral.adapters.source import AdapterSource
from mlx_mixtral.cli.app import app
from mlx_mixtral.cli.fields import group, takes
from mlx_mixtral.cli.options import LoadOptions
from mlx_mixtral.constraints.limits import MAX_STUCK
from mlx_mixtral.generation.waiting import MAX_OVERTAKEN
from mlx_mixtral.server import bodies, service
from mlx_mixtral.server.app import PATHS
from mlx_mixtral.server.engine_thread import FAILURE_WINDOW_S, MAX_FAILURES
from mlx_mixtral.server.metrics import METRICS
from mlx_mixtral.server.options import MAX_CHOICES, ServerOptions
from mlx_mixtral.server.wire.chat import CHAT_BODY, MAX_MESSAGES
from mlx_mixtral.server.wire.completions import COMPLETION_BODY, MAX_PROMPTS
from mlx_mixtral.server.wire.errors import _KINDS
from mlx_mixtral.server.wire.openapi import BODIES
from mlx_mixtral.server.wire.sampling import MAX_TOP_LOGPROBS
from tests.adapters.made import lora
from tests.markdown import blocks_of_code, code_spans, tables_as_written
from tests.server.conftest import Running, running

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8080"
PATIENCE_S = 120


@dataclass(frozen=True)
class OnlyLoading:
    loading: LoadOptions = group(LoadOptions)


@click.command()
@takes(OnlyLoading)
def only_loading(given: OnlyLoading) -> None:
    """A command with the options that load a model, and no others."""


def _curl_lines() -> list[tuple[str, str]]:
    """Each call of curl, and what the page shows as its output."""
    found: list[tuple[str, str]] = []
    for language, code in blocks_of_code(PAGE):
        for line in code.replace("\\\n", " ").splitlines() if language == "console" else []:
            if line.startswith("$ "):
                found.append((line[2:], ""))
            elif found:
                found[-1] = (found[-1][0], found[-1][1] + line + "\n")
    return [(command, output) for command, output in found if command.startswith("curl ")]


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The bundled checkpoint, and an adapter, under the names that the page uses."""
    folder = ROOT / "mlx_mixtral" / "demo" / "tiny-mixtral"
    adapter = AdapterSource(lora(tmp_path_factory.mktemp("adapter") / "tone", folder, rank=2))
    with running(
        folder, lambda: load(folder, adapter=[adapter]), name="mixtral-4bit", aliases=(), pooling="mean"
    ) as found:
        yield found


def _same_shape(shown: Any, real: Any, place: str = "") -> None:
    """That ``real`` has the keys of ``shown`` and values of its types."""
    if isinstance(shown, dict):
        assert isinstance(real, dict), place
        assert list(shown) == list(real), place
        for key in shown:
            _same_shape(shown[key], real[key], f"{place}.{key}")
    elif isinstance(shown, list):
        assert isinstance(real, list), place
        for one, other in zip(shown, real, strict=False):
            _same_shape(one, other, f"{place}[]")
    else:
        assert type(shown) is type(real), place


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize(("line", "output"), _curl_lines(), ids=[line for line, _ in _curl_lines()])
def test_a_line_of_curl_does_what_is_shown(documented: Running, line: str, output: str) -> None:
    program, *arguments = shlex.split(line.replace(ADDRESS, documented.url))
    quiet = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    command = [program, "--silent", "--show-error", "--fail-with-body", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=quiet, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout
    shown, real = ([each for each in text.splitlines() if each] for text in (output, done.stdout))
    if output.startswith("data: "):
        assert shown[-1] == real[-1] == "data: [DONE]"
        for one, other in zip(shown[:-1], real[:-1], strict=False):
            _same_shape(*(json.loads(each.removeprefix("data: ")) for each in (one, other)))
    elif output:
        _same_shape(json.loads(output), json.loads(done.stdout))


def test_lines_of_curl_are_there() -> None:
    lines = _curl_lines()
    assert len(lines) > 12
    assert sum(bool(output) for _, output in lines) >= 3
    named = {path for _, path, _ in PATHS if any(f"{ADDRESS}{path.partition('{')[0]}" in line for line, _ in lines)}
    assert named == {path for _, path, _ in PATHS if path != "/"}


@pytest.mark.parametrize("code", [code for language, code in blocks_of_code(PAGE) if language == "python"])
def test_the_snippets_run(documented: Running, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of clients that are not installed are tried by `make clients`."""
    program = compile(code.replace(ADDRESS, documented.url), "docs/server.md", "exec")
    imported = [node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    if missing := [name for name in imported if name and importlib.util.find_spec(name) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    exec(program, {})
    assert capsys.readouterr().out.strip()


def _rows(*first: str) -> list[list[str]]:
    """The rows of all tables whose heads begin so, without those of code that is being written."""
    tables = [table for table in tables_as_written(PAGE) if tuple(table[0][: len(first)]) == first]
    assert tables, first
    return [row for table in tables for row in table[1:]]


def test_the_endpoints_are_those_there_are() -> None:
    told = {(row[0], row[1].strip("`")) for row in _rows("method", "path")}
    assert told == {("GET", "/"), *((method, path.replace(":path", "")) for method, path, _ in PATHS)}


def test_the_fields_are_those_that_are_read() -> None:
    told = [name for row in _rows("field") for name in code_spans(row[0])]
    real = {field.name for table in (CHAT_BODY, COMPLETION_BODY) for field in table.fields if field.kind is not None}
    assert set(told) == real
    # Two fields mean something else in each of the endpoints.
    assert sorted(told) == sorted([*real, "logprobs"])
    (refused,) = re.findall(r"Not supported, by name: (.*?)\.\n", PAGE, re.DOTALL)
    off = {field.name for table in (CHAT_BODY, COMPLETION_BODY) for field in table.fields if field.kind is None}
    assert sorted(code_spans(refused)) == sorted(off)
    for path in ("/tokenize", "/detokenize"):
        assert {field.name for field in BODIES[path].fields} - {"model"} <= set(code_spans(PAGE))


def test_defaults_of_fields_are_those_of_the_code() -> None:
    told = {name: row[1] for row in _rows("field") for name in code_spans(row[0])}
    for field in (*CHAT_BODY.fields, *COMPLETION_BODY.fields):
        if isinstance(field.default, bool):
            assert field.name == "logprobs" or told[field.name] == str(field.default).lower(), field.name
        elif isinstance(field.default, int | float):
            assert told[field.name] == f"{field.default:g}", field.name


def test_the_options_are_those_of_the_command_with_their_defaults() -> None:
    command = app.get_command(None, "serve")  # type: ignore[arg-type]
    assert command is not None
    loading = {each.name for each in only_loading.params}
    own = {max(each.opts, key=len): each for each in command.params if each.opts[0].startswith("-")}
    own = {name: parameter for name, parameter in own.items() if parameter.name not in loading}
    told = {name: row[1] for row in _rows("option") for name in code_spans(row[0])}
    assert set(told) == set(own)
    for name, default in told.items():
        value = own[name].default
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            assert default == (value if isinstance(value, str) else f"{value:g}"), name


def test_the_limits_are_those_of_the_code() -> None:
    options = ServerOptions()
    real = {
        "levels of nesting in a body": bodies.MAX_DEPTH,
        "values in a body": bodies.MAX_VALUES,
        "messages of a conversation": MAX_MESSAGES,
        "prompts in a request": MAX_PROMPTS,
        "answers to a prompt": MAX_CHOICES,
        "`top_logprobs`": MAX_TOP_LOGPROBS,
        "seconds for the head of a request": options.header_timeout_s,
        "seconds for its body": options.body_timeout_s,
        "seconds that a connection is kept without a request": options.keep_alive_s,
        "connections": options.max_connections,
        "bytes of a stream that wait for a slow reader": options.max_unsent_bytes,
        "compilations of schemas at once": service.GRAMMAR_THREADS,
        "times that a shorter request may overtake one that waits": MAX_OVERTAKEN,
    }
    assert {row[0]: float(row[1].replace(",", "")) for row in _rows("limit")} == real
    assert service.GRAMMAR_THREADS == MAX_STUCK
    assert f"a comment every {options.comment_s:g} seconds" in " ".join(PAGE.split())
    assert (MAX_FAILURES, FAILURE_WINDOW_S) == (3, 60)
    assert "After the third failure within a minute" in PAGE


def test_the_errors_are_those_of_the_code() -> None:
    assert [int(row[0]) for row in _rows("status")] == sorted({400, *_KINDS})


def test_the_metrics_are_those_of_the_code_and_of_the_server(documented: Running) -> None:
    told = {row[0].strip("`"): row[1] for row in _rows("metric")}
    assert told == {name: kind for name, (kind, _) in METRICS.items()}
    text = documented.client.get("/metrics").text
    assert told == dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder whose program writes down what it is called with."""
    program = tmp_path / ".local" / "bin" / "mlx-mixtral"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$HOME/called"\necho said >&2\n')
    program.chmod(0o755)
    (tmp_path / "Library" / "Logs").mkdir(parents=True)
    return tmp_path


def _called(home: Path, command: list[str]) -> list[str]:
    subprocess.run(command, env={"HOME": str(home), "PATH": "/usr/bin:/bin"}, check=True, timeout=PATIENCE_S)
    called = (home / "called").read_text().splitlines()
    name, *rest = called
    assert name == "serve"
    command_of = app.get_command(None, name)  # type: ignore[arg-type]
    assert command_of is not None
    command_of.make_context(name, rest)
    return called


def _block(language: str) -> str:
    (code,) = [code for each, code in blocks_of_code(PAGE) if each == language]
    return code


def test_the_property_list_starts_the_server(home: Path) -> None:
    told = plistlib.loads(_block("xml").encode())
    assert set(told) == {
        "Label", "ProgramArguments", "RunAtLoad", "KeepAlive", "ThrottleInterval", "ExitTimeOut", "ProcessType",
    }  # fmt: skip
    assert told["KeepAlive"] == {"SuccessfulExit": False}
    assert told["ExitTimeOut"] > ServerOptions().grace_s + 1
    assert told["ProgramArguments"][0].startswith("/")
    called = _called(home, told["ProgramArguments"])
    assert called[1] == f"{home}/models/mixtral-4bit"
    log = home / "Library" / "Logs" / "mlx-mixtral.log"
    assert log.read_text() == "said\n"
    assert log.stat().st_mode & 0o077 == 0


def test_the_unit_starts_the_server(home: Path) -> None:
    unit = _block("ini")
    settings = dict(re.findall(r"^(\w+)=(.*)$", unit, re.MULTILINE))
    assert float(settings["TimeoutStopSec"]) > ServerOptions().grace_s + 1
    called = _called(home, shlex.split(settings["ExecStart"].replace("%h", str(home))))
    assert called[1] == f"{home}/models/mixtral-4bit"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
def test_systemd_finds_nothing_wrong_with_the_unit(home: Path) -> None:
    file = home / "mlx-mixtral.service"
    file.write_text(_block("ini").replace("%h", str(home)))
    runtime = home / "run"
    runtime.mkdir(mode=0o700)
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(runtime)}
    command = ["systemd-analyze", "verify", "--user", "--man=no", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S, check=False)
    own = [line for line in done.stderr.splitlines() if "mlx-mixtral" in line]
    assert (done.returncode, own) == (0, []), done.stderr
