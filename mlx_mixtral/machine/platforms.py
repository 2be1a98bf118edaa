"""Whether MLX can run here at all, and what to do when it cannot; asked once, when the package is imported.

Imports nothing of MLX: its own failures (a missing shared library, a symbol not found) do not say what to install.
"""

from __future__ import annotations

import importlib.util
import platform
import sys

__all__ = ["backend_problem"]

# MLX publishes wheels for macOS 14 and later (https://ml-explore.github.io/mlx/build/html/install.html).
MACOS_MINIMUM = (14,)


def backend_problem(
    system: str | None = None,
    machine: str | None = None,
    release: str | None = None,
    *,
    has_backend: bool | None = None,
) -> str | None:
    """Why MLX cannot run on this machine, in one line with the fix; None when nothing speaks against it.

    Args:
        system, machine, release: as the ``platform`` module tells them (``release`` is the macOS version).
        has_backend: whether MLX's compiled part can be found.
    """
    system = platform.system() if system is None else system
    machine = platform.machine() if machine is None else machine
    release = platform.mac_ver()[0] if release is None else release
    if system == "Darwin":
        if machine != "arm64":
            return (
                "this Python is built for Intel (x86_64) and runs under Rosetta, or this is an Intel Mac; MLX needs Apple "
                "silicon and a native Python: install an arm64 one and make a new virtual environment with it"
            )
        if _version(release) < MACOS_MINIMUM:
            return f"macOS {release} is too old for MLX; it needs macOS {MACOS_MINIMUM[0]} or later"
    if has_backend is None:
        has_backend = _has_backend()
    if not has_backend:
        if system == "Linux":
            return (
                "MLX has no backend installed: pip install 'mlx-mixtral[cpu]', or 'mlx-mixtral[cuda]' on a machine with an "
                "NVIDIA GPU (not both)"
            )
        return "MLX is not installed: pip install mlx"
    return None


def _has_backend() -> bool:
    try:
        if importlib.util.find_spec("mlx.core") is None:
            return False
    except (ImportError, ValueError):
        return False
    # On Linux the compiled library comes with the backend's own wheel, in the same package folder.
    spec = importlib.util.find_spec("mlx")
    locations = list(spec.submodule_search_locations or []) if spec is not None else []
    if sys.platform != "linux":
        return True
    from pathlib import Path

    return any(Path(folder, "lib", "libmlx.so").exists() for folder in locations)


def _version(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".") if part.isdigit()) or MACOS_MINIMUM
