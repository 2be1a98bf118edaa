"""``mlx-mixtral routing``: tables, JSON and files, a saved trace, and everything refused before the work."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlx_mixtral.cli.app import app
from mlx_mixtral.cli.console import json_text
from mlx_mixtral.evaluation.routing import RoutingRecord, analyse
from mlx_mixtral.experts.trace import RoutingTrace

from .support import HELD_OUT, beginnings

Run = Callable[..., Result]
DENSE = Path(__file__).parents[2] / "goldens" / "transformers" / "mistral"


def run(*arguments: object, env: dict[str, str] | None = None) -> Result:
    result = CliRunner().invoke(app, ["routing", *map(str, arguments)], env=env or {"COLUMNS": "140"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for text in beginnings(260):
        (folder / f"{text.domain}.txt").write_text(text.text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def saved(tiny: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A trace that a run wrote, and what the run printed as JSON."""
    place = tmp_path_factory.mktemp("saved") / "routing.trace"
    result = run(tiny, "--text", texts, "--max-tokens", 64, "--save-trace", place, "--json")
    assert result.exit_code == 0, result.stderr
    return place, json.loads(result.stdout)


def test_figures_of_the_bundled_checkpoint_by_domain(saved: tuple[Path, dict[str, Any]]) -> None:
    place, found = saved
    record = RoutingRecord.load(place)
    assert (found["layers"], found["experts"], found["experts_per_token"]) == (6, 8, 2)
    assert list(found["domains"]) == [path.stem for path in sorted(HELD_OUT.glob("*.txt"))]
    assert [domain["tokens"] for domain in found["domains"].values()] == [64] * 7
    assert found["overall"] == json.loads(json_text(analyse(record).to_dict()["overall"]))
    assert np.sum(found["overall"]["shares"]["value"], axis=1) == pytest.approx(np.ones(6), abs=1e-5)
    assert found["published"]["domains"]["code"]["domain"] == "GitHub"
    assert found["random"]["repeats_either"] == pytest.approx(0.4643, abs=1e-4)


def test_a_saved_trace_gives_the_same_without_a_model(saved: tuple[Path, dict[str, Any]], tiny: Path) -> None:
    place, found = saved
    for arguments in ((), (tiny,)):
        result = run(*arguments, "--trace", place, "--json")
        assert json.loads(result.stdout) == found


def test_tables_show_the_figures_beside_the_papers(saved: tuple[Path, dict[str, Any]]) -> None:
    place, found = saved
    out = run("--trace", place, "--layers", "5,0").stdout
    code = found["domains"]["code"]["repeats_first"]
    line = next(line for line in out.splitlines() if line.startswith("code"))
    for layer in (5, 0):
        assert f"{code['value'][layer]:.1%} ± {100 * code['stderr'][layer]:.1f}" in line
    assert line.endswith(("14.9%   28.1%   19.7%", "14.9%   28.1%   19.7% "))
    assert "random" in out
    assert "46.4%" in out
    assert "Text coloured by first choice" in out
    assert "\x1b" not in out


def test_a_narrow_terminal_cuts_no_column(saved: tuple[Path, dict[str, Any]]) -> None:
    place, found = saved
    lines = run("--trace", place, env={"COLUMNS": "80"}).stdout.splitlines()
    row = next(line for line in lines if line.startswith("math")).split()
    values = [found["domains"]["math"]["repeats_first"]["value"][layer] for layer in (0, 2, 5)]
    assert row == ["math", *(f"{value:.1%}" for value in values), "DM", "Mathematics", "14.1%", "28.4%", "19.7%"]
    tables = lines[: next(at for at, line in enumerate(lines) if line.startswith("Text coloured"))]
    assert not any("…" in line for line in tables)


