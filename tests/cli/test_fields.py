"""A dataclass as the options of a command: what is declared is what is parsed, helped and handed over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import click
from click.testing import CliRunner

from mlx_mixtral.cli.app import app
from mlx_mixtral.cli.convert.options import RECIPES
from mlx_mixtral.cli.fields import argument, flag, flag_name, group, is_given, option, takes
from mlx_mixtral_convert import NAMED


@dataclass(frozen=True)
class Inner:
    size: int = option("--size N", "How much.", default=3)
    share: float | None = option("--share", "Of it.")


@dataclass(frozen=True)
class Outer:
    name: str = argument()
    words: tuple[str, ...] = option("-w, --word TEXT", "Repeatable.", multiple=True)
    inner: Inner = group(Inner, size=5)
    loud: bool = flag("--loud", "Or not.")
    rest: str | None = argument(required=False)


SEEN: list[tuple[Outer, bool, str]] = []


@click.command()
@click.pass_context
@takes(Outer)
def command(ctx: click.Context, given: Outer) -> None:
    SEEN.append((given, is_given(ctx, "size"), flag_name(ctx, "words")))


def run(*arguments: str) -> tuple[Outer, bool, str]:
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    return SEEN.pop()


def test_what_is_left_out_is_as_the_dataclass_has_it() -> None:
    given, is_size_given, _ = run("x")
    assert (given, is_size_given) == (Outer("x"), False)
    assert given.inner == Inner(size=5) == replace(Inner(), size=5)


def test_every_field_is_filled_in_its_own_type() -> None:
    given, is_size_given, flag_of_words = run(
        "x", "y", "-w", "a", "--word", "b", "--size", "5", "--share", "0.5", "--loud"
    )
    assert given == Outer("x", ("a", "b"), Inner(5, 0.5), True, "y")
    assert (is_size_given, flag_of_words) == (True, "-w")
    assert CliRunner().invoke(command, ["x", "--size", "many"]).exit_code == 2


def test_help_is_in_the_order_of_the_fields() -> None:
    lines = CliRunner().invoke(command, ["--help"]).output.splitlines()
    assert lines[0] == "Usage: command [OPTIONS] NAME [REST]"
    shown = [" ".join(line.split()) for line in lines[3:7]]
    assert shown == [
        "-w, --word TEXT Repeatable. [default: none]",
        "--size N How much. [default: 5]",
        "--share FLOAT Of it. [default: none]",
        "--loud Or not.",
    ]


def _options() -> Iterator[tuple[str, click.Option]]:
    context = click.Context(app)
    for name in app.list_commands(context):
        command = app.get_command(context, name)
        assert command is not None
        yield from ((name, parameter) for parameter in command.params if isinstance(parameter, click.Option))


def test_help_shows_the_default_of_every_option_that_takes_a_value() -> None:
    for name, shown in _options():
        record = shown.get_help_record(click.Context(click.Command(name)))
        if record is not None and not shown.is_flag:
            assert record[1].count("[default: ") == 1, (name, record)


def test_help_lists_the_recipes_there_are() -> None:
    assert set(RECIPES) == set(NAMED)
