"""From what a body says of its answer's form to a constraint that a row keeps, compiled away from the loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_mixtral.server.service import Service
from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.server.wire.structure import wanted_structure

__all__ = ["constraint_for"]


async def constraint_for(service: Service, body: Mapping[str, Any], own: Any = None) -> Any:
    """The compiled constraint of a body with ``STRUCTURE_FIELDS``; ``own`` where it says nothing; None for any text.

    Raises:
        ApiError: 400: it cannot be kept; 503: too many are being compiled.
    """
    wanted = wanted_structure(body)
    if wanted is None and own is None:
        return None
    raise ApiError(400, "structured answers are not supported here; leave the field out", "response_format")
