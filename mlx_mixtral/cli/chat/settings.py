"""How an answer is generated, as options of the command line and as ``/set`` changes it in a session."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from mlx_mixtral.arguments import check_integer
from mlx_mixtral.cli.console import one_line
from mlx_mixtral.cli.fields import filled, group, option, takes, values_of
from mlx_mixtral.cli.options import SamplingOptions, StopOptions
from mlx_mixtral.errors import InvalidRequestError

__all__ = ["AnswerOptions", "AnswerSettings"]


@dataclass(frozen=True)
class AnswerOptions:
    """What may be different from one answer to the next."""

    max_tokens: int = option("-n, --max-tokens", "Most tokens of one answer.", default=1024)
    sampling: SamplingOptions = group(SamplingOptions, temperature=0.7, top_p=0.95)
    stopping: StopOptions = group(StopOptions)

    def arguments(self) -> dict[str, Any]:
        """As ``Mixtral.stream_chat`` takes them."""
        return {
            "max_tokens": self.max_tokens,
            "sampling": self.sampling.params(),
            "stop": self.stopping.stop,
            "stop_token_ids": self.stopping.stop_token_ids,
        }

    def check(self) -> None:
        """Raise InvalidRequestError for what can be refused before any model is loaded."""
        self.sampling.params()
        check_integer("max_tokens", self.max_tokens, 1)
        self.stopping.check()


@click.command()
@takes(AnswerOptions)
def _answering(given: AnswerOptions) -> None:
    """Has the options of an answer, and parses them."""


class AnswerSettings:
    """The options of an answer in force, by the names that they have on the command line.

    Args:
        options: those the session begins with; ``default`` brings one of them back.
    """

    def __init__(self, options: AnswerOptions) -> None:
        self.options = self._first = options
        self._fields = {_name(parameter): str(parameter.name) for parameter in _answering.params}

    @property
    def names(self) -> Sequence[str]:
        """What there is to set."""
        return list(self._fields)

    def set(self, name: str, text: str) -> str:
        """Change one setting, and return it as ``show`` has it.

        Args:
            text: as after the option on the command line, quoted as in a shell; several values where the option is
                repeatable. ``default`` is what the session began with, ``none`` no value where that can be.

        Raises:
            InvalidRequestError: there is no such setting, or it cannot be that; nothing has changed.
        """
        name = name.removeprefix("--").replace("_", "-")
        if (field := self._fields.get(name)) is None:
            raise InvalidRequestError(f"there is no setting {name!r}; /set lists them")
        if text == "default":
            value = values_of(self._first)[field]
        elif text == "none" and _can_be_none(field):
            value = _parsed(name, [])[field]
        else:
            value = _parsed(name, _words(name, text))[field]
        options = filled(AnswerOptions, values_of(self.options) | {field: value})
        options.check()
        self.options = options
        return self._line(name)

    def show(self, name: str | None = None) -> str:
        """A setting and its value, or all of them, a line each.

        Raises:
            InvalidRequestError: there is no such setting.
        """
        if name is None:
            return "\n".join(map(self._line, self._fields))
        if (name := name.removeprefix("--").replace("_", "-")) not in self._fields:
            raise InvalidRequestError(f"there is no setting {name!r}; /set lists them")
        return self._line(name)

    def _line(self, name: str) -> str:
        value = values_of(self.options)[self._fields[name]]
        if name == "dry-sequence-breaker":
            value = list(self.options.sampling.params().dry_sequence_breakers)
        return f"{name:<{max(map(len, self._fields))}}  {_shown(value)}"


def _name(parameter: click.Parameter) -> str:
    return next(flag for flag in parameter.opts if flag.startswith("--")).removeprefix("--")


def _can_be_none(field: str) -> bool:
    """Whether a setting has no value unless it is given one; no text breaks sequences is a value of its own."""
    return field != "dry_sequence_breakers" and _parsed(field, [])[field] in (None, (), {})


def _words(name: str, text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError:
        raise InvalidRequestError(f'{name}: a quotation mark in {text!r} is not closed; write it as \\"') from None
    is_repeatable = any(_name(parameter) == name and parameter.multiple for parameter in _answering.params)
    if not words or (len(words) > 1 and not is_repeatable):
        raise InvalidRequestError(f"{name} takes one value, and {text!r} is {len(words)}; write it in quotation marks")
    return words


def _parsed(name: str, words: Sequence[str]) -> Mapping[str, Any]:
    """All options by their fields, of a command line on which only ``name`` is given."""
    try:
        return _answering.make_context("/set", [f"--{name}={word}" for word in words]).params
    except click.UsageError as error:
        raise InvalidRequestError(f"{name}: {one_line(error.message)}") from None


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{key}={item}" for key, item in value.items()]
        return " ".join(value) or "none"
    if isinstance(value, list | tuple):
        return " ".join(json.dumps(item, ensure_ascii=False) for item in value) or "none"
    return "none" if value is None else str(value)
