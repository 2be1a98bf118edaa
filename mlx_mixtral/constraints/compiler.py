"""Compiling definitions on threads of their own, within a deadline, and keeping what was compiled."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from mlx_mixtral.arguments import check_type
from mlx_mixtral.constraints.closing import ClosingRanks
from mlx_mixtral.constraints.examples import examples
from mlx_mixtral.constraints.grammar import definition, is_json, match
from mlx_mixtral.constraints.limits import MAX_COMPILE_S, MAX_COMPILED, MAX_STUCK
from mlx_mixtral.constraints.matching import CompiledConstraint
from mlx_mixtral.constraints.specs import ConstraintSpec
from mlx_mixtral.constraints.token_table import TokenTable
from mlx_mixtral.errors import BusyError, ConstraintError

__all__ = ["Compiler"]


class Compiler:
    """Compiles constraints for one vocabulary. Any thread may use it, several at once.

    A compilation runs on a thread of its own without the interpreter's lock. One that passes its deadline cannot be ended: it
    is left to itself, and while there are ``MAX_STUCK`` of them nothing more is compiled.

    Args:
        max_seconds: the deadline.
    """

    def __init__(self, vocabulary: TokenTable, *, max_seconds: float = MAX_COMPILE_S) -> None:
        self.vocabulary, self._max_seconds = vocabulary, max_seconds
        self._ranks = ClosingRanks(vocabulary)
        self._kept: OrderedDict[str, CompiledConstraint] = OrderedDict()
        self._lock = threading.Lock()
        self._stuck = 0

    def compile(self, spec: ConstraintSpec, *, from_start: bool = False) -> CompiledConstraint:
        """The constraint of ``spec``, from the last ``MAX_COMPILED`` ones or compiled now.

        Args:
            from_start: the text is shown from its beginning, as an answer is: its first space may be taken off.

        Raises:
            ConstraintError: it is refused, or takes longer than the deadline.
            BusyError: too many compilations are stuck.
        """
        check_type("constraint", spec, ConstraintSpec, "JsonSchema, Regex, Grammar or JsonObject")
        text = definition(spec, drops_first_space=from_start and spec.is_shown and self.vocabulary.strips_first_space)
        with self._lock:
            if text in self._kept:
                self._kept.move_to_end(text)
                return self._kept[text]
            if self._stuck >= MAX_STUCK:
                raise BusyError(
                    f"{self._stuck} earlier constraints are still being compiled; try again when they are done"
                )
        compiled = self._within_deadline(lambda: self._compiled(text, spec))
        with self._lock:
            self._kept[text] = compiled
            while len(self._kept) > MAX_COMPILED:
                self._kept.popitem(last=False)
        return compiled

    def _compiled(self, text: str, spec: ConstraintSpec) -> CompiledConstraint:
        matcher = match(text, self.vocabulary, spec)
        warnings = tuple(" ".join(warning.split()) for warning in matcher.get_grammar_warnings())
        return CompiledConstraint(
            matcher,
            self.vocabulary,
            self._ranks,
            is_json=is_json(spec),
            is_loose=spec.is_loose,
            examples=examples(spec),
            warnings=warnings,
        )

    def _within_deadline(self, work: Callable[[], CompiledConstraint]) -> CompiledConstraint:
        done = threading.Event()
        made: list[CompiledConstraint] = []
        failed: list[BaseException] = []
        is_stuck = False

        def run() -> None:
            try:
                made.append(work())
            except BaseException as error:
                failed.append(error)
            with self._lock:
                done.set()
                self._stuck -= is_stuck

        threading.Thread(target=run, name="mlx-mixtral-constraint", daemon=True).start()
        done.wait(self._max_seconds)
        with self._lock:
            if not done.is_set():
                is_stuck = True
                self._stuck += 1
        if is_stuck:
            raise ConstraintError(
                f"the constraint takes more than {self._max_seconds:g} s to compile; make it simpler: fewer alternatives, "
                "smaller counts"
            )
        if failed:
            raise failed[0]
        return made[0]
