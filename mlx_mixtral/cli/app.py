"""The command group: subcommands imported when they are called, errors and interrupts turned into exit statuses."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import IO, Any

import click
from click.shell_completion import CompletionItem

from mlx_mixtral import __version__
from mlx_mixtral.cli.console import note, one_line
from mlx_mixtral.cli.settings import apply, read_settings
from mlx_mixtral.cli.shell import completion, man
from mlx_mixtral.errors import InvalidRequestError, MixtralError

__all__ = ["COMMANDS", "app", "main"]

# Name -> where it lives and its line in `--help`, so that the list costs no import of MLX.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("mlx_mixtral.cli.demo:demo", "Convert and run a small bundled Mixtral."),
    "doctor": ("mlx_mixtral.cli.doctor:doctor", "Check that this machine computes correctly."),
    "info": ("mlx_mixtral.cli.info.command:info", "Show a model's size, context and memory needs."),
    "convert": ("mlx_mixtral.cli.convert.command:convert", "Convert a checkpoint to quantised MLX weights."),
    "chat": ("mlx_mixtral.cli.chat.command:chat", "Chat with an instruct model."),
    "generate": ("mlx_mixtral.cli.generate:generate", "Continue a prompt."),
    "serve": ("mlx_mixtral.cli.serve.command:serve", "Serve a model to programs that use the OpenAI API."),
    "verify": ("mlx_mixtral.cli.verify:verify", "Check a converted folder: hashes, shapes, no NaN."),
    "calibrate": ("mlx_mixtral.cli.calibrate:calibrate", "Measure a checkpoint on a text, for better conversions."),
    "bench": ("mlx_mixtral.cli.bench.command:bench", "Measure speed, alone or next to mlx-lm."),
    "evaluate": (
        "mlx_mixtral.cli.evaluate.command:evaluate",
        "Measure perplexity, distance to a reference, long context.",
    ),
    "routing": ("mlx_mixtral.cli.routing.command:routing", "Show which experts a model chooses, by domain."),
    "report": ("mlx_mixtral.cli.report.command:report", "Measure a model for its model card: Markdown and plots."),
    "upload": ("mlx_mixtral.cli.upload:upload", "Upload a conversion to the hub, with a model card."),
    "list": ("mlx_mixtral.cli.models.command:list_models", "Show the models in the hub's cache."),
    "pull": ("mlx_mixtral.cli.models.command:pull", "Fetch a model into the hub's cache."),
    "rm": ("mlx_mixtral.cli.models.command:rm", "Remove models from the hub's cache."),
}

WRONG_CALL = 2  # click's own for options that it does not know
INTERRUPTED = 130
PIPE_CLOSED = 141  # 128 + SIGPIPE: what a shell sees of any program whose reader went away


class _App(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _WORDS:
            return _WORDS[cmd_name]
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = difflib.get_close_matches(name.lower(), COMMANDS, n=1)
            advice = f"did you mean {near[0]}?" if near else "for a list, run mlx-mixtral --help"
            ctx.fail(f"there is no command {one_line(name)!r}; {advice}")
        found = super().resolve_command(ctx, args)
        if found[1] is not None and name in COMMANDS and not ctx.resilient_parsing:
            apply(ctx, read_settings(COMMANDS), name, found[1], args[1:])
        return found

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[Any]]:
        # From the list alone: click's own would import every command.
        found = [CompletionItem(name, help=line) for name, (_, line) in COMMANDS.items() if name.startswith(incomplete)]
        found += [CompletionItem(name) for name in _WORDS if incomplete and name.startswith(incomplete)]
        return found or click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            with _said():
                result = super().invoke(ctx)
            sys.stdout.flush()
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (KeyboardInterrupt, Exception) as error:
            if (status := _status(ctx, error)) is None:
                raise
            raise click.exceptions.Exit(status) from None
        return result


def _status(ctx: click.Context, error: BaseException) -> int | None:
    """The exit status for what ended a command, after one line about it; None for a fault of ours, which gets a traceback."""
    # What stops on the way out of an interrupted program may raise something else, which is no other ending.
    if any(isinstance(each, KeyboardInterrupt) for each in _chain(error)):
        note(f"interrupted{_notes(error)}")
        return INTERRUPTED
    if isinstance(error, MixtralError):
        is_usage = isinstance(error, InvalidRequestError)
        text = _with_option_names(ctx, str(error)) if is_usage else error
        note(f"error: {one_line(text)}{_notes(error)}")
        return WRONG_CALL if is_usage else 1
    if isinstance(error, BrokenPipeError):
        _drop_output()
        return PIPE_CLOSED
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate" in str(error)):
        note(
            f"error: there is not enough memory ({one_line(error)[:200] or 'allocation failed'}); close other programs"
        )
        return 1
    if isinstance(error, OSError):
        # What the library meets in files is a MixtralError: this is the output itself, a full disk for instance.
        _drop_output(keep_errors=True)
        where = f": {error.filename}" if error.filename else ""
        note(f"error: {error.strerror or error}{where}")
        return 1
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and those that were being handled when it was raised."""
    while error is not None:
        yield error
        error = error.__context__


