"""Machines that agree while they load: what one finds wrong all of them say, and none waits for one that has ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mlx_mixtral.distributed.group import Group
from mlx_mixtral.errors import GroupError, MixtralError

__all__ = ["agree", "same"]

T = TypeVar("T")
MAX_CHARACTERS = 600


def agree(group: Group, work: Callable[[], T], tell: Callable[[T], Any]) -> tuple[T, list[Any]]:
    """Do a part of loading on every machine, and exchange what ``tell`` says of it (JSON), by rank. All must come here.

    Raises:
        MixtralError: of ``work``.
        GroupError: another machine's failed; with its rank and message.
    """
    problem: Exception | None = None
    said: dict[str, Any]
    try:
        result = work()
        said = {"told": tell(result)}
    except (MixtralError, OSError, RuntimeError, MemoryError) as error:
        problem = error
        said = {"error": " ".join(str(error).split())[:MAX_CHARACTERS] or type(error).__name__}
    except BaseException:
        group.texts(json.dumps({"error": "interrupted"}))
        raise
    found = [json.loads(text) for text in group.texts(json.dumps(said))]
    if problem is not None:
        raise problem
    for rank, other in enumerate(found):
        if "error" in other:
            raise GroupError(f"rank {rank}: {other['error']}")
    return result, [other["told"] for other in found]


def same(facts: list[Mapping[str, Any]]) -> None:
    """Raise GroupError, with ranks and values, where machines differ in a fact."""
    for name, expected in facts[0].items():
        for rank, other in enumerate(facts):
            if other.get(name) != expected:
                raise GroupError(
                    f"rank {rank} has {name} {other.get(name)!r}, but rank 0 has {expected!r}; make them equal on every machine"
                )
