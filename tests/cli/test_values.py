"""Paths on the command line, in every option that takes one: ``~`` is the home folder, an empty one is an error."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from mlx_mixtral import read_texts
from mlx_mixtral.arguments import as_path
from mlx_mixtral.cli.app import COMMANDS, app
from mlx_mixtral.cli.values import ModelName, Place
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.evaluation.perplexity import evaluate
from mlx_mixtral.experts.trace import RoutingTrace
from mlx_mixtral_convert import Recipe, calibrate, named_recipe

from .conftest import Invoke

PLACES = ("FILE", "DIR", "FOLDER", "PATH", "FILE|NAME", "NAME|FILE")


def _parameters() -> list[tuple[str, click.Parameter]]:
    commands = ((name, app.get_command(None, name)) for name in COMMANDS)  # type: ignore[arg-type]
    return [(name, parameter) for name, command in commands if command is not None for parameter in command.params]


NAMED = [(name, each) for name, each in _parameters() if isinstance(each.type, Place)]


def test_every_option_whose_value_is_a_path_is_one() -> None:
    for name, parameter in _parameters():
        if isinstance(parameter, click.Option) and parameter.metavar in PLACES:
            assert isinstance(parameter.type, Place), (name, parameter.opts)
        if parameter.name in ("model", "source", "draft", "reference"):
            assert isinstance(parameter.type, ModelName), (name, parameter.opts)
    assert len(NAMED) > 25


@pytest.mark.parametrize(("command", "parameter"), NAMED, ids=[f"{name} {each.name}" for name, each in NAMED])
def test_an_empty_path_is_an_error(command: str, parameter: click.Parameter) -> None:
    with (
        click.Context(click.Command(command)) as ctx,
        pytest.raises(InvalidRequestError, match="has an empty name; give a f"),
    ):
        parameter.type.convert("", parameter, ctx)


def test_a_tilde_is_expanded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert Place("file").convert("~/x", None, None) == f"{tmp_path}/x"
    assert Place("file", as_text=False).convert("~/x", None, None) == tmp_path / "x"
    assert Place("file").convert("./x", None, None) == "./x"
    assert Place("file", expands=False).convert("news=~/x", None, None) == "news=~/x"
    # What the error about an unknown home folder advises.
    assert as_path("path", "./~nobody-here") == tmp_path / "~nobody-here"
    assert as_path("path", as_path("path", "./~nobody-here/x")) == tmp_path / "~nobody-here" / "x"


def test_every_command_finds_what_a_tilde_means(
    invoke: Invoke, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(tiny)
    (tmp_path / "t.txt").write_text("And it came to pass, that the king spoke to the people of the land. " * 4)
    assert invoke("info", "~/model").exit_code == 0
    assert invoke("generate", "~/model", "-f", "~/t.txt", "-n", "1", "--save-prompt", "~/p").exit_code == 0
    assert (tmp_path / "p").is_file()
    assert invoke("generate", "~/model", "-p", "And", "-n", "1", "--from-prompt", "~/p").exit_code == 0
    assert invoke("convert", "~/model", "~/out").exit_code == 0
    assert invoke("verify", "~/out").exit_code == 0
    assert invoke("routing", "~/model", "--text", "~/t.txt", "--save-trace", "~/trace").exit_code == 0
    assert invoke("routing", "--trace", "~/trace").exit_code == 0
    made = invoke("evaluate", "~/model", "--text", "d=~/t.txt", "--save-reference", "~/r", "--output", "~/e.json")
    assert made.exit_code == 0, made.stderr
    assert invoke("evaluate", "~/out", "--text", "d=~/t.txt", "--reference", "~/r").exit_code == 0
    assert not list(Path.cwd().glob("~*"))


def test_functions_expand_and_refuse_too(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.json").write_text('{"bits": 3}')
    assert named_recipe("~/r.json") == Recipe.from_file("~/r.json") == Recipe(3)
    for call in (
        lambda: RoutingTrace.load(""),
        lambda: Recipe.from_file(""),
        lambda: named_recipe(""),
        lambda: calibrate(tiny, [""]),
        lambda: calibrate(tiny, save=""),
    ):
        with pytest.raises(InvalidRequestError, match="empty"):
            call()


def test_a_reference_with_an_empty_name_is_not_none(invoke: Invoke, tiny: Path, tmp_path: Path, model: object) -> None:
    (tmp_path / "t.txt").write_text("And it came to pass.")
    assert "empty" in invoke("evaluate", tiny, "--text", tmp_path / "t.txt", "--reference", "").stderr
    with pytest.raises(InvalidRequestError, match="empty"):
        evaluate(model, read_texts([tmp_path / "t.txt"]), reference="")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", ["12g", "12 GB", "12GiB", "500m"])
def test_every_size_is_read_as_it_is_typed(invoke: Invoke, size: str) -> None:
    assert invoke("info", "8x7b", "--memory", "24g", "--chip", "M2 Max", "--disk", size).exit_code == 0
    options = [each for _, each in _parameters() if isinstance(each, click.Option) and "SIZE" in (each.metavar or "")]
    assert {option.opts[0] for option in options} == {
        "--memory", "--prefix-cache", "--disk", "--fit", "--max-bytes", "--max-body",
    }  # fmt: skip


def test_a_prompt_is_read_from_a_file_as_it_is(invoke: Invoke, tiny: Path, tmp_path: Path) -> None:
    file, text = tmp_path / "p.txt", "Au commencement,\n  Dieu créa"
    file.write_text(text)
    wanted = invoke("generate", tiny, "-p", text, "-n", 4).stdout
    assert invoke("generate", tiny, "--prompt-file", file, "-n", 4).stdout == wanted
    assert invoke("generate", tiny, "-f", "-", "-n", 4, input=text.encode()).stdout == wanted
    assert invoke("generate", tiny, "-f", file, "-p", "x").exit_code == 2
    assert "cannot be read" in invoke("generate", tiny, "-f", tmp_path / "absent").stderr
    file.write_bytes(b"a\xff")
    assert "is not UTF-8: byte 0xff at offset 1" in invoke("generate", tiny, "-f", file).stderr


def test_temp_is_temperature(invoke: Invoke, tiny: Path) -> None:
    arguments = ("generate", tiny, "-p", "And it came", "-n", 8, "--seed", 3)
    one, two = (invoke(*arguments, flag, 0.9).stdout for flag in ("--temp", "--temperature"))
    assert one == two != invoke(*arguments).stdout
