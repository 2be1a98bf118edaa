"""One generation in a batch: what it has made, what is read of it next, and how it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.generation.constrained import settled
from mlx_mixtral.generation.loop import read_token
from mlx_mixtral.generation.meter import Meter
from mlx_mixtral.generation.request import Request
from mlx_mixtral.generation.sampling import Sampled
from mlx_mixtral.generation.stats import Token

__all__ = ["BatchRow", "Prefixes", "RowUpdate", "SharedPrompt"]


class RowUpdate(NamedTuple):
    """What a step gave a row: a token, or the error that ended it. One that the caller ended gives neither."""

    ticket: int
    token: Token | None
    is_last: bool
    """Whether nothing follows: ``max_tokens`` are there, a constraint's text is whole (``token.end``), or there is an error."""
    error: Exception | None = None


class Prefixes(Protocol):
    """Caches of earlier prompts, of which rows take their beginnings and to which they give theirs."""

    @property
    def is_borrowed(self) -> bool:
        """Whether they lie in memory that rows have the first right to: see ``shrink``."""
        ...

    def reusable(self, tokens: Sequence[int], left: int, adapter: int | None) -> int:
        """How many tokens ``take`` would give."""
        ...

    def take(self, tokens: Sequence[int], left: int, adapter: int | None) -> KVCache | None:
        """A cache of a beginning of ``tokens``, without the last ``left`` at least; the caller's own from now on.

        It was computed with ``adapter``.
        """
        ...

    def put(self, tokens: Sequence[int], cache: KVCache) -> None:
        """Keep ``cache``, which holds ``tokens`` and may be lazy; what is too large is dropped."""
        ...

    def shrink(self, nbytes: int) -> None:
        """Keep no more than these bytes."""
        ...


@dataclass(eq=False)
class SharedPrompt:
    """A prompt that was computed once for several rows, of which some still wait: its cache, and the logits ``[1, V]``."""

    cache: KVCache
    logits: mx.array


@dataclass(eq=False)
class BatchRow:
    """A request on its way: in the queue, in a prompt that is computed, or among the rows that run."""

    ticket: int
    request: Request
    meter: Meter
    deadline_s: float | None = None
    """When it has waited too long, by the scheduler's clock."""
    siblings: list[BatchRow] = field(default_factory=list)
    """Rows that continue the same prompt, computed once: they join with this one."""
    ready: SharedPrompt | None = None
    """Its prompt, where it was computed for a sibling."""
    unread: Sampled | None = None
    """The token that is read next."""
    generated: list[int] = field(default_factory=list)
    replay: deque[int] = field(default_factory=deque)
    """Tokens it made before it was put back: they are fed again, and not given again."""
    is_finished: bool = False
    is_alone: bool = False
    admitted: int = 0
    """Larger for rows that were admitted later."""
    overtaken: int = 0
    error: Exception | None = None
    logits: mx.array | None = None
    """What ``unread`` was drawn from ``[1, V]``, where a constraint may put another token in its place."""

    @property
    def tokens(self) -> Sequence[int]:
        """The prompt."""
        return self.request.tokens

    @property
    def sequence(self) -> list[int]:
        """The prompt and what was made."""
        return [*self.request.tokens, *self.generated]

    @property
    def made(self) -> int:
        return len(self.generated)

    @property
    def goes_on(self) -> bool:
        """Whether a token follows the one that is read next, or none is."""
        return not self.is_finished and (self.unread is None or self.made + 1 < self.request.max_tokens)

    @property
    def is_constrained(self) -> bool:
        """Whether the next token is drawn under a mask."""
        return self.request.constraint is not None and not self.is_finished and not self.replay

    @property
    def reads_tokens(self) -> bool:
        """Whether its logits are waited for before a token is drawn."""
        return self.request.sampler.reads_tokens and not self.is_finished and not self.replay

    def successor(self) -> BatchRow:
        """Who stands in its place: itself, or a sibling that goes on where it was ended; siblings that were ended are gone."""
        siblings = [sibling for sibling in self.siblings if not sibling.is_finished]
        self.siblings = []
        heir = siblings.pop(0) if self.is_finished and siblings else self
        heir.siblings, heir.admitted, heir.overtaken = siblings, self.admitted, self.overtaken
        return heir

    def fail(self, error: Exception) -> None:
        """End with an error, which the next update says."""
        self.is_finished, self.unread = True, None
        self.error = self.error or error

    def read(self, sampled: Sampled) -> tuple[RowUpdate, int | None]:
        """Wait for a token that was drawn: the update, and the token a constraint put in its place, if it did.

        The request's own callbacks and constraint may raise: that ends this row.
        """
        request, replaced = self.request, None
        try:
            if request.constraint is None:
                token = read_token(sampled)
            else:
                assert self.logits is not None
                token = settled(request.sampler, request.constraint, self.logits, sampled)
                replaced = token.token_id if token.token_id != int(np.asarray(sampled.token)[0]) else None
            self.generated.append(token.token_id)
            self.meter.count(self.made)
        except Exception as error:
            self.is_finished, self.unread = True, None
            return RowUpdate(self.ticket, None, True, error), None
        self.is_finished = self.is_finished or token.end is not None or self.made >= request.max_tokens
        return RowUpdate(self.ticket, token, self.is_finished), replaced
