"""From what a body says of its answer's form to a constraint that rows keep, compiled away from the loop and the engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_mixtral.constraints.matching import CompiledConstraint
from mlx_mixtral.constraints.specs import ConstraintSpec, Grammar, JsonObject, JsonSchema, Regex
from mlx_mixtral.errors import BusyError, ConstraintError, MissingDependencyError, MixtralError
from mlx_mixtral.server.service import Service
from mlx_mixtral.server.wire.errors import ApiError, placed
from mlx_mixtral.server.wire.structure import WantedStructure, wanted_structure

__all__ = ["WantedConstraint", "compiled_constraint", "constraint_of", "wanted_constraint"]


@dataclass(frozen=True)
class WantedConstraint:
    """What an answer has to be, and the field that says so."""

    spec: ConstraintSpec
    param: str


def wanted_constraint(body: Mapping[str, Any]) -> WantedConstraint | None:
    """What a body with ``STRUCTURE_FIELDS`` asks for; None for any text.

    Raises:
        ApiError: 400: it is no schema, or one beyond the limits; or there are several.
    """
    return constraint_of(wanted_structure(body))


def constraint_of(wanted: WantedStructure | None) -> WantedConstraint | None:
    """The constraint of a structure; None for any text. Raises ApiError 400: it is no schema, or one beyond the limits."""
    if wanted is None:
        return None
    try:
        return WantedConstraint(_spec(wanted), wanted.param)
    except MixtralError as error:
        raise ApiError(400, f"{wanted.param}: {error}", wanted.param, code="invalid_value") from None


async def compiled_constraint(
    service: Service,
    spec: ConstraintSpec | None,
    param: str,
    max_tokens: int,
    *,
    from_start: bool,
    is_optional: bool = False,
    explained: Callable[[ConstraintError], MixtralError] = lambda error: error,
) -> CompiledConstraint | None:
    """``spec``, compiled on one of the grammar threads.

    Args:
        param: the field that says so, for errors.
        max_tokens: of the answer, in which it must be possible to keep it.
        from_start: see ``Compiler.compile``.
        is_optional: whether the answer may do without where the extra is not installed.
        explained: tells more of an error.

    Raises:
        ApiError: 400: it cannot be kept; 503: too many are stuck in being compiled; 501: the extra is not installed.
    """
    if spec is None:
        return None

    def compile_it() -> CompiledConstraint:
        compiled = service.compiler.compile(spec, from_start=from_start)
        compiled.begin(max_tokens)  # raises where no text is that short
        return compiled

    try:
        return await asyncio.get_running_loop().run_in_executor(service.grammars, compile_it)
    except BusyError as error:
        raise ApiError(503, str(error), headers={"retry-after": "5"}) from None
    except MissingDependencyError as error:
        if is_optional:
            return None
        raise ApiError(501, str(error), param) from None
    except ConstraintError as error:
        told = explained(error)
        if told is not error:
            raise placed(told, param) from None
        raise ApiError(400, f"{param}: {error}", param, code="invalid_value") from None


def _spec(wanted: WantedStructure) -> ConstraintSpec:
    if wanted.kind == "json_object":
        return JsonObject()
    if wanted.kind == "json":
        given = wanted.definition
        return JsonSchema(given if isinstance(given, str) else json.dumps(given), strict=wanted.is_strict)
    if wanted.kind == "regex":
        return Regex(wanted.definition)
    if wanted.kind == "choice":
        return Grammar("start: " + " | ".join(json.dumps(option, ensure_ascii=False) for option in wanted.definition))
    return Grammar(wanted.definition)
