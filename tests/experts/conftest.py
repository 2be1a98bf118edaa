"""Plans that do not depend on how busy this machine is."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def _the_same_speeds_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which layers get slots follows from measured speeds: here a disk of 50 MB/s, and matrix products of 20 us."""

    def seconds(work: Callable[[], object]) -> float:
        work()
        return 2e-5

    monkeypatch.setattr("mlx_mixtral.experts.speeds._disk_bytes_per_s", lambda store, bank, layers: 5e7)
    monkeypatch.setattr("mlx_mixtral.experts.speeds._median_seconds", seconds)
