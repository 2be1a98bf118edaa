"""What is asked of a model in token ids, and who may propose tokens to it."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.constraints.base import Constraint
from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.sampling import Sampler
from mlx_mixtral.generation.speculation.cost import ForwardCost
from mlx_mixtral.generation.stats import GenerationStats, Token

__all__ = ["Decoder", "PieceOf", "Request", "Speculation", "TargetEngine"]

PieceOf = Callable[[int], str | None]
"""From a token id to its piece of text, None for one that has none."""


@dataclass(frozen=True)
class Request:
    """One generation: a prompt to continue by up to ``max_tokens`` tokens, alone or in a batch.

    ``sampler``, ``constraint`` and ``stats`` have state: a request is carried out once.

    Args:
        tokens: the prompt, at least one token.
        speculation: who proposes tokens; for a generation of its own.
        on_prefill: told ``(done, total)`` prompt tokens while the prompt is computed; raising from it cancels.
        stats: filled in as it goes.
        constraint: which tokens may come; a loop that does not know of it must not carry out the request.
        adapter: number of the adapter it is computed with; None for the model itself.
    """

    tokens: Sequence[int]
    max_tokens: int
    sampler: Sampler
    speculation: Speculation | None = None
    on_prefill: Callable[[int, int], None] | None = None
    stats: GenerationStats = field(default_factory=GenerationStats)
    constraint: Constraint | None = None
    adapter: int | None = None


Decoder = Callable[[DecodeContext, Request, KVCache], Generator[Token, None, None]]
"""A loop that carries out a request; the cache holds a beginning of its prompt, all but the last token at most."""


class TargetEngine(Protocol):
    """What a speculation asks of the engine it proposes tokens to."""

    @property
    def vocab_size(self) -> int: ...

    def forward_cost(self) -> ForwardCost:
        """What a forward over several tokens costs, as far as the plan in force tells."""
        ...


class OpenableEngine(Protocol):
    """An engine that knows what generates on it."""

    def remember(self, steps: Any) -> None:
        """End ``steps`` when this engine is closed."""
        ...


class Speculation(ABC):
    """How tokens are proposed, to be verified several at once. The text stays what it is without."""

    @abstractmethod
    def decoder(self, engine: TargetEngine, request: Request) -> Decoder:
        """The loop that carries out ``request`` on ``engine``."""

    def check(self, engine: TargetEngine, piece_of: PieceOf | None) -> None:
        """That it can propose tokens to ``engine``, whose pieces are those of ``piece_of``; None: they are not known.

        Raises:
            InvalidRequestError, ClosedError: it cannot.
        """
        return

    @property
    def engines(self) -> Sequence[OpenableEngine]:
        """Engines that it proposes with; a generation ends when one of them is closed."""
        return ()

    def busy(self) -> contextlib.AbstractContextManager[None]:
        """Held while it proposes: nobody else may use what it proposes with.

        Raises:
            BusyError: somebody does.
        """
        return contextlib.nullcontext()
