"""Which adapter a user means, under which name, and how much of it."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mlx_mixtral.arguments import as_path, check_type, is_number, plain, shown
from mlx_mixtral.errors import InvalidRequestError

__all__ = ["AdapterSource"]

_FORM = "[NAME=]PATH[=SCALE]"
MAX_NAME_CHARACTERS = 64
_NAME = re.compile(rf"[\w.-]{{1,{MAX_NAME_CHARACTERS}}}")


@dataclass(frozen=True)
class AdapterSource:
    """A folder or a repository of the hub that holds an adapter.

    Example:
        AdapterSource("lora-math", scale=0.5)
        AdapterSource.parse("math=owner/lora-math=0.5")

    Raises:
        InvalidRequestError: a wrong type, an empty path, a scale that is not finite, or a name with other characters than
            letters, digits, ``_``, ``.`` and ``-``, or with more than 64.
    """

    path: str | Path
    """A folder, ``owner/name`` or ``owner/name@revision``."""
    name: str | None = None
    """What requests call it; None for the last part of its path (``label``)."""
    scale: float = 1.0
    """Multiplies all of its changes, beside the scale it was trained with."""
    revision: str | None = None
    """Branch, tag or commit of a repository."""

    def __post_init__(self) -> None:
        check_type("an adapter's path", self.path, (str, os.PathLike), "a folder or a repository of the hub")
        if self.path == "":
            raise InvalidRequestError(f"an adapter has an empty path; give a folder or a repository, as in {_FORM}")
        check_type("an adapter's name", self.name, (str, type(None)), "text, or None")
        check_type("an adapter's revision", self.revision, (str, type(None)), "a branch, tag or commit, or None")
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise InvalidRequestError(
                f"{shown(self.name)} cannot be the name of an adapter; use letters, digits, '_', '.' and '-', at most "
                f"{MAX_NAME_CHARACTERS}"
            )
        scale = plain(self.scale)
        if not is_number(scale) or not math.isfinite(scale):
            raise _bad_scale(str(self.path), scale)
        object.__setattr__(self, "scale", float(scale))

    @classmethod
    def parse(cls, text: str) -> AdapterSource:
        """Read ``[NAME=]PATH[=SCALE]``, as on the command line.

        The reading whose path exists wins, the one without name and scale first. Where none does, the path is a
        repository: what follows the last ``=`` is the scale if it is a finite number, what precedes the first the name.

        Raises:
            InvalidRequestError: as the class, or the text has neither form.
        """
        check_type("an adapter", text, str, f"text: {_FORM}")
        if _exists(text):
            return cls(text)
        rest, equals, last = text.rpartition("=")
        scale = _number(last) if equals else None
        if scale is not None and _exists(rest):
            return cls(rest, scale=scale)
        name, _, path = text.partition("=")
        if _exists(path) and _NAME.fullmatch(name):
            return cls(path, name)
        if scale is None:
            if equals and (_exists(rest) or _exists(rest.partition("=")[2])):
                raise _bad_scale(rest, last)
            rest, scale = text, 1.0
        name, named, path = rest.partition("=")
        if not named:
            return cls(rest, scale=scale)
        if not path or not _NAME.fullmatch(name):
            raise InvalidRequestError(
                f"adapter {shown(text)}: no folder of this name, and not {_FORM} with a number as scale"
            )
        return cls(path, name, scale)

    @property
    def label(self) -> str:
        """Its name: the one given, or the last part of the folder's or the repository's, in a name's characters."""
        if self.name is not None:
            return self.name
        # Only here: a command's help needs nothing of the hub.
        from mlx_mixtral.hub import Source

        source = Source.parse(self.path, self.revision)
        if source.repository is not None:
            last = source.repository.rpartition("/")[2]
        else:
            last = Path(os.path.realpath(source.path or self.path)).name
        return re.sub(r"[^\w.-]+", "-", last)[:MAX_NAME_CHARACTERS] or "adapter"


def _exists(text: str) -> bool:
    return text != "" and os.path.exists(as_path("an adapter's path", text))  # noqa: PTH110 - names too long are not there


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _bad_scale(path: str, scale: object) -> InvalidRequestError:
    return InvalidRequestError(f"adapter {path}: the scale is {shown(scale)}; it must be a finite number, such as 0.5")
