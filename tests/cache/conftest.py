"""A model that a test has for itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_mixtral import Mixtral, load


@pytest.fixture
def own(small: Path) -> Iterator[Mixtral]:
    with load(small) as loaded:
        yield loaded
