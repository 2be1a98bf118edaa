"""Defaults of a user's own: a TOML file with a table for each command and the options' own names as keys.

    [chat]
    temperature = 0.5
    memory = "24GB"

What is typed wins over the file, and the file over what the program would take.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from mlx_mixtral.arguments import as_path, is_integer, is_number
from mlx_mixtral.cli.fields import SETTINGS
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.reading import MAX_CONFIG_BYTES, is_there, read_file

__all__ = ["EXCLUSIVE", "NEEDS", "VARIABLE", "UserSettings", "apply", "as_toml", "read_settings", "settings_path"]

VARIABLE = "MLX_MIXTRAL_CONFIG"
# Of these a command takes one: what the file says of the others counts as little as if it was not there, once one is typed.
EXCLUSIVE: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    "convert": (
        (("recipe",), ("bits", "group_size", "mode", "fit", "exact")),
        (("exact",), ("bits", "group_size", "mode", "recipe", "fit")),
        (("fit",), ("bits", "group_size", "mode", "recipe", "override", "exact")),
        (("bits", "group_size", "mode"), ("recipe", "fit", "exact")),
        (("override",), ("fit",)),
        (("dry_run",), ("upload",)),
        (("upload",), ("dry_run",)),
    ),
    "generate": (
        (("prompt", "prompt_file", "token_ids"), ("prompt", "prompt_file", "token_ids")),
        (("speculate",), ("draft",)),
        (("draft",), ("speculate",)),
    ),
    "chat": (
        (("prompt", "prompt_file"), ("prompt", "prompt_file")),
        (("system", "system_file"), ("system", "system_file")),
        (("speculate",), ("draft",)),
        (("draft",), ("speculate",)),
    ),
    "evaluate": (
        (("tasks",), ("texts", "passkey", "by_length", "reference", "save_reference", "plot")),
        (("texts", "passkey", "by_length", "reference", "save_reference"), ("tasks",)),
        (("reference",), ("save_reference", "top_k")),
    ),
    "routing": ((("trace",), ("texts", "save_trace", "max_tokens", "window")), (("texts", "save_trace"), ("trace",))),
}
# Said in the file, these count once one of the others is there, typed or in the file.
NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "info": {"context": ("memory",), "disk": ("memory",)},
    "convert": {"public": ("upload",), "context": ("fit",), "gguf_type": ("to",)},
    "generate": {"logprobs": ("as_json",)},
    "chat": {"as_json": ("prompt", "prompt_file")},
    "calibrate": {"trace": ("sensitivities",)},
    "evaluate": {
        **dict.fromkeys(("reference", "save_reference", "by_length", "window", "stride", "max_bytes"), ("texts",)),
        **dict.fromkeys(("lengths", "depths"), ("passkey",)),
        **dict.fromkeys(("shots", "limit", "task_path", "batch_size", "chat_template"), ("tasks",)),
        "plot": ("by_length", "passkey"),
        "restart": ("output", "resume"),
        "top_k": ("save_reference",),
    },
}


@dataclass(frozen=True)
class UserSettings:
    """A file of defaults: ``tables`` by command, as they are written."""

    path: Path
    is_there: bool = False
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def settings_path() -> Path:
    """Where the file is or would be: ``MLX_MIXTRAL_CONFIG``, else below ``XDG_CONFIG_HOME``, else ``~/.config``. Users without
    a home folder have none.

    Raises:
        InvalidRequestError: no path.
    """
    if named := os.environ.get(VARIABLE):
        return as_path(VARIABLE, named)
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")  # noqa: PTH111 - never raises
    if base.startswith("~/.config"):
        return Path(os.devnull)
    return as_path("XDG_CONFIG_HOME", base) / "mlx-mixtral" / "config.toml"


def read_settings(commands: Collection[str]) -> UserSettings:
    """The file, its tables looked at, not what is in them; without one there are no settings.

    Raises:
        InvalidRequestError: it cannot be read, is not TOML, or has a table of no command; one that the environment names is
            not there.
    """
    path = settings_path()
    if str(path) == os.devnull or (not os.environ.get(VARIABLE) and not is_there(path)):
        return UserSettings(path)
    data = read_file(path, MAX_CONFIG_BYTES, InvalidRequestError)
    try:
        tables = tomllib.loads(data.decode("utf-8-sig"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"{path} is not TOML: {error}") from None
    for name, table in tables.items():
        if name in commands and isinstance(table, dict):
            continue
        if isinstance(table, dict):
            raise InvalidRequestError(f"{path}: there is no command [{name}]; {_near(name, commands)}")
        raise InvalidRequestError(
            f"{path}: {name} is outside any table; write it under the name of a command, such as [chat]"
        )
    return UserSettings(path, True, tables)


def apply(
    ctx: click.Context, settings: UserSettings, name: str, command: click.Command, args: Iterable[str] = ()
) -> None:
    """Make what the file says of a command the defaults of its options.

    Args:
        ctx: of the group.
        args: what is typed behind the command's name.

    Raises:
        InvalidRequestError: a key that is no option, or a value of another type; the line names file and key.
    """
    values = _checked(settings, name, command)
    typed = _typed(ctx, name, command, args)
    for ones, others in EXCLUSIVE.get(name, ()):
        if typed.intersection(ones):
            values = {key: value for key, value in values.items() if key not in others}
    for key, needed in NEEDS.get(name, {}).items():
        if key in values and not any(other in typed or values.get(other) for other in needed):
            del values[key]
    ctx.default_map = {**(ctx.default_map or {}), name: values}
    ctx.meta[SETTINGS] = settings.path


def _typed(ctx: click.Context, name: str, command: click.Command, args: Iterable[str]) -> set[str]:
    """Names of the options on the command line."""
    with click.Context(command, info_name=name, parent=ctx, resilient_parsing=True) as inner:
        try:
            found, _, _ = command.make_parser(inner).parse_args(list(args))
        except click.UsageError:
            return set()
    # A parser fills what is absent with a value of its own, which is neither text nor a flag's.
    return {key for key, value in found.items() if isinstance(value, (str, bool, list, tuple))}


def _checked(settings: UserSettings, name: str, command: click.Command) -> dict[str, Any]:
    """What a table says by the names of fields, every key an option and every value of its type."""
    known = {
        flag.removeprefix("--"): option
        for option in command.params
        if isinstance(option, click.Option)
        for flag in option.opts
        if flag.startswith("--")
    }
    found: dict[str, Any] = {}
    for key, value in settings.tables.get(name, {}).items():
        where = f"{settings.path}: [{name}] {key}"
        if key not in known:
            raise InvalidRequestError(f"{where} is not an option of {name}; {_near(key, known)}")
        option = known[key]
        assert option.name is not None
        if option.name in found:
            raise InvalidRequestError(
                f"{where} is set twice, under two names of the same option; leave out one of them"
            )
        found[option.name] = _value(where, option, value)
    return found


def _value(where: str, option: click.Option, value: Any) -> Any:
    if option.multiple:
        if not isinstance(value, list):
            raise InvalidRequestError(
                f"{where} is {as_toml(value)}; it may be repeated and must be a list, such as [{as_toml(value)}]"
            )
        return [_scalar(where, option, item) for item in value]
    return _scalar(where, option, value)


def _scalar(where: str, option: click.Option, value: Any) -> Any:
    kind, metavar = option.type, option.metavar or ""
    if option.is_flag:
        return _of(where, value, isinstance(value, bool), "true or false")
    if isinstance(kind, click.types.IntParamType):
        return _of(where, value, is_integer(value), "a whole number")
    if isinstance(kind, click.types.FloatParamType):
        return _of(where, value, is_number(value), "a number")
    if metavar in ("LIST", "IDS") and isinstance(value, list) and all(map(is_number, value)):
        return ",".join(map(str, value))
    if "SIZE" in metavar and is_number(value) and float(value).is_integer():
        return str(int(value))
    if is_integer(value) and (metavar == "INTEGER" or isinstance(kind, click.Choice)):
        return str(value)
    return _of(where, value, isinstance(value, str), "text in quotes")


def _of(where: str, value: Any, fits: bool, wanted: str) -> Any:
    if not fits:
        raise InvalidRequestError(f"{where} is {as_toml(value)}; it must be {wanted}")
    return value


def as_toml(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, list):
        return f"[{', '.join(map(as_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return "a table" if isinstance(value, dict) else str(value)


def _near(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(word.replace("_", "-"), names, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
