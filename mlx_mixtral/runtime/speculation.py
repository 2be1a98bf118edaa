"""Speculation as it is asked for: by prompt lookup or by a draft model. The text stays what it is without.

What it costs and when it pays is the model of ``generation.speculation.cost``; ``generation.speculation.loop`` says what "the
same text" means in 16 bits.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mlx_mixtral.arguments import check_integer, check_type, checked
from mlx_mixtral.errors import BusyError, ClosedError, InvalidRequestError
from mlx_mixtral.generation.request import Decoder, PieceOf, Request, Speculation, TargetEngine
from mlx_mixtral.generation.speculation.cost import ForwardCost
from mlx_mixtral.generation.speculation.draft import DraftProposer
from mlx_mixtral.generation.speculation.economics import Economics
from mlx_mixtral.generation.speculation.lookup import LookupProposer
from mlx_mixtral.generation.speculation.loop import speculate
from mlx_mixtral.runtime.engine import Engine
from mlx_mixtral.runtime.load import load
from mlx_mixtral.runtime.mixtral import Mixtral

__all__ = ["DraftModel", "PromptLookup"]

# With the token before them 16: from there on each of 8x7B's experts is read once for all tokens.
DEFAULT_TOKENS = 15
# A round fits the shortest chunk that a memory budget plans for, and the tokens that a full window can take back.
MAX_TOKENS = 31
MAX_NGRAM = 16
LOOKUP_ACCEPTANCE, DRAFT_ACCEPTANCE = 0.5, 0.7


@checked()
@dataclass(frozen=True)
class PromptLookup(Speculation):
    """Propose what followed the same words earlier in the prompt or the text: for edits, summaries, code, quotations.

    Costs no arithmetic, and the text is the same as without, sampled or greedy, for the same seed: each position draws with its
    own key, and a proposal stays where the draw is the proposal.

    Args:
        max_ngram: longest run of last tokens that is looked for, from 1; the longest found is taken.
        max_tokens: most tokens proposed at once, 1 to 31.
        adaptive: propose as many as pay, by measured times and acceptance, and none where none do; False proposes all it may.

    Raises:
        InvalidRequestError: a number out of its range.

    Example:
        >>> model.generate(f"{letter}\\nThe letter again, corrected:\\n", speculation=PromptLookup())
    """

    max_ngram: int = 5
    max_tokens: int = DEFAULT_TOKENS
    adaptive: bool = True

    def __post_init__(self) -> None:
        check_integer("max_ngram", self.max_ngram, 1, MAX_NGRAM)
        check_integer("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        check_type("adaptive", self.adaptive, bool, "True or False")

    def decoder(self, engine: TargetEngine, request: Request) -> Decoder:
        cost = engine.forward_cost()
        economics = Economics(
            self.max_tokens,
            lambda proposed: cost.seconds(proposed + 1),
            expected_acceptance=LOOKUP_ACCEPTANCE,
            is_adaptive=self.adaptive,
        )
        proposer = LookupProposer(request.tokens, self.max_ngram)
        return partial(speculate, proposer=proposer, economics=economics)


@checked()
@dataclass(frozen=True, eq=False)
class DraftModel(Speculation):
    """Propose what a smaller model with the same vocabulary writes, such as a dense Mistral beside a Mixtral.

    Its proposals are accepted by rejection sampling (arXiv 2211.17192): greedy text is the same as without; sampled text has
    the same distribution, and is the same again for the same seed. The draft's memory comes on top of the model's own; give
    it a budget with ``load(draft, memory=...)``. It is busy while the model generates.

    Args:
        model: a loaded model, or a folder or hub repository, which is loaded here and now.
        max_tokens: most tokens proposed at once, 1 to 31.
        adaptive: as for ``PromptLookup``. Sampled, times are predicted and not measured, so that a seed gives its text again.

    Raises:
        InvalidRequestError: something else, or a number out of its range.

    Example:
        >>> model.generate("Once upon a time", speculation=DraftModel("mistral-7b-4bit"))
    """

    model: Mixtral | str | Path
    max_tokens: int = DEFAULT_TOKENS
    adaptive: bool = True
    _fits: weakref.WeakSet[TargetEngine] = field(default_factory=weakref.WeakSet, init=False, repr=False)

    def __post_init__(self) -> None:
        check_integer("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        check_type("adaptive", self.adaptive, bool, "True or False")
        check_type("model", self.model, (Mixtral, str, Path), "a loaded model, or the folder or repository of one")
        if not isinstance(self.model, Mixtral):
            object.__setattr__(self, "model", load(self.model))

    @property
    def engine(self) -> Engine:
        """The draft's own."""
        assert isinstance(self.model, Mixtral)
        return self.model.engine

    def check(self, engine: TargetEngine, piece_of: PieceOf | None) -> None:
        """That it can draft for ``engine``.

        Raises:
            InvalidRequestError: it is that model, or has another vocabulary.
            ClosedError: it was closed.
        """
        if self.engine is engine:
            raise InvalidRequestError("a model cannot be its own draft; load a smaller one with the same vocabulary")
        try:
            _ = self.engine.context
        except ClosedError:
            raise ClosedError("the draft model was closed; load it again") from None
        if engine not in self._fits:
            self._check_vocabulary(engine, piece_of)
            self._fits.add(engine)

    def decoder(self, engine: TargetEngine, request: Request) -> Decoder:
        draft, cost = self.engine, engine.forward_cost()
        draft_s = ForwardCost(draft.residency.sizes, cost.speeds).seconds(1)
        economics = Economics(
            self.max_tokens,
            lambda proposed: cost.seconds(proposed + 1) + proposed * draft_s,
            expected_acceptance=DRAFT_ACCEPTANCE,
            # Where accepted tokens depend on what was proposed, what is proposed must not depend on the clock.
            uses_clock=request.sampler.params.is_greedy,
            is_adaptive=self.adaptive,
        )
        tokens = len(request.tokens) + request.max_tokens + self.max_tokens
        proposer = DraftProposer(
            draft.context,
            request.tokens,
            max_tokens=min(tokens, draft.context_limit),
            max_proposed=self.max_tokens,
        )
        return partial(speculate, proposer=proposer, economics=economics)

    @property
    def engines(self) -> Sequence[Engine]:
        return (self.engine,)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self.engine.exclusive())
            except BusyError:
                raise BusyError(
                    "the draft model is already generating; finish or close that stream first, or load the draft model twice"
                ) from None
            yield

    def _check_vocabulary(self, engine: TargetEngine, piece_of: PieceOf | None) -> None:
        """That token ids mean the same to both: proposals are ids, and probabilities are compared id by id."""
        ours, theirs = engine.vocab_size, self.engine.vocab_size
        if ours != theirs:
            raise InvalidRequestError(
                f"the draft has a vocabulary of {theirs} tokens, but the model's has {ours}; a draft model "
                "needs the same vocabulary: use one of the same family"
            )
        assert isinstance(self.model, Mixtral)
        drafts_piece_of = self.model.piece_of
        if piece_of is None or drafts_piece_of is None:
            return  # token ids only: their meaning is the caller's
        for token in range(ours):
            if (piece := piece_of(token)) != (other := drafts_piece_of(token)):
                raise InvalidRequestError(
                    f"token {token} is {_quoted(other)} in the draft model and {_quoted(piece)} in the model; "
                    "a draft model needs the same vocabulary: use one of the same family"
                )


def _quoted(piece: str | None) -> str:
    return "nothing" if piece is None else repr(piece)
