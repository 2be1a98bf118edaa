"""Which files of a folder hold its weights where no index says so."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from mlx_mixtral.config.folder import is_adapter
from mlx_mixtral.errors import CheckpointError

__all__ = ["choose_files"]

# MLX repositories before February 2024 have weights.NN.safetensors. What comes first wins where a folder has several.
_NAMED = ("model*", "pytorch_model*", "weights*", "*")
# Mistral's own files, which lie beside another layout's in its repositories.
_NATIVE = "consolidated*"
_PART = re.compile(r"(.+-)(\d{5})-of-(\d{5})(\.\w+)")


def choose_files(names: Sequence[str], folder: Path) -> list[str]:
    """Of the weight files there are, those of the model, in order of name: none where there are no such.

    Raises:
        CheckpointError: one of a numbered set is missing.
    """
    own = sorted(name for name in names if not is_adapter(name))
    own = [name for name in own if not fnmatchcase(name, _NATIVE)] or own
    chosen = next((found for pattern in _NAMED if (found := [n for n in own if fnmatchcase(n, pattern)])), [])
    for name in chosen:
        if (part := _PART.fullmatch(name)) is None:
            continue
        stem, _, count, suffix = part.groups()
        # The name is a stranger's: no more numbers are tried than there are files, and one.
        for number in range(1, min(int(count), len(chosen) + 1) + 1):
            if (wanted := f"{stem}{number:05}-of-{count}{suffix}") not in chosen:
                raise CheckpointError(
                    f"{folder}: {wanted} is missing; it is one of the {int(count)} files of the model; download it again"
                )
    return chosen
