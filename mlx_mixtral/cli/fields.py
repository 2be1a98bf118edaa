"""Options of a command as one frozen dataclass: each is declared beside the field it fills, and nowhere else.

    @dataclass(frozen=True)
    class Options:
        model: str = argument()
        window: int | None = option("--window N", "Tokens read at once.")
        loading: LoadOptions = group(LoadOptions)

    @click.command()
    @takes(Options)
    def command(given: Options) -> None: ...

``--help`` has them in the order of the fields, those of a group where the group is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, fields
from typing import Any, get_type_hints

import click
from click.core import ParameterSource

from mlx_mixtral.cli.values import kind_of_value
from mlx_mixtral.errors import InvalidRequestError

__all__ = [
    "SETTINGS", "argument", "filled", "flag", "flag_name", "group", "is_given", "option", "takes", "values_of",
]  # fmt: skip


SETTINGS = "mlx_mixtral.settings"
"""Under which a context keeps the path of the file that defaults are from."""
_DEFAULT = re.compile(r"  \[default: [^\]]*\]$")


class _Option(click.Option):
    """An option whose default may be from the user's file, which help and errors then name."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        try:
            return super().process_value(ctx, value)
        except (click.BadParameter, InvalidRequestError) as error:
            if ctx.get_parameter_source(self.name or "") is not ParameterSource.DEFAULT_MAP:
                raise
            said = error.message if isinstance(error, click.BadParameter) else str(error)
            key = next(flag for flag in self.opts if flag.startswith("--")).removeprefix("--")
            raise InvalidRequestError(f"{ctx.meta.get(SETTINGS)}: [{ctx.info_name}] {key}: {said}") from None

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record, given = super().get_help_record(ctx), ctx.lookup_default(self.name or "")
        if record is None or given is None:
            return record
        shown = ", ".join(map(str, given)) if isinstance(given, list) else str(given)
        shown = shown.lower() if isinstance(given, bool) else shown
        return record[0], f"{_DEFAULT.sub('', record[1])}  [default: {shown}, from the settings file]"


def argument(**attributes: Any) -> Any:
    """A field that an argument of its name fills; ``attributes`` as ``click.argument`` takes them."""
    metadata = {"click": (click.argument, (), attributes)}
    return field(metadata=metadata) if attributes.get("required", True) else field(default=None, metadata=metadata)


def option(spec: str, help: str, **attributes: Any) -> Any:
    """A field that an option fills, written as in ``--help``: its flags and what stands for its value.

    Numbers get their type from the field's, and the default is shown: that of the field, or what the help says of None; other
    ``attributes`` as ``click.option`` takes them.
    """
    names, _, metavar = spec.replace(", ", ",").partition(" ")
    if "default" not in attributes and "[default:" not in help:
        help += "  [default: none]"
    given = {
        "help": help,
        "metavar": metavar or None,
        "show_default": "default" in attributes,
        "cls": _Option,
        **attributes,
    }
    default = attributes.get("default", () if attributes.get("multiple") else None)
    return field(default=default, metadata={"click": (click.option, names.split(","), given)})


def flag(spec: str, help: str) -> Any:
    """A field that is True where its option is given."""
    return option(spec, help, is_flag=True, default=False, show_default=False)


def group(kind: type, **defaults: Any) -> Any:
    """A field of options of their own, some of them with other ``defaults``."""
    return field(default_factory=functools.partial(kind, **defaults), metadata={"group": defaults})


def takes(kind: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options ``kind`` declares; it is called with one of them."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def run(*arguments: Any, **values: Any) -> Any:
            return command(*arguments, filled(kind, values))

        for declare in reversed(list(_declarations(kind, {}))):
            declare(run)
        return run

    return decorate


def _declarations(kind: type, defaults: Mapping[str, Any]) -> Iterator[Callable[..., Any]]:
    hints = get_type_hints(kind)
    for item in fields(kind):
        hint = hints[item.name]
        if "group" in item.metadata:
            yield from _declarations(hint, item.metadata["group"])
            continue
        declare, flags, attributes = item.metadata["click"]
        number = next((kind for kind in (int, float) if hint in (kind, kind | None)), None)
        kind_of = kind_of_value(attributes.get("metavar"), hint) or number
        given = {"type": kind_of} | attributes if kind_of else dict(attributes)
        if item.name in defaults:
            given["default"] = defaults[item.name]
        yield declare(*flags, item.name, **given)


def filled(kind: type, values: Mapping[str, Any]) -> Any:
    """One of ``kind``, its groups included, of the values that ``values_of`` gives."""
    hints = get_type_hints(kind)
    return kind(
        **{
            item.name: filled(hints[item.name], values) if "group" in item.metadata else values[item.name]
            for item in fields(kind)
        }
    )


def values_of(given: Any) -> dict[str, Any]:
    """The values of all fields by their names, those of groups among them."""
    found: dict[str, Any] = {}
    for item in fields(given):
        value = getattr(given, item.name)
        found |= values_of(value) if "group" in item.metadata else {item.name: value}
    return found


def is_given(ctx: click.Context, name: str) -> bool:
    """Whether the option of a field was typed, be it with its default."""
    return ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP, None)


def flag_name(ctx: click.Context, name: str) -> str:
    """How the option of a field is typed: ``--text`` for ``texts``."""
    return next(parameter.opts[0] for parameter in ctx.command.params if parameter.name == name)
