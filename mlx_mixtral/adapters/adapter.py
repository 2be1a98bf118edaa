"""What an adapter is, whoever wrote it: changes of matrices by the paths of ``config.layout``.

A reader of a format (``adapters.mlx``, ``adapters.peft``) lists what there is when it opens a folder, from headers alone, and
reads numbers when they are asked for: an adapter of Mixtral 8x7B is a gigabyte.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["Adapter", "Floats", "LowRank", "TokenRows"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LowRank:
    """A change of one matrix ``W [out, in]``, or of one expert's: ``y = f * (W x + b (a x)) + bias``.

    ``f`` is 1, or with a ``magnitude`` (DoRA, arXiv 2402.09353) ``magnitude / |W + b a|`` by rows. The adapter's own scale is
    part of ``b`` and ``bias``, and so is the one it was opened with.
    """

    a: Floats
    """``[r, in]``."""
    b: Floats
    """``[out, r]``."""
    magnitude: Floats | None = None
    """``[out]``."""
    bias: Floats | None = None
    """``[out]``, added to the output whatever the magnitude is."""


@dataclass(frozen=True)
class TokenRows:
    """Rows of the embedding, or of the head, that were trained for a few tokens and stand in place of the model's."""

    tokens: tuple[int, ...]
    rows: Floats
    """``[n, hidden]``."""


class Adapter(ABC):
    """An adapter that was opened for a model, and checked against its shapes.

    ``name`` is its folder's or repository's; ``kind`` "mlx-lm" or "PEFT"; ``notes`` are what a user should know of it, such as
    what was ignored; ``fingerprint`` is a sha256 over what it holds, in hexadecimal; ``scale`` multiplies all of its changes.
    """

    name: str
    kind: str
    folder: Path
    scale: float
    notes: tuple[str, ...]
    fingerprint: str

    ranks: Mapping[str, int]
    """Matrices with low-rank changes, by path, and the largest rank among their experts."""
    dora: frozenset[str]
    """Those of ``ranks`` with a magnitude."""
    replaced: frozenset[str]
    """Matrices and norms, by path, that stand in place of the model's (``modules_to_save``); never an expert's."""
    token_rows: frozenset[str]
    """Matrices, by path, of which the rows of a few tokens are replaced: ``model.embed_tokens`` and ``lm_head``."""

    @abstractmethod
    def low_rank(self, path: str, expert: int | None = None) -> LowRank | None:
        """The change of a matrix, or of one expert of it; None where there is none.

        Raises:
            CheckpointError: it cannot be read, or holds NaN or infinity.
        """

    @abstractmethod
    def replacement(self, path: str) -> Floats:
        """What stands in place of a matrix ``[out, in]`` or a norm ``[n]`` of ``replaced``. Raises as ``low_rank``."""

    @abstractmethod
    def rows(self, path: str) -> TokenRows:
        """The rows that stand in place of some of a matrix of ``token_rows``. Raises as ``low_rank``."""

    @abstractmethod
    def close(self) -> None:
        """Close its files; nothing can be read afterwards."""
