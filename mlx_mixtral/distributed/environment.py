"""What MLX's launcher says of a group in the environment. Imports nothing of MLX: a lone process asks it too."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mlx_mixtral.errors import GroupError

__all__ = ["group_backend", "group_rank", "is_grouped", "ring_hosts"]


def group_backend() -> str | None:
    """Which of MLX's backends is to connect the machines; None where this process is alone.

    Raises:
        GroupError: the file of hosts cannot be read.
    """
    if os.environ.get("MLX_JACCL_COORDINATOR"):
        return "jaccl"
    if os.environ.get("NCCL_HOST_IP"):
        return "nccl"
    return "ring" if len(ring_hosts()) > 1 else None


def ring_hosts() -> list[list[str]]:
    """Addresses of each machine of a ring, with ports; none where no ring is named, or one of a single process.

    Raises:
        GroupError: the file of hosts cannot be read.
    """
    file = os.environ.get("MLX_HOSTFILE")
    if not file:
        return []
    try:
        text = Path(file).read_text()
        # A launcher of one process writes an empty file.
        hosts = json.loads(text) if text.strip() else []
    except (OSError, ValueError) as error:
        raise GroupError(f"MLX_HOSTFILE is {file!r}, which cannot be read: {error}; start with mlx.launch") from None
    return hosts if isinstance(hosts, list) else []


def group_rank() -> int:
    """This machine's number in the group.

    Raises:
        GroupError: it is not said.
    """
    rank = os.environ.get("MLX_RANK", "")
    if not rank.isascii() or not rank.isdecimal():
        raise GroupError(f"MLX_RANK is {rank!r}; it must be this machine's number in the group, 0 for the first")
    return int(rank)


def is_grouped() -> bool:
    """Whether this process is to join others. Raises as ``group_backend``."""
    return group_backend() is not None
