"""PEFT's ``rank_pattern`` and ``alpha_pattern``: values for modules that end in a name, or in what an expression matches.

The expressions are a stranger's: only those are matched that cannot take long.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_mixtral.arguments import shown
from mlx_mixtral.errors import CheckpointError

__all__ = ["Patterns"]

MAX_EXPRESSIONS = 8
MAX_CHARACTERS = 200
# Ways to match a name that has about 40 places: each repetition can end at any of them, each alternative doubles them.
MAX_WAYS = 2**17
PLACES = 40
_NAME = re.compile(r"[\w.-]+")
_ESCAPE = re.compile(r"\\.", re.DOTALL)
_REPETITION = re.compile(r"[*+{]|(?<!\()\?")
# Groups that repeat, groups that are more than brackets, and sets that Python may one day read otherwise.
_REFUSED = re.compile(r"\)[*+{]|\(\?(?!:)|\[[^\]]*(?:\[|--|&&|~~|\|\|)")


class Patterns:
    """Names and expressions in their order; ``where`` names the file and the key.

    Raises:
        CheckpointError: an expression that is none, or may take long, or too many of them.
    """

    def __init__(self, where: str, entries: Mapping[str, Any]) -> None:
        self._names: dict[str, tuple[int, Any]] = {}
        self._expressions: list[tuple[int, re.Pattern[str], Any]] = []
        for place, (text, value) in enumerate(entries.items()):
            if _NAME.fullmatch(text):
                self._names[text] = place, value
            else:
                self._expressions.append((place, _compiled(where, text), value))
        if len(self._expressions) > MAX_EXPRESSIONS:
            raise CheckpointError(
                f"{where} has {len(self._expressions)} expressions; at most {MAX_EXPRESSIONS} are read: name the modules "
                "instead"
            )

    def value(self, *modules: str) -> Any:
        """That of the first entry which one of several names of a module ends in; None if there is none."""
        found = [self._names[end] for module in modules for end in _ends(module) if end in self._names]
        first = min(found, default=None, key=lambda item: item[0])
        for place, pattern, value in self._expressions:
            if first is not None and first[0] < place:
                break
            if any(pattern.match(module) for module in modules):
                return value
        return None if first is None else first[1]


def _ends(module: str) -> Iterator[str]:
    parts = module.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _compiled(where: str, text: str) -> re.Pattern[str]:
    plain = _ESCAPE.sub("x", text)
    choices = len(_REPETITION.findall(plain)), plain.count("|")
    if len(text) > MAX_CHARACTERS or PLACES ** choices[0] * 2 ** choices[1] > MAX_WAYS or _REFUSED.search(plain):
        raise CheckpointError(
            f"{where} has the expression {shown(text)}; only short ones with few repetitions and alternatives are read, and no "
            "repeated groups: name the modules instead"
        )
    try:
        return re.compile(rf"(.*\.)?({text})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where} has {shown(text)}, which is no expression: {error}") from error
