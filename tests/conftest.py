"""Fixtures the whole suite shares: the bundled checkpoint, its recorded outputs, and quantised copies made by mlx-lm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import Mixtral, load
from mlx_mixtral.demo import checkpoint_path

GOLDENS = Path(__file__).parent / "goldens"

MlxLmFolder = Callable[..., Path]


def read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays of an npz file, the file closed."""
    with np.load(path) as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The bundled trained checkpoint (bf16, Hugging Face layout, with a tokenizer)."""
    return checkpoint_path()


@pytest.fixture(scope="session")
def recorded() -> dict[str, np.ndarray[Any, Any]]:
    """transformers' float32 outputs for the bundled checkpoint: ids, logits, router_logits."""
    return read_npz(GOLDENS / "tiny-mixtral" / "reference.npz")


@pytest.fixture(scope="session")
def model(tiny: Path) -> Iterator[Mixtral]:
    with load(tiny) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def mlx_lm_folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> MlxLmFolder:
    """Makes folders with mlx-lm's own converter: ``mlx_lm_folder(q_bits=4, q_group_size=64)``; each made once."""
    from mlx_lm import convert  # type: ignore[attr-defined]

    made: dict[str, Path] = {}

    def make(source: Path | None = None, **options: Any) -> Path:
        key = repr((source, sorted((k, getattr(v, "__name__", v)) for k, v in options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("mlx-lm") / "model"
            convert(str(source or tiny), mlx_path=str(folder), quantize=True, **options)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def mlx_lm_logits() -> Callable[[Path, np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Logits of a folder computed by mlx-lm in float32: the independent implementation on the same weights."""
    from mlx_lm.utils import load_model

    def logits(folder: Path, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        network, _ = load_model(folder)
        network.set_dtype(mx.float32)
        return np.asarray(network(mx.array(ids)))

    return logits
