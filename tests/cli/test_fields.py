"""A dataclass as the options of a command: what is declared is what is parsed, helped and handed over."""

from __future__ import annotations

from dataclasses import dataclass, replace

import click
from click.testing import CliRunner

from mlx_mixtral.cli.fields import argument, flag, flag_name, group, is_given, option, takes


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
        "-w, --word TEXT Repeatable.",
        "--size N How much. [default: 5]",
        "--share FLOAT Of it.",
        "--loud Or not.",
    ]
