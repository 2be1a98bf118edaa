"""What a benchmark found: medians with their spread, rates, and ratios of one backend to another."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_mixtral.bench.backend import Timing
from mlx_mixtral.bench.cases import Case
from mlx_mixtral.bench.several import SumCost

__all__ = ["OURS", "BenchReport", "Row", "Spread"]

OURS = "mlx-mixtral"


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of some measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "min": self.low, "max": self.high}


@dataclass
class Row:
    """The timings of one case by backend. ``skipped`` says why one has none."""

    case: Case
    timings: dict[str, list[Timing]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    token_bytes: int | None = None
    """Of decode: what one token of ours reads from memory."""

    def tok_s(self, name: str) -> Spread:
        return Spread.of([timing.tok_s for timing in self.timings[name]])

    def seconds(self, name: str) -> Spread:
        return Spread.of([timing.seconds for timing in self.timings[name]])

    def ratio(self, name: str) -> float | None:
        """Our rate over another backend's, medians; None when one of them was not measured."""
        if not self.timings.get(OURS) or not self.timings.get(name):
            return None
        return self.tok_s(OURS).median / self.tok_s(name).median

    @property
    def bytes_per_s(self) -> float | None:
        """Of decode: bytes that our rate makes memory deliver each second."""
        if self.token_bytes is None or not self.timings.get(OURS):
            return None
        return self.token_bytes * self.tok_s(OURS).median

    def to_dict(self) -> dict[str, Any]:
        backends: dict[str, Any] = {name: {"not_measured": reason} for name, reason in self.skipped.items()}
        for name, timings in self.timings.items():
            if not timings:
                continue
            backends[name] = {"tok_s": self.tok_s(name).to_dict()}
            if self.case.kind == "prefill":
                backends[name]["time_to_first_token_s"] = self.seconds(name).to_dict()
            if (read := timings[0].read_bytes) is not None:
                backends[name]["read_bytes_per_token"] = read / timings[0].tokens
        others = {name: ratio for name in backends if name != OURS and (ratio := self.ratio(name)) is not None}
        size = {"prefill": "prompt_tokens", "decode": "depth_tokens", "batch": "rows"}[self.case.kind]
        return {size: self.case.size, "sides": backends, "ratios": others}


@dataclass
class BenchReport:
    """All of a run, or what was measured of it before it was interrupted."""

    backends: list[str] = field(default_factory=list)
    load_s: dict[str, float] = field(default_factory=dict)
    weight_bytes: dict[str, int] = field(default_factory=dict)
    copies: list[float] = field(default_factory=list)
    """Bytes per second of copying in memory, read and written, each time it was measured."""
    rows: dict[Case, Row] = field(default_factory=dict)
    in_turn: bool = True
    """Whether the backends took turns, measurement by measurement; else there was no memory for all of them at once."""
    sums: SumCost | None = None
    """Of a model on several machines."""
    peak_memory_bytes: int = 0
    """Peak of MLX's memory while only our backend was loaded; 0 when it never was alone."""

    @property
    def copy_bytes_per_s(self) -> Spread | None:
        return Spread.of(self.copies) if self.copies else None

    def share_of_copy(self, row: Row) -> float | None:
        """Bytes per second of a decode row, over those of copying."""
        rate, copy = row.bytes_per_s, self.copy_bytes_per_s
        return None if rate is None or copy is None else rate / copy.median

    def share_of_sums(self, row: Row) -> float | None:
        """Of the time of a decode row's tokens, what waits for sums over several machines."""
        return None if self.sums is None or not row.timings.get(OURS) else self.sums.share(row.tok_s(OURS).median)

    def of(self, kind: str) -> list[Row]:
        return [
            row for row in self.rows.values() if row.case.kind == kind and (any(row.timings.values()) or row.skipped)
        ]

    def to_dict(self) -> dict[str, Any]:
        copy = self.copy_bytes_per_s
        decode = []
        for row in self.of("decode"):
            found = {
                "bytes_per_token": row.token_bytes,
                "bytes_per_s": row.bytes_per_s,
                "share_of_copy": self.share_of_copy(row),
            }
            if self.sums is not None:
                found["share_of_sums"] = self.share_of_sums(row)
            decode.append(row.to_dict() | found)
        return {
            "load": {
                name: {"seconds": self.load_s[name], "weight_bytes": self.weight_bytes[name]} for name in self.load_s
            },
            "sides_in_turn": self.in_turn,
            "copy_bytes_per_s": None if copy is None else copy.to_dict(),
            "peak_memory_bytes": self.peak_memory_bytes or None,
            "group": None if self.sums is None else self.sums.to_dict(),
            "prefill": [row.to_dict() for row in self.of("prefill")],
            "decode": decode,
            "batch": [row.to_dict() for row in self.of("batch")],
        }
