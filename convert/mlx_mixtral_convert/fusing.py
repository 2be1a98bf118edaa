"""Adapters of a conversion: opened with its source, and what is said of them afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_mixtral.adapters.source import AdapterSource
from mlx_mixtral.arguments import check_type, shown
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral_convert.report import FusedAdapter
from mlx_mixtral_convert.sources import Storage, TensorSource, open_source
from mlx_mixtral_convert.sources.adapted import AdaptedSource, open_adapted, touched_by

__all__ = ["OF_THE_BASE", "check_adapters", "fused_adapters", "open_fused", "recorded"]

OF_THE_BASE = (
    "the calibration is of the model without its adapters; to measure the changed one, convert it with --bits none, calibrate "
    "the result and convert that"
)
"""The note about a calibration beside adapters."""


def check_adapters(adapters: object) -> None:
    """Raise InvalidRequestError for anything but a list of AdapterSource."""
    if isinstance(adapters, str) or not isinstance(adapters, Sequence):
        raise InvalidRequestError(f"adapters is {shown(adapters)}; it must be a list of AdapterSource")
    for adapter in adapters:
        check_type("an adapter", adapter, AdapterSource, "an AdapterSource")


def open_fused(
    place: Path | Storage,
    kind: str,
    adapters: Sequence[AdapterSource],
    progress: Callable[[int, int], None] | None = None,
) -> TensorSource:
    """A source, with adapters fused in where there are any. Raises as ``open_source`` and ``open_adapted``."""
    source = open_source(place, kind)
    if not adapters:
        return source
    try:
        return open_adapted(source, adapters, progress)
    except BaseException:
        source.close()
        raise


def fused_adapters(source: TensorSource) -> tuple[FusedAdapter, ...]:
    """What a report says of the adapters of a source, in the order in which they are applied."""
    return tuple(
        FusedAdapter(a.name, a.kind, a.scale, a.fingerprint, len(touched_by(a)), max(a.ranks.values(), default=0))
        for a in (source.adapters if isinstance(source, AdaptedSource) else ())
    )


def recorded(adapter: FusedAdapter) -> dict[str, Any]:
    """What ``conversion.json`` says of it, and what an unfinished conversion is compared by."""
    return {name: value for name, value in asdict(adapter).items() if name not in ("matrices", "rank")}
