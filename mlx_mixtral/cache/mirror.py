"""Who is told what is done to caches, so that other machines do the same to theirs."""

from __future__ import annotations

from typing import Any, Literal, Protocol

__all__ = ["CacheAct", "CacheMaker", "Mirror"]

CacheMaker = Literal["cache", "batch", "fork", "take", "row", "extract"]
"""How a cache comes to be: new ones, and methods that make another."""
CacheAct = Literal["trim", "join", "keep", "take_back"]
"""Methods that change one."""


class Mirror(Protocol):
    """Told of each change after it was made, in order. ``numbers`` are the arguments, flat."""

    def made(self, how: CacheMaker, cache: Any, source: Any, *numbers: int) -> None:
        """``cache`` came to be, out of ``source`` where there is one."""

    def did(self, act: CacheAct, cache: Any, other: Any, *numbers: int) -> None:
        """``cache`` was changed; ``other`` is a cache that took part."""
