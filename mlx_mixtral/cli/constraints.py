"""Options that say what a text has to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import click

from mlx_mixtral.arguments import as_path
from mlx_mixtral.cli.fields import flag, option
from mlx_mixtral.errors import ConstraintError

if TYPE_CHECKING:
    from mlx_mixtral.constraints.specs import ConstraintSpec

__all__ = ["ConstraintOptions"]


@dataclass(frozen=True)
class ConstraintOptions:
    """What a text has to be; one of them at most."""

    json_schema: str | None = option(
        "--json-schema FILE|TEXT", "JSON that this schema validates, whole within --max-tokens."
    )
    json_object: bool = flag("--json-object", "Any JSON object.")
    regex: str | None = option("--regex PATTERN", "Text that this regular expression matches as a whole.")
    grammar: str | None = option("--grammar FILE|TEXT", "Text of this grammar, in llguidance's Lark notation.")

    def spec(self) -> ConstraintSpec | None:
        """What is asked for, checked as far as can be before any model is loaded.

        Raises:
            ConstraintError: it is refused, or its file cannot be read.
            MissingDependencyError: the package that compiles it is not installed.
        """
        given = [field.name for field in fields(self) if getattr(self, field.name) not in (None, False)]
        if not given:
            return None
        if len(given) > 1:
            names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise click.UsageError(f"{names} are two constraints; give one")
        from mlx_mixtral.constraints.grammar import check
        from mlx_mixtral.constraints.specs import Grammar, JsonObject, JsonSchema, Regex

        spec: ConstraintSpec = JsonObject()
        if self.json_schema is not None:
            spec = JsonSchema(_text("--json-schema", self.json_schema, lambda text: text.lstrip().startswith("{")))
        elif self.regex is not None:
            spec = Regex(self.regex)
        elif self.grammar is not None:
            spec = Grammar(_text("--grammar", self.grammar, lambda text: ":" in text and not _is_file(text)))
        check(spec)
        return spec


def _is_file(name: str) -> bool:
    try:
        return as_path("--grammar", name).is_file()
    except OSError:  # too long for a name
        return False


def _text(name: str, given: str, is_text: Callable[[str], bool]) -> str:
    """What was typed, or what the file of that name holds."""
    if is_text(given):
        return given
    from mlx_mixtral.constraints.limits import MAX_DEFINITION_BYTES
    from mlx_mixtral.reading import read_given

    path = as_path(name, given)
    data = read_given(path, ConstraintError)
    if len(data) > MAX_DEFINITION_BYTES:
        raise ConstraintError(
            f"{path} has {len(data)} bytes; at most {MAX_DEFINITION_BYTES} are taken: make it smaller"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConstraintError(f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}") from None
