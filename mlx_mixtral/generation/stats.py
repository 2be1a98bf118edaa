"""What a generation gives and what it cost: its tokens, and its statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mlx_mixtral.experts.store import Counters

MIN_RATED_TOKENS = 16
"""Rates of fewer tokens are not given: while the first one is read the next is being computed, which would count as free."""

__all__ = ["MIN_RATED_TOKENS", "GenerationStats", "SpeculationStats", "Token"]


@dataclass(frozen=True)
class Token:
    """One generated token: its id, its log-probability and the likeliest ids with theirs, where asked for.

    ``end`` is set where a constraint ends the text with it: "stop" where the text is whole, "length" where it was made whole
    early so that it fits ``max_tokens``.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    end: Literal["stop", "length"] | None = None


@dataclass
class SpeculationStats:
    """What speculation did in a generation so far, after its first token."""

    forwards: int = 0
    """Forwards of the model."""
    tokens: int = 0
    """Tokens they gave."""
    proposed: int = 0
    accepted: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """1 without speculation."""
        return self.tokens / self.forwards if self.forwards else 0.0

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that were accepted; of those after the first wrong one none is."""
        return self.accepted / self.proposed if self.proposed else 0.0

    def to_dict(self) -> dict[str, float | int]:
        return {
            "forwards": self.forwards,
            "tokens_per_forward": self.tokens_per_forward,
            "proposed_tokens": self.proposed,
            "accepted_tokens": self.accepted,
            "acceptance": self.acceptance,
        }


@dataclass
class GenerationStats:
    """What a generation cost so far. Seconds are wall-clock; rates of fewer than ``MIN_RATED_TOKENS`` (16) tokens are 0, and
    null in JSON.

    Example:
        >>> stats = model.generate("Mixtral is").stats
        >>> f"{stats.prompt_tok_s:.1f} tok/s of prompt, {stats.decode_tok_s:.1f} tok/s after it"
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Of the prompt, those that were computed for an earlier one."""
    prompt_special_tokens: int = 0
    """Control tokens that the text of a completion's prompt spelled."""
    tokens: int = 0
    queue_s: float = 0.0
    """In a batch: how long it waited until its prompt was begun; part of the time to the first token."""
    time_to_first_token_s: float = 0.0
    decode_s: float = 0.0
    """From the first token to the last."""
    peak_memory_bytes: int = 0
    """Largest memory MLX held at once during the generation, weights included."""
    prompt_experts: Counters | None = None
    """What streaming did up to the first token; None when all experts are resident."""
    decode_experts: Counters | None = None
    """The same from the first token to the last."""
    predicted_tok_s: float | None = None
    """What the plan in force predicts for decoding."""
    speculation: SpeculationStats | None = None
    """What was proposed and accepted; None without speculation."""
    warnings: tuple[str, ...] = ()
    """What of a constraint is not kept, a sentence each."""

    @property
    def prompt_tok_s(self) -> float:
        """Prompt tokens that were computed over the time to the first token, without the time it waited."""
        return _rate(self.prompt_tokens - self.reused_tokens, self.time_to_first_token_s - self.queue_s)

    @property
    def decode_tok_s(self) -> float:
        """Tokens after the first over the time they took."""
        return _rate(self.tokens - 1, self.decode_s)

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "prompt_special_tokens": self.prompt_special_tokens,
            "tokens": self.tokens,
            "queue_s": self.queue_s,
            "time_to_first_token_s": self.time_to_first_token_s,
            "prompt_tok_s": self.prompt_tok_s or None,
            "decode_s": self.decode_s,
            "decode_tok_s": self.decode_tok_s or None,
            "peak_memory_bytes": self.peak_memory_bytes,
            **({"warnings": list(self.warnings)} if self.warnings else {}),
            **self._streaming(),
            **({} if self.speculation is None else self.speculation.to_dict()),
        }

    def _streaming(self) -> dict[str, float | int]:
        prompt, decoded = self.prompt_experts, self.decode_experts
        if prompt is None or decoded is None:
            return {}
        steps = max(self.tokens - 1, 1)
        return {
            "prompt_bytes_read": prompt.bytes_read,
            "bytes_read_per_token": decoded.bytes_read / steps,
            "hit_rate": decoded.hit_rate,
            "readbacks_per_token": decoded.readbacks / steps,
            "disk_wait_s": prompt.wait_s + decoded.wait_s,
        } | ({} if self.predicted_tok_s is None else {"predicted_tok_s": self.predicted_tok_s})


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if tokens >= MIN_RATED_TOKENS and seconds else 0.0
