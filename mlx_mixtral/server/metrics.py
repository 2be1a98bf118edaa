"""Counts and times in Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats/), without labels
that a request could fill with words of its own."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

__all__ = ["METRICS", "Metrics"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

METRICS: dict[str, tuple[str, str]] = {
    "mlx_mixtral_requests_total": ("counter", "Requests answered, by path and status."),
    "mlx_mixtral_requests_refused_total": (
        "counter",
        "Generations refused, because the queue was full or the wait too long.",
    ),
    "mlx_mixtral_requests_cancelled_total": (
        "counter",
        "Generations that ended because nobody waited for them any more.",
    ),
    "mlx_mixtral_engine_failures_total": ("counter", "Errors of the engine after which the model was loaded again."),
    "mlx_mixtral_prompt_tokens_total": ("counter", "Prompt tokens of finished generations."),
    "mlx_mixtral_cached_prompt_tokens_total": ("counter", "Of these, tokens that were kept from earlier prompts."),
    "mlx_mixtral_generated_tokens_total": ("counter", "Tokens generated."),
    "mlx_mixtral_requests_running": ("gauge", "Generations being computed."),
    "mlx_mixtral_requests_waiting": ("gauge", "Generations waiting for their turn."),
    "mlx_mixtral_connections": ("gauge", "Open connections."),
    "mlx_mixtral_engine_up": ("gauge", "1 when the engine takes requests, else 0."),
    "mlx_mixtral_memory_active_bytes": ("gauge", "Memory that MLX holds."),
    "mlx_mixtral_memory_peak_bytes": ("gauge", "The most MLX held since generating last began."),
    "mlx_mixtral_prefix_cache_bytes": ("gauge", "Keys and values kept from earlier prompts."),
    "mlx_mixtral_queue_seconds": ("histogram", "From a request's arrival until its computation began."),
    "mlx_mixtral_time_to_first_token_seconds": ("histogram", "From a request's arrival to its first token."),
    "mlx_mixtral_request_seconds": ("histogram", "From a generation's arrival to its end."),
    "mlx_mixtral_step_seconds": ("histogram", "Time between tokens of one generation, on average over it."),
}
"""Every metric: its type and what it counts."""

_Labels = tuple[tuple[str, str], ...]


@dataclass
class _Histogram:
    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0


class Metrics:
    """Kept by the loop's thread."""

    def __init__(self) -> None:
        self._numbers: dict[str, dict[_Labels, float]] = {name: {} for name in METRICS}
        self._histograms = {name: _Histogram() for name, (kind, _) in METRICS.items() if kind == "histogram"}
        for name, (kind, _) in METRICS.items():
            if kind != "histogram" and name not in ("mlx_mixtral_requests_total", "mlx_mixtral_requests_refused_total"):
                self._numbers[name][()] = 0

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """Add to a counter."""
        series, key = self._numbers[name], tuple(sorted(labels.items()))
        series[key] = series.get(key, 0) + by

    def set(self, name: str, value: float) -> None:
        """Say what a gauge, or a counter kept elsewhere, is now."""
        self._numbers[name][()] = value

    def observe(self, name: str, seconds: float) -> None:
        """Add to a histogram."""
        histogram = self._histograms[name]
        histogram.counts[bisect_left(SECONDS, seconds)] += 1
        histogram.total += seconds

    def text(self) -> str:
        """All of them, as Prometheus reads them."""
        lines = []
        for name, (kind, about) in METRICS.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            if kind == "histogram":
                lines += self._histogram_lines(name)
            for labels, value in self._numbers[name].items():
                written = ",".join(f'{key}="{text}"' for key, text in labels)
                lines.append(f"{name}{{{written}}} {value:.10g}" if written else f"{name} {value:.10g}")
        return "\n".join(lines) + "\n"

    def _histogram_lines(self, name: str) -> list[str]:
        histogram, seen, lines = self._histograms[name], 0, []
        for bound, count in zip((*SECONDS, None), histogram.counts, strict=True):
            seen += count
            lines.append(f'{name}_bucket{{le="{"+Inf" if bound is None else f"{bound:g}"}"}} {seen}')
        return [*lines, f"{name}_sum {histogram.total:.6f}", f"{name}_count {seen}"]
