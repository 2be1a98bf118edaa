"""What the server asks of its engine thread, and what comes back: plain values, nothing of MLX."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_mixtral.calls.parser import CallParser
from mlx_mixtral.constraints.matching import CompiledConstraint
from mlx_mixtral.generation.sampling_params import SamplingParams
from mlx_mixtral.runtime.stream import Chunk
from mlx_mixtral.server.options import PoolingKind
from mlx_mixtral.server.wire.errors import ApiError

__all__ = [
    "Began",
    "Ended",
    "Failed",
    "JobEvent",
    "NewToken",
    "PooledPrompt",
    "Pooling",
    "PromptScores",
    "ReplyPart",
    "RowSpec",
    "RowUsage",
    "ScoredPrompt",
    "Scoring",
    "ServerJob",
]  # fmt: skip


@dataclass(frozen=True)
class RowSpec:
    """One text to generate. Everything in it was checked; it is carried out once.

    Args:
        tokens: the prompt.
        max_tokens: at least 1.
        stop: texts that end it.
        stop_token_ids: ids that end it, beside the model's own.
        is_answer: the text starts afresh, as an answer does.
        constraint: what the text has to be; compiled.
        parser: makes what finds calls of tools in the text; None: there are none.
        adapter: the name of the one it is computed with; None: the model itself.
    """

    tokens: Sequence[int]
    max_tokens: int
    sampling: SamplingParams
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    is_answer: bool = False
    constraint: CompiledConstraint | None = None
    parser: Callable[[], CallParser] | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Scoring:
    """Log-probabilities of prompts that are wanted: ``top`` likeliest tokens beside each. ``adapter``: see ``RowSpec``."""

    prompts: Sequence[Sequence[int]]
    top: int
    adapter: str | None = None


@dataclass(frozen=True)
class Pooling:
    """Vectors of prompts that are wanted; ``kind``: see ``pooled_prompts``, ``adapter``: see ``RowSpec``."""

    prompts: Sequence[Sequence[int]]
    kind: PoolingKind
    adapter: str | None = None


@dataclass(frozen=True)
class Began:
    """A row of the job, or a prompt of its scoring, is being computed since ``at``, a time of ``time.monotonic()``."""

    at: float


@dataclass(frozen=True)
class NewToken:
    """A token of row ``row``, with the text that became certain; the last has the reason."""

    row: int
    chunk: Chunk


@dataclass(frozen=True)
class PromptScores:
    """Of one prompt: each token's log-probability (None for the first), and the likeliest ids with theirs."""

    logprobs: Sequence[float | None]
    top: Sequence[Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class ScoredPrompt:
    """Prompt ``index`` of the job's ``Scoring``."""

    index: int
    scores: PromptScores


@dataclass(frozen=True, eq=False)
class PooledPrompt:
    """Prompt ``index`` of the job's ``Pooling``: ``[D]`` float32, of length 1."""

    index: int
    vector: np.ndarray


@dataclass(frozen=True)
class RowUsage:
    """What a row took, in tokens."""

    prompt_tokens: int
    cached_tokens: int
    tokens: int


@dataclass(frozen=True)
class Ended:
    """Nothing comes after it; what each row took."""

    usage: Sequence[RowUsage]


@dataclass(frozen=True)
class Failed:
    """Nothing comes after it."""

    error: ApiError


ReplyPart = NewToken | ScoredPrompt | PooledPrompt
"""What a reply is made of."""
JobEvent = Began | ReplyPart | Ended | Failed


@dataclass(eq=False)
class ServerJob:
    """One request's rows, in the hands of the loop's thread; ``deliver`` and ``next`` are called there only.

    Args:
        rows: what to generate; none, when prompts are only scored or pooled.
        max_unsent_bytes: of text that may wait to be taken; beyond it the job is too slow a reader's.
    """

    rows: Sequence[RowSpec]
    scoring: Scoring | None = None
    pooling: Pooling | None = None
    max_unsent_bytes: int = 1_000_000
    opened_at: float = field(default_factory=time.monotonic)
    began_at: float | None = None
    first_token_at: float | None = None
    tokens: int = 0
    cached_tokens: int = 0
    is_over: bool = False
    """Whether the engine has nothing more to do for it."""
    is_abandoned: bool = False
    """Whether nobody waits for it any more."""
    is_overflowing: bool = False
    """Whether its reader is so slow that it had to be given up."""

    def __post_init__(self) -> None:
        self._events: list[JobEvent] = []
        self._unsent_bytes = 0
        self._news = asyncio.Event()

    @property
    def adapter(self) -> str | None:
        """What all of it is computed with; None: the model itself."""
        return next((part.adapter for part in (*self.rows, self.scoring, self.pooling) if part is not None), None)

    @property
    def size(self) -> int:
        """Places it takes in the queue."""
        return max(1, len(self.rows))

    def deliver(self, events: Sequence[JobEvent]) -> None:
        """Take events of the engine."""
        now = time.monotonic()
        for event in events:
            if isinstance(event, Began) and self.began_at is None:
                self.began_at = event.at
            if isinstance(event, NewToken):
                self.tokens += 1
                self.first_token_at = self.first_token_at or now
                # About what it is on the wire, and what it keeps in memory.
                self._unsent_bytes += 200 + len(event.chunk.text) + 64 * len(event.chunk.top_logprobs)
            if isinstance(event, Ended):
                self.cached_tokens = max((row.cached_tokens for row in event.usage), default=0)
            if isinstance(event, Ended | Failed):
                self.is_over = True
        self._events += events
        self.is_overflowing = self.is_overflowing or self._unsent_bytes > self.max_unsent_bytes
        self._news.set()

    def abandon(self) -> None:
        """Nobody waits for it: ``next`` gives nothing more."""
        self.is_abandoned = True
        self._news.set()

    async def next(self, timeout_s: float | None) -> list[JobEvent]:
        """All events there are, at least one; none after ``timeout_s``, or when the job was abandoned."""
        if not self._events and not self.is_abandoned:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._news.wait()
            except TimeoutError:
                return []
        self._news.clear()
        if self.is_abandoned:
            return []
        events, self._events, self._unsent_bytes = self._events, [], 0
        return events
