"""Models loaded once for all tests of evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_mixtral import Mixtral, load

from .support import coarse, even


@pytest.fixture(scope="session")
def coarse_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coarse(tmp_path_factory.mktemp("evaluation") / "coarse")


@pytest.fixture(scope="session")
def coarse_model(coarse_folder: Path) -> Iterator[Mixtral]:
    with load(coarse_folder) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def even_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return even(tmp_path_factory.mktemp("evaluation") / "even")


@pytest.fixture(scope="session")
def even_model(even_folder: Path) -> Iterator[Mixtral]:
    with load(even_folder) as loaded:
        yield loaded
