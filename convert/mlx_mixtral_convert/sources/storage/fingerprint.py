"""What a source's files are, without reading all of them.

The hub's cache names a large file by its sha256, so that is taken where it is known. Hashing a folder of 90 GB would double
the reading; there a fingerprint stands in.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mlx_mixtral.errors import ConversionError
from mlx_mixtral.weights import fingerprint

__all__ = ["describe_file"]

_SHA256 = re.compile(r"[0-9a-f]{64}")


def describe_file(path: Path) -> dict[str, Any]:
    """``{"bytes": …, "sha256": …}``, or ``fingerprint`` in place of ``sha256``.

    Raises:
        ConversionError: the file cannot be read.
    """
    try:
        if path.is_symlink() and _SHA256.fullmatch(blob := path.readlink().name):
            return {"bytes": path.stat().st_size, "sha256": blob}
        return fingerprint.describe_file(path)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or error}") from error
