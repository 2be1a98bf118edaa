"""Fixtures the whole suite shares: the bundled checkpoint, its recorded outputs, smaller models, and mlx-lm's copies.

Everything runs on MLX's CPU device in float32, whatever this machine has: goldens, and comparisons to the bit of shapes that
kernels of GPUs sum in another order. What must hold on a GPU too is in ``tests/device`` (``make test-device``).
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

# Workers are as many as cores: threads of matrix products would wait for one another. Before numpy is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Whatever defaults the user who runs the tests has set.
os.environ["MLX_MIXTRAL_CONFIG"] = os.devnull

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import Mixtral, load
from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral.layers.linear import MLX
from tests.processes import HOOKS
from tests.shared import SharedFolders, random_checkpoint, short_checkpoint

GOLDENS = Path(__file__).parent / "goldens"
IN_MEMORY = Path("/dev/shm")
LEAST_BYTES = 4 * 2**30

mx.set_default_device(mx.cpu)

MlxLmFolder = Callable[..., Path]
Loader = Callable[..., Mixtral]


def pytest_configure(config: pytest.Config) -> None:
    """Processes that tests start compute on the CPU too; temporary folders lie in memory where the system has such a place."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(HOOKS) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOOKS), *paths]))
    if os.access(IN_MEMORY, os.W_OK) and shutil.disk_usage(IN_MEMORY).free > LEAST_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Thousands of tests and what they import stay to the end: no garbage collection looks through them while tests run."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays of an npz file, the file closed."""
    with np.load(path) as archive:
        return dict(archive)


@pytest.fixture
def guarded_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a device replaced after all, by a root who runs the tests, this machine would be the worse for it."""
    replace = Path.replace

    def guarded(self: Path, target: Path) -> Path:
        assert not str(target).startswith("/dev/") or str(target).startswith("/dev/shm/"), f"{target} would be replaced"
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", guarded)


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The bundled trained checkpoint (bf16, Hugging Face layout, with a tokenizer)."""
    return checkpoint_path()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> SharedFolders:
    """Makes folders for all workers of this run: ``shared("name", make)``."""
    base = tmp_path_factory.getbasetemp()
    return SharedFolders((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared")


@pytest.fixture(scope="session")
def short(shared: SharedFolders) -> Path:
    """Two layers of the bundled checkpoint, with its tokenizer: for what needs text, not sense."""
    return shared("short", short_checkpoint)


@pytest.fixture(scope="session")
def short_model(short: Path) -> Iterator[Mixtral]:
    with load(short) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def small(shared: SharedFolders) -> Path:
    """Two narrow layers of eight experts, 256 tokens, random weights, no tokenizer: twenty times faster than the bundled."""
    return shared("small", random_checkpoint)


@pytest.fixture(scope="session")
def small_model(small: Path) -> Iterator[Mixtral]:
    with load(small) as loaded:
        yield loaded


@pytest.fixture
def disk_path() -> Iterator[Path]:
    """A temporary folder that is not in memory, where the disk is the point."""
    with tempfile.TemporaryDirectory(dir="/var/tmp" if Path("/var/tmp").is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def recorded() -> dict[str, np.ndarray[Any, Any]]:
    """transformers' float32 outputs for the bundled checkpoint: ids, logits, router_logits."""
    return read_npz(GOLDENS / "tiny-mixtral" / "reference.npz")


@pytest.fixture(scope="session")
def model(tiny: Path) -> Iterator[Mixtral]:
    with load(tiny) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def as_on_gpus() -> Loader:
    """``load`` for models that leave everything to MLX's kernels, as on GPUs: only those can be compiled."""

    def loaded(*arguments: Any, **options: Any) -> Mixtral:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mlx_mixtral.runtime.load.products_for", lambda device: MLX)
            return load(*arguments, **options)

    return loaded


@pytest.fixture(scope="session")
def mlx_lm_folder(tiny: Path, shared: SharedFolders) -> MlxLmFolder:
    """Makes folders with mlx-lm's own converter: ``mlx_lm_folder(q_bits=4, q_group_size=64)``; each made once."""
    from mlx_lm import convert  # type: ignore[attr-defined]

    def make(**options: Any) -> Path:
        name = repr(sorted((k, getattr(v, "__name__", v)) for k, v in options.items()))
        return shared(
            f"mlx-lm {name}", lambda folder: convert(str(tiny), mlx_path=str(folder), quantize=True, **options)
        )

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
