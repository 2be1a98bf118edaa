"""Text that a command is given: on its command line, in a file, or on standard input."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from mlx_mixtral.arguments import as_path
from mlx_mixtral.cli.fields import option
from mlx_mixtral.cli.several import refuse_in_group
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.reading import read_given

__all__ = ["given_text", "prompt_file_option"]


def prompt_file_option() -> Any:
    return option("-f, --prompt-file FILE", "Read the prompt from a file (UTF-8), as it is.")


def given_text(name: str, text: str | None, file: str | None, *, reads_input: bool = True) -> str | None:
    """The text of the option ``name``, or of the file that ``name``-file names; None without both.

    Args:
        reads_input: whether ``-`` as the text or the file is standard input.

    Raises:
        click.UsageError: both are given.
        InvalidRequestError: it cannot be read or is not UTF-8; the message names the byte.
    """
    if text is not None and file is not None:
        raise click.UsageError(f"give either {name} or {name}-file")
    if reads_input and "-" in (text, file):
        refuse_in_group(
            f"{name} on standard input", f"give it as text, or in {name}-file: the launcher's input never ends"
        )
        return _decoded(sys.stdin.buffer.read(), f"the {name.removeprefix('--')} on standard input")
    if file is not None:
        path = as_path(f"{name}-file", file)
        return _decoded(read_given(path, InvalidRequestError), str(path))
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        # Bytes that the locale has no characters for came as surrogates; as a rule they are UTF-8.
        return _decoded(os.fsencode(text or ""), name)
    return text


def _decoded(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{what} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; convert it with iconv"
        ) from None
