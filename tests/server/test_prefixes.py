"""How much a server keeps of earlier prompts: a share of the memory that is free, never less than the library does."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_mixtral import load
from mlx_mixtral.runtime.prompt_cache import DEFAULT_KEPT_BYTES
from mlx_mixtral.server import prefixes


@pytest.mark.parametrize(
    ("free", "kept"), [(40 * 10**9, 10**10), (10**6, DEFAULT_KEPT_BYTES), (None, DEFAULT_KEPT_BYTES)]
)
def test_a_share_of_what_is_free(small: Path, monkeypatch: pytest.MonkeyPatch, free: int | None, kept: int) -> None:
    monkeypatch.setattr(prefixes, "usable_bytes", lambda device, system: free)
    with load(small) as model:
        prefixes.widen_prefixes(model.engine)
        assert model.engine.prompt_cache.kept.limit_bytes == kept


def test_a_budget_stays_what_it_is(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "usable_bytes", lambda device, system: 10**12)
    with load(small, memory="40MB", context=256) as model:
        before = model.engine.prompt_cache.kept.limit_bytes
        prefixes.widen_prefixes(model.engine)
        assert model.engine.prompt_cache.kept.limit_bytes == before
