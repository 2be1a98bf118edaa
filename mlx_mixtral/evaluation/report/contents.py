"""What a report is made of: results as the evaluations give them, and what says how they came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_mixtral.evaluation.passkey import PasskeyResult
from mlx_mixtral.evaluation.results import Evaluation
from mlx_mixtral.evaluation.routing.analysis import RoutingAnalysis
from mlx_mixtral.evaluation.statistics import BLOCK_TOKENS

__all__ = ["PLOTS", "Contents", "Run"]

PLOTS = {
    "perplexity": "plots/perplexity.png",
    "long context": "plots/long_context.png",
    "routing": "plots/routing.png",
}
"""Where the plot of each part lies, from the Markdown's folder."""


@dataclass(frozen=True)
class Run:
    """How a report was made.

    Args:
        command: as it was typed.
        date: in UTC, ``2026-11-26 11:29``.
        versions: of programs and libraries, by name.
        machine: device and compute type.
        text: what the text is, in a sentence or more.
        text_sha256: of its token ids.
    """

    command: str
    date: str
    versions: Mapping[str, str]
    machine: str
    text: str
    text_sha256: str


@dataclass(frozen=True, eq=False)
class Contents:
    """All that a report says.

    Args:
        model: name to show, that of its adapter included.
        facts: what ``mlx-mixtral info`` has of the checkpoint: shape, parts, ``fits``, ``kv_cache``, ``conversion``.
        reference: name of the model that ``evaluation`` compares with.
        left_out: for each part that is missing why, in a sentence.
        fits_note: what ``fits`` assumes, in a sentence.
        adapter: the one it was measured with: ``name``, ``kind``, ``scale``, ``fingerprint``.
    """

    model: str
    facts: Mapping[str, Any]
    evaluation: Evaluation
    run: Run
    reference: str | None = None
    passkeys: PasskeyResult | None = None
    routing: RoutingAnalysis | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    fits_note: str = ""
    adapter: Mapping[str, Any] | None = None

    @property
    def has_lengths(self) -> bool:
        """Whether the texts fill the longest contexts well enough to say anything about them."""
        return fills_window(self.evaluation)


def fills_window(found: Evaluation) -> bool:
    """Whether texts are long enough for perplexity by length: the longest bucket reached is the window's, and no mere rest."""
    longest = found.by_length[-1]
    return len(found.by_length) > 1 and longest.high == found.window and longest.tokens >= BLOCK_TOKENS
