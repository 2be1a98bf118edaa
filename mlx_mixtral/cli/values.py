"""What the value of an option or argument is, to check it and to complete it in a shell: paths, models, adapters, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from mlx_mixtral.adapters.source import AdapterSource
from mlx_mixtral.arguments import as_path
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.sizes import parse_size

__all__ = ["AdapterName", "ModelName", "Place", "Size", "check_adapters", "kind_of_value"]


if TYPE_CHECKING:
    Kind = click.ParamType[Any]
else:  # click before 8.4 has no generic one
    Kind = click.ParamType


class Place(Kind):
    """A path, never an empty one; a leading ``~`` is the home folder.

    Args:
        completes: ``file`` or ``dir``.
        expands: False leaves it to the command what the text is, which may be more than a path.
        as_text: whether the command gets text or a Path.
    """

    def __init__(self, completes: str, *, expands: bool = True, as_text: bool = True) -> None:
        self.name, self._expands, self._as_text = completes, expands, as_text

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        given = str(value)
        name = "the path" if param is None else _shown(param)
        if not given:
            raise InvalidRequestError(f"{name} has an empty name; give a {'folder' if self.name == 'dir' else 'file'}")
        path = as_path(name, given) if self._expands else Path(given)
        if not self._as_text:
            return path
        return str(path) if self._expands and given.startswith("~") else given

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
        return [CompletionItem(incomplete, type=self.name)]


class ModelName(Kind):
    """A folder or a repository of the hub; completed to folders (``files``: and files), and to models in the hub's cache."""

    name = "model"

    def __init__(self, *, files: bool = False) -> None:
        self._places = "file" if files else "dir"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
        from mlx_mixtral.cli.models.names import cached_models

        cached = [CompletionItem(name) for name in cached_models() if name.lower().startswith(incomplete.lower())]
        # A shell that is given words adds no paths of its own: beside models only folders that are near.
        if not cached:
            return [CompletionItem(incomplete, type=self._places)]
        folder, _, start = incomplete.rpartition("/")
        place = Path(folder or ".")
        near = sorted(path.name for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
        prefix = f"{folder}/" if folder else ""
        visible = (name for name in near if name.startswith(start) and not name.startswith("."))
        return [*(CompletionItem(f"{prefix}{name}") for name in visible), *cached]


class AdapterName(Kind):
    """``[NAME=]PATH[=SCALE]``, as an ``AdapterSource``; completed to folders."""

    name = "adapter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> AdapterSource:
        return value if isinstance(value, AdapterSource) else AdapterSource.parse(str(value))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
        return [CompletionItem(incomplete, type="dir")]


# Commands that can go from one adapter to another; the others compute with one.
SEVERAL_ADAPTERS = ("chat", "serve")


def check_adapters(
    ctx: click.Context, param: click.Parameter, given: tuple[AdapterSource, ...]
) -> tuple[AdapterSource, ...]:
    """Option callback: as many as the command can have, each with a name of its own; refused before a download."""
    if len(given) > 1:
        if ctx.command.name not in SEVERAL_ADAPTERS:
            raise InvalidRequestError(f"{ctx.command.name} takes one adapter, not {len(given)}; leave the others out")
        from mlx_mixtral.runtime.adapters import sources_of

        sources_of(given)
    return given


class Size(Kind):
    """A size such as 32KB, as a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except InvalidRequestError as error:
            raise InvalidRequestError(str(error) if param is None else f"{_shown(param)}: {error}") from None


# What stands for a value in --help, and what it then is.
_PLACES = {
    "FILE": ("file", True), "DIR": ("dir", True), "FOLDER": ("dir", True),
    "PATH": ("file", False), "FILE|NAME": ("file", False), "NAME|FILE": ("file", False),
}  # fmt: skip


def kind_of_value(metavar: str | None, hint: Any) -> Kind | None:
    """The type of an option whose value stands as ``metavar`` in help and fills a field of type ``hint``; None for others."""
    if metavar in _PLACES:
        completes, expands = _PLACES[metavar]
        return Place(completes, expands=expands, as_text="Path" not in str(hint))
    if metavar in ("MODEL", "OTHER"):
        return ModelName(files=metavar == "OTHER")
    if metavar is not None and "PATH[=SCALE]" in metavar:
        return AdapterName()
    return Size() if metavar == "SIZE" and "str" not in str(hint) else None


def _shown(param: click.Parameter) -> str:
    return param.opts[0] if isinstance(param, click.Option) else param.human_readable_name
