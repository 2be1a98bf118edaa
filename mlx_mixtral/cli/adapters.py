"""The adapters of a command: fetched, looked at before weights are read, and named in what it prints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_mixtral import Mixtral
from mlx_mixtral.adapters.opening import open_adapter
from mlx_mixtral.adapters.source import AdapterSource
from mlx_mixtral.cli.console import one_line
from mlx_mixtral.cli.progress import byte_progress
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.hub import Source

__all__ = ["AdapterFacts", "adapter_notes", "adapter_used", "fetch_adapters", "look_at"]


@dataclass(frozen=True)
class AdapterFacts:
    """What results say of the adapter that they were computed with."""

    name: str
    kind: str
    scale: float
    fingerprint: str

    @property
    def title(self) -> str:
        """Its name, and its scale where that is not 1."""
        return self.name if self.scale == 1 else f"{self.name} (scale {self.scale:g})"

    @property
    def identity(self) -> str:
        """Tells results with it from all others; its name is no part of it."""
        return f"{self.fingerprint} {self.scale!r}"

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return asdict(self)


def fetch_adapters(sources: Sequence[AdapterSource]) -> tuple[AdapterSource, ...]:
    """``sources`` by the folders they lie in, downloaded first where they are repositories; their names stay.

    Raises:
        CheckpointError, HubError: see ``Source.resolve_adapter``.
    """
    found = []
    for source in sources:
        with byte_progress("downloading", visible=False) as show:
            folder = Source.parse(source.path, source.revision).resolve_adapter(progress=show)
        found.append(AdapterSource(folder, source.label, source.scale))
    return tuple(found)


def look_at(source: AdapterSource, config: MixtralConfig) -> AdapterFacts:
    """What the adapter is, checked against the model of ``config``. Raises as ``open_adapter``."""
    with contextlib.closing(
        open_adapter(source.path, config, scale=source.scale, revision=source.revision, name=source.label)
    ) as adapter:
        return AdapterFacts(source.label, adapter.kind, adapter.scale, adapter.fingerprint)


def adapter_used(model: Mixtral) -> AdapterFacts | None:
    """The adapter in use; None for the model itself."""
    if (name := model.adapters.in_use) is None:
        return None
    info = model.adapters[name]
    return AdapterFacts(name, info.kind, info.scale, info.fingerprint)


def adapter_notes(model: Mixtral) -> Iterator[str]:
    """What is to be said of the adapters of a loaded model."""
    for name in model.adapters:
        for message in model.adapters[name].notes:
            yield f"adapter {name}: {one_line(message)}"
