"""The manual page, made from the program's own help: ``man(7)`` macros, which groff and mandoc read."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from mlx_mixtral import __version__

__all__ = ["manual"]

_NAME = "mlx-mixtral"
_FILES = """
.SH SETTINGS
Put your own defaults in a TOML file, with a table for each command and the long names of options as keys:
.PP
.nf
.RS
[chat]
temperature = 0.5
memory = "24GB"
.RE
.fi
.PP
Options on the command line override the file.
.B mlx\\-mixtral info \\-\\-settings
shows it.
.SH ENVIRONMENT
.TP
.B MLX_MIXTRAL_CONFIG
The settings file to use instead of the usual one.
.TP
.B HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN
Settings of the Hugging Face hub's client: where models are kept, whether the network is used, and your access token.
.TP
.B OMP_NUM_THREADS, OPENBLAS_NUM_THREADS
Number of threads for products on the CPU.
.SH FILES
.TP
.I ~/.config/mlx\\-mixtral/config.toml
The settings file, or below
.BR XDG_CONFIG_HOME .
.TP
.I ~/.cache/huggingface/hub
The hub's cache.
.SH EXIT STATUS
0 on success, 1 after an error, 2 after incorrect usage, 130 after an interruption, 141 if the reader of a pipe closed it.
"""


def manual(group: click.Group) -> str:
    """The page of a program, with every command and each of its options."""
    with click.Context(group, info_name=_NAME) as ctx:
        commands = [(name, group.get_command(ctx, name)) for name in group.list_commands(ctx)]
        lines = [
            f'.TH {_escaped(_NAME.upper())} 1 "" "{_NAME} {__version__}" "User Commands"',
            ".SH NAME",
            f"{_escaped(_NAME)} \\- {_escaped((group.help or '').rstrip('.'))}",
            ".SH SYNOPSIS",
            f".B {_escaped(_NAME)}",
            "[\\fB\\-\\-help\\fR] [\\fB\\-\\-version\\fR] \\fICOMMAND\\fR [\\fIARGUMENTS\\fR]",
            ".SH DESCRIPTION",
            *_paragraphs(group.epilog or ""),
            ".SH COMMANDS",
        ]
        for name, command in commands:
            if command is not None:
                with click.Context(command, info_name=name, parent=ctx) as inner:
                    lines += _command(command, inner)
    return "\n".join(lines) + _FILES


def _command(command: click.Command, ctx: click.Context) -> Iterator[str]:
    pieces = " ".join(command.collect_usage_pieces(ctx))
    yield f".SS {_escaped(f'{_NAME} {ctx.info_name} {pieces}')}"
    yield from _paragraphs(inspect.cleandoc(command.help or ""))
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None and record[1] and "--help" not in parameter.opts:
            yield ".TP"
            yield f".B {_escaped(record[0])}"
            yield from _text(" ".join(record[1].split()))


def _paragraphs(text: str) -> Iterator[str]:
    for index, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
        if index:
            yield ".PP"
        yield from _text(" ".join(paragraph.split()))


def _text(text: str) -> Iterator[str]:
    """One input line for each sentence, as the macros want it; what stands in backquotes is bold."""
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text):
        yield re.sub(r"`([^`]+)`", r"\\fB\1\\fR", _escaped(sentence))


def _escaped(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "\\&...").replace("|", "|\\:")
    return f"\\&{text}" if text.startswith((".", "'")) else text
