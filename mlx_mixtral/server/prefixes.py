"""How much of earlier prompts a server keeps."""

from __future__ import annotations

from mlx_mixtral.machine.memory import read_system_memory, usable_bytes
from mlx_mixtral.runtime.engine import Engine

__all__ = ["FREE_SHARE", "widen_prefixes"]

FREE_SHARE = 0.25
"""Of the memory that is free once the model is loaded."""


def widen_prefixes(engine: Engine) -> None:
    """Let ``engine`` keep a share of the free memory for prompts, where that is more than it keeps anyway.

    A server has several conversations at once, and each of them comes back with all it said before. Under a memory budget
    nothing changes: prompts are kept in the memory of rows that do not run. Nor on several machines, of which the others may
    have less to spare.
    """
    kept = engine.prompt_cache.kept
    free = usable_bytes(engine.device, read_system_memory())
    if kept.has_memory and free is not None and engine.link is None:
        kept.limit_bytes = max(kept.limit_bytes, int(FREE_SHARE * free))
