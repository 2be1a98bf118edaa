"""What a source's files are, without reading all of them.

The hub's cache names a large file by its sha256, so that is taken where it is known. Hashing a folder of 90 GB would double
the reading; there a fingerprint stands in: the sha256 of the file's size, its first MiB (for safetensors the header) and
4 KiB of every 16 MiB after it. It finds another model, another download, a file cut short or still growing; one small tensor
edited in place it can miss. Modification times are not part of it: the same file copied or downloaded again is the same file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_mixtral.errors import ConversionError

__all__ = ["describe_bytes", "describe_file"]

# Files up to this size are hashed whole.
WHOLE_BYTES = 16 * 2**20
HEAD_BYTES = 2**20
STRIDE_BYTES = 16 * 2**20
SAMPLE_BYTES = 4096

_SHA256 = re.compile(r"[0-9a-f]{64}")


def describe_file(path: Path) -> dict[str, Any]:
    """``{"bytes": …, "sha256": …}``, or ``fingerprint`` in place of ``sha256``.

    Raises:
        ConversionError: the file cannot be read.
    """
    try:
        size = path.stat().st_size
        if path.is_symlink() and _SHA256.fullmatch(blob := path.readlink().name):
            return {"bytes": size, "sha256": blob}
        with path.open("rb", buffering=0) as file:

            def read(offset: int, count: int) -> bytes:
                file.seek(offset)
                return file.read(count)

            return describe_bytes(size, read)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or error}") from error


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
