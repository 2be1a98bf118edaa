"""What one rendering of a chat template may use: steps, characters, seconds."""

from __future__ import annotations

import time
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

from jinja2 import TemplateError
from jinja2.utils import Namespace

__all__ = ["Budget", "Counted", "TemplateLimitError"]

MAX_SECONDS = 10.0


class TemplateLimitError(TemplateError):
    """A template asked for more than a chat template can need."""


class Budget:
    """What one rendering may still use, in characters and steps.

    Args:
        input_size: Characters of the messages and tools that are rendered.
    """

    def __init__(self, input_size: int) -> None:
        self._left = 20_000_000 + 64 * input_size
        self._largest = 2_000_000 + 4 * input_size
        self._deadline = time.monotonic() + MAX_SECONDS

    def charge(self, cost: int) -> None:
        """Use some of it.

        Raises:
            TemplateLimitError: There is not so much left, or the time is over.
        """
        self._left -= cost
        if self._left < 0:
            raise TemplateLimitError("it loops too often or produces too much output")
        if time.monotonic() > self._deadline:
            raise TemplateLimitError(f"it takes longer than {MAX_SECONDS:.0f} s")

    def allow(self, size: int) -> None:
        """Check the size of a value before it is made, and charge it."""
        if size > self._largest:
            raise TemplateLimitError(f"it builds a value of {size} characters or elements")
        self.charge(max(size, 0) + 1)

    def weigh(self, value: Any, *, charge_text: bool = True) -> int:
        """Characters and elements `value` has when written out, shared parts counted each time they appear."""
        weight, steps, waiting = 0, 0, [value]
        while waiting:
            item = waiting.pop()
            weight += len(item) + 1 if isinstance(item, (str, bytes, range)) else 8
            steps += 1
            if weight > self._largest or len(waiting) > self._largest:
                raise TemplateLimitError(f"it builds a value of more than {self._largest} characters or elements")
            if isinstance(item, dict):
                waiting.extend(item.keys())
                waiting.extend(item.values())
            elif isinstance(item, (list, tuple, KeysView, ValuesView, ItemsView)):
                waiting.extend(item)
            elif isinstance(item, Namespace):
                waiting.append(object.__getattribute__(item, "_Namespace__attrs"))
        self.charge(weight if charge_text else steps)
        return weight


class Counted:
    """An iterable whose every element is charged; it has a length where the original has one."""

    def __init__(self, values: Any, budget: Budget, cost: int) -> None:
        self._iterator = iter(values)
        self._length = getattr(values, "__len__", None)
        self._budget, self._cost = budget, cost

    def __iter__(self) -> Iterator[Any]:
        for value in self._iterator:
            self._budget.charge(self._cost)
            yield value

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("no length")
        return int(self._length())
