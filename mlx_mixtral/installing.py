"""How a package that is absent is installed beside this program: pip, pipx and uv each have their own command."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["how_to_install"]


def how_to_install(package: str, extra: str | None = None) -> str:
    """A command, in backquotes, that brings ``package`` to where this program is installed.

    Args:
        extra: of mlx-mixtral, that names the package with the versions that are known to work.
    """
    place = Path(sys.prefix)
    # What pipx and uv leave in an environment that is theirs.
    if (place / "pipx_metadata.json").is_file():
        return f"`pipx inject mlx-mixtral {package}`"
    if (place / "uv-receipt.toml").is_file():
        return f"`uv pip install --python {place} {package}`"
    return f"`pip install {package}`" if extra is None else f"`pip install 'mlx-mixtral[{extra}]'`"