@click.group(
    cls=_App,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="MODEL is a folder, a Hugging Face repository (owner/name) or the address of its page. "
    "Try `mlx-mixtral demo` first. `completion SHELL` and `man` print what a shell and man need.",
)
@click.version_option(__version__, "-V", "--version", message="mlx-mixtral %(version)s")
def app() -> None:
    """Run Mixtral, the sparse mixture-of-experts model, on your Mac."""


@click.command("help")
@click.argument("command", required=False)
@click.pass_context
def _help(ctx: click.Context, command: str | None) -> None:
    """Show this list, or the help of a command."""
    above = ctx.parent
    assert above is not None
    if command is None:
        click.echo(above.get_help())
        return
    name, found, _ = app.resolve_command(above, [command])
    assert found is not None
    with click.Context(found, info_name=name, parent=above) as inner:
        click.echo(found.get_help(inner))


@click.command("version")
def _version() -> None:
    """Show the version."""
    click.echo(f"mlx-mixtral {__version__}")


# Words people type where options are meant, and what is needed once, when the program is installed.
_WORDS: dict[str, click.Command] = {"completion": completion, "help": _help, "man": man, "version": _version}


class _Notes(logging.Handler):
    """What the library says while it waits, as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        note(one_line(record.getMessage()))


@contextlib.contextmanager
def _said() -> Iterator[None]:
    logger, handler = logging.getLogger("mlx_mixtral"), _Notes(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _with_option_names(ctx: click.Context, message: str) -> str:
    """A message that begins with an argument of the library, with the option's name in its place."""
    name = message.partition(" ")[0]
    command = (
        ctx.command.get_command(ctx, ctx.invoked_subcommand or "") if isinstance(ctx.command, click.Group) else None
    )
    for parameter in command.params if command is not None else ():
        flags = [flag for flag in parameter.opts if flag.startswith("--")]
        if flags and name in (parameter.name, flags[0].removeprefix("--").replace("-", "_")):
            return f"{flags[0]}{message.removeprefix(name)}"
    return message


def _notes(error: BaseException) -> str:
    """What was added to an error on its way: how to go on."""
    return "".join(f"; {one_line(text)}" for text in getattr(error, "__notes__", ()))


def main() -> None:
    """Entry point of the program; never returns."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets an escape, not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="mlx-mixtral")


def _drop_output(*, keep_errors: bool = False) -> None:
    """The reader has gone: discard what is still buffered, which the interpreter would fail to flush at exit.

    https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout,) if keep_errors else (sys.stdout, sys.stderr):
        if (descriptor := _descriptor(stream)) is not None:
            os.dup2(nowhere, descriptor)


def _descriptor(stream: IO[str]) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None