def test_coloured_text_has_numbers_where_there_are_no_colours(saved: tuple[Path, dict[str, Any]]) -> None:
    place, _ = saved
    record = RoutingRecord.load(place)
    out = run("--trace", place, "--layers", "0", "--sample", "3").stdout
    assert record.pieces is not None
    shown, digits = "", "⁰¹²³⁴⁵⁶⁷"
    chosen = record.trace.experts[:3, 0, 0].tolist()
    for at, expert in enumerate(chosen):
        shown += record.pieces[at] + (digits[expert] if chosen[at + 1 : at + 2] != [expert] else "")
    assert f"   0 {shown}\n" in out
    assert "coloured" not in run("--trace", place, "--sample", "0").stdout
    assert "coloured" not in run("--trace", place, "--no-text").stdout


def test_files_are_written_whole(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from .test_page import record

    record(layers=1, domains=("code",)).save(tmp_path / "r.trace")
    result = run("--trace", tmp_path / "r.trace", "--html", tmp_path / "r.html", "--plot", tmp_path / "r.png", "--json")
    assert result.exit_code == 0
    assert (tmp_path / "r.html").read_text(encoding="utf-8").endswith("</html>\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.png", "r.trace"]


def test_a_trace_without_text_holds_none(tiny: Path, texts: Path, tmp_path: Path) -> None:
    place = tmp_path / "bare.trace"
    result = run(tiny, "--text", texts / "en.txt", "--max-tokens", 20, "--no-text", "--save-trace", place)
    assert result.exit_code == 0, result.stderr
    assert RoutingRecord.load(place).pieces is None
    assert "remembered" not in place.read_bytes().decode("latin-1")


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code in (1, 2), (result.stdout, result.stderr)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights may be read: the error comes before the work."""
    monkeypatch.setattr("mlx_mixtral.cli.subject.load_model", None)


@pytest.mark.usefixtures("unloaded")
def test_what_is_wrong_is_said_before_the_work(
    tiny: Path, texts: Path, saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "Hello there, you", "domain": "a"}\n{"text": "a", "domain": "b"}\n')
    assert "dense" in refused(DENSE, "--text", texts)
    assert "domain 'b' has 1 token" in refused(tiny, "--text", tmp_path / "one.jsonl")
    assert "no folder" in refused(tiny, "--text", texts, "--html", tmp_path / "no" / "r.html")
    assert "is a folder" in refused(tiny, "--text", texts, "--plot", tmp_path)
    assert "name the same file" in refused(tiny, "--text", texts, "--plot", tmp_path / "x", "--html", tmp_path / "x")
    assert "layer 6" in refused(tiny, "--text", texts, "--layers", "0,6")
    assert "sample is -1" in refused(tiny, "--text", texts, "--sample", "-1")
    assert "window is 2" in refused(tiny, "--text", texts, "--window", "2")
    assert "not a routing trace" in refused("--trace", tiny / "model.safetensors")
    order = np.random.default_rng(0).random((5, 3, 4)).argsort(axis=2)[..., :2]
    RoutingTrace(order.astype(np.uint16), 4).save(tmp_path / "other.trace")
    assert "3 layers with 2 of 4 experts" in refused(tiny, "--trace", tmp_path / "other.trace")


@pytest.mark.parametrize("option", ["--html", "--plot"])
def test_without_matplotlib_it_says_so_before_the_work(
    option: str, saved: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("mlx_mixtral.cli.routing.job.RoutingRecord.load", None)
    assert "plots need matplotlib: `pip install 'mlx-mixtral[plots]'`" in refused(
        "--trace", saved[0], option, tmp_path / "r"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.usefixtures("unloaded")
def test_a_folder_that_cannot_be_written(tiny: Path, texts: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "not writable" in refused(tiny, "--text", texts, "--html", tmp_path / "r.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give MODEL and --text, or --trace"),
        (["model"], "give MODEL and --text, or --trace"),
        (["--trace", "x", "--text", "y"], "--text is for recording"),
        (["--trace", "x", "--max-tokens", "5"], "--max-tokens is for recording"),
        (["m", "--text", "x", "--layers", "a"], "list of layers"),
    ],
)
def test_usage(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
