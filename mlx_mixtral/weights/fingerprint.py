"""What a file or a checkpoint is, without reading all of it.

A fingerprint stands in for the hash of a large file: the sha256 of its size, its first MiB (for safetensors the header) and
4 KiB of every 16 MiB after it. It finds another model, another download, a file cut short or still growing; one small tensor
edited in place it can miss. Modification times are not part of it: the same file copied or downloaded again is the same file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.reading import is_there, open_file
from mlx_mixtral.weights.checkpoint import Checkpoint
from mlx_mixtral.weights.manifest import MANIFEST, file_sha256

__all__ = ["checkpoint_identity", "describe_bytes", "describe_file", "file_identity"]

# Files up to this size are hashed whole.
WHOLE_BYTES = 16 * 2**20
HEAD_BYTES = 2**20
STRIDE_BYTES = 16 * 2**20
SAMPLE_BYTES = 4096


def checkpoint_identity(folder: Path) -> str:
    """Tells one checkpoint from another, wherever it lies: sha256 of its configuration and of what its weights are.

    The manifest of a conversion says that by itself; of other weights each file is described.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        names = [name for name in ("config.json", MANIFEST) if is_there(folder / name)]
        for name in names:
            digest.update(f"{name} {file_sha256(folder / name)}\n".encode())
        if MANIFEST not in names:
            for file in Checkpoint(folder).files:
                digest.update(f"{file.name} {file_identity(file)}\n".encode())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def file_identity(path: Path) -> str:
    """Its sha256, or its fingerprint when it is large. Raises OSError."""
    described = describe_file(path)
    return str(described.get("sha256") or described["fingerprint"])


def describe_file(path: Path) -> dict[str, Any]:
    """``{"bytes": …, "sha256": …}``, or ``fingerprint`` in place of ``sha256``. Raises OSError."""
    with open_file(path) as file:

        def read(offset: int, count: int) -> bytes:
            file.seek(offset)
            return file.read(count)

        return describe_bytes(path.stat().st_size, read)


def describe_bytes(size: int, read: Callable[[int, int], bytes]) -> dict[str, Any]:
    """The same of ``size`` bytes of which ``read(offset, count)`` gives some."""
    digest = hashlib.sha256()
    if size <= WHOLE_BYTES:
        for offset in range(0, size, HEAD_BYTES):
            digest.update(read(offset, min(HEAD_BYTES, size - offset)))
        return {"bytes": size, "sha256": digest.hexdigest()}
    digest.update(size.to_bytes(8, "little"))
    digest.update(read(0, HEAD_BYTES))
    for offset in [*range(STRIDE_BYTES, size - SAMPLE_BYTES, STRIDE_BYTES), size - SAMPLE_BYTES]:
        digest.update(read(offset, SAMPLE_BYTES))
    return {"bytes": size, "fingerprint": digest.hexdigest()}
