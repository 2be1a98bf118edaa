"""Speculation as it is asked for: by prompt lookup or by a draft model. The text stays what it is without.

What it costs and when it pays is the model of ``generation.speculation.cost``; ``generation.speculation.loop`` says what "the
same text" means in 16 bits. This is a part of the runtime in a file of its own, and knows the insides of ``Mixtral``.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from mlx_mixtral.arguments import check_type
from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.errors import BusyError, ClosedError, InvalidRequestError, TokenizerError
from mlx_mixtral.generation.loop import decode
from mlx_mixtral.generation.sampling import Sampler
from mlx_mixtral.generation.speculation.cost import ForwardCost
from mlx_mixtral.generation.speculation.draft import DraftProposer
from mlx_mixtral.generation.speculation.economics import Economics
from mlx_mixtral.generation.speculation.lookup import LookupProposer
from mlx_mixtral.generation.speculation.loop import speculate
from mlx_mixtral.generation.stats import GenerationStats, Token
from mlx_mixtral.model.step import DecodeStep
from mlx_mixtral.model.transformer import MixtralModel
from mlx_mixtral.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlx_mixtral.runtime.mixtral import Mixtral
    from mlx_mixtral.runtime.requests import Request

__all__ = ["DraftModel", "PromptLookup", "Speculation", "decoding", "exclusive"]

# With the token before them 16: from there on each of 8x7B's experts is read once for all tokens.
DEFAULT_TOKENS = 15
# A round fits the shortest chunk that a memory budget plans for, and the tokens that a full window can take back.
MOST_TOKENS = 31
MOST_NGRAM = 16
LOOKUP_ACCEPTANCE, DRAFT_ACCEPTANCE = 0.5, 0.7


@dataclass(frozen=True)
class PromptLookup:
    """Propose what followed the same words earlier in the prompt or the text: for edits, summaries, code, quotations.

    Costs no arithmetic, and the text is the same as without, sampled or greedy, for the same seed: each position draws with its
    own key, and a proposal stays where the draw is the proposal.

    Args:
        max_ngram: longest run of last tokens that is looked for, from 1; the longest found is taken.
        max_tokens: most tokens proposed at once, 1 to 31.
        adaptive: propose as many as pay, by measured times and acceptance, and none where none do; False proposes all it may.

    Raises:
        InvalidRequestError: a number out of its range.
    """

    max_ngram: int = 5
    max_tokens: int = DEFAULT_TOKENS
    adaptive: bool = True

    def __post_init__(self) -> None:
        _check_count("max_ngram", self.max_ngram, MOST_NGRAM)
        _check_count("max_tokens", self.max_tokens, MOST_TOKENS)
        check_type("adaptive", self.adaptive, bool, "True or False")


@dataclass(frozen=True, eq=False)
class DraftModel:
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
    """

    model: Mixtral | str | Path
    max_tokens: int = DEFAULT_TOKENS
    adaptive: bool = True
    _fits: weakref.WeakSet[Mixtral] = field(default_factory=weakref.WeakSet, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_count("max_tokens", self.max_tokens, MOST_TOKENS)
        check_type("adaptive", self.adaptive, bool, "True or False")
        from mlx_mixtral.runtime.load import load
        from mlx_mixtral.runtime.mixtral import Mixtral

        check_type("model", self.model, (Mixtral, str, Path), "a loaded model, or the folder or repository of one")
        if not isinstance(self.model, Mixtral):
            object.__setattr__(self, "model", load(self.model))

    @property
    def loaded(self) -> Mixtral:
        """``model``, loaded."""
        assert not isinstance(self.model, str | Path)
        return self.model

    def check(self, model: Mixtral) -> None:
        """That it can draft for ``model``.

        Raises:
            InvalidRequestError: it is that model, or has another vocabulary.
            ClosedError: it was closed.
        """
        draft = self.loaded
        if draft is model:
            raise InvalidRequestError("a model cannot be its own draft; load a smaller one with the same vocabulary")
        try:
            _ = draft.module
        except ClosedError:
            raise ClosedError("the draft model was closed; load it again") from None
        if model not in self._fits:
            check_same_vocabulary(model, draft)
            self._fits.add(model)


Speculation = PromptLookup | DraftModel


class Decode(Protocol):
    """``decode``, or a loop with speculation that is called as it is."""

    def __call__(
        self,
        model: MixtralModel,
        compute: DecodeStep,
        prompt: Sequence[int],
        cache: KVCache,
        sampler: Sampler,
        max_tokens: int,
        stats: GenerationStats,
        *,
        stream: mx.Stream,
        prefill_chunk: int = ...,
        on_prefill: Callable[[int, int], None] | None = ...,
    ) -> Generator[Token, None, None]: ...


def decoding(request: Request, model: Mixtral) -> Decode:
    """The loop that carries out ``request``.

    Raises:
        InvalidRequestError, ClosedError: a draft that cannot draft for ``model``.
    """
    asked = request.speculation
    if asked is None:
        return decode
    if isinstance(asked, PromptLookup):
        lookup = LookupProposer(request.tokens, asked.max_ngram)
        return partial(speculate, proposer=lookup, economics=_economics(asked, request, model))
    asked.check(model)
    draft, most = asked.loaded, len(request.tokens) + request.max_tokens + asked.max_tokens
    assert draft._step is not None
    proposer = DraftProposer(
        draft.module,
        draft._step,
        request.tokens,
        max_tokens=min(most, draft._requests.context_limit),
        max_proposed=asked.max_tokens,
        chunk_tokens=draft.residency.planned.chunk_tokens,
    )
    return partial(speculate, proposer=proposer, economics=_economics(asked, request, model))


@contextlib.contextmanager
def exclusive(request: Request, model: Mixtral) -> Iterator[None]:
    """Nobody else generates with the model meanwhile, nor with the draft.

    Raises:
        BusyError: somebody does.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(model._exclusive())
        if isinstance(request.speculation, DraftModel):
            try:
                held.enter_context(request.speculation.loaded._exclusive())
            except BusyError:
                raise BusyError(
                    "the draft model is already generating; finish or close that stream first, or load it twice"
                ) from None
        yield


def check_same_vocabulary(model: Mixtral, draft: Mixtral) -> None:
    """That token ids mean the same to both: a draft's proposals are ids, and its probabilities are compared id by id.

    Raises:
        InvalidRequestError: they do not; the message names the first difference.
    """
    ours, theirs = model.config.vocab_size, draft.config.vocab_size
    if ours != theirs:
        raise InvalidRequestError(
            f"the draft has a vocabulary of {theirs} tokens and the model one of {ours}; a draft needs the model's own"
        )
    try:
        tokenizer, other_tokenizer = model.tokenizer, draft.tokenizer
    except TokenizerError:
        return  # token ids only: their meaning is the caller's
    for token in range(ours):
        if (piece := _piece(tokenizer, token)) != (other := _piece(other_tokenizer, token)):
            raise InvalidRequestError(
                f"token {token} is {_quoted(other)} to the draft and {_quoted(piece)} to the model; a draft needs the model's "
                "own vocabulary"
            )


def _economics(asked: Speculation, request: Request, model: Mixtral) -> Economics:
    cost = _cost(model)
    is_drafted = isinstance(asked, DraftModel)
    draft = ForwardCost(asked.loaded.residency.sizes, cost.speeds).seconds(1) if isinstance(asked, DraftModel) else 0.0
    return Economics(
        asked.max_tokens,
        lambda proposed: cost.seconds(proposed + 1) + proposed * draft,
        expected_acceptance=DRAFT_ACCEPTANCE if is_drafted else LOOKUP_ACCEPTANCE,
        # Where accepted tokens depend on what was proposed, what is proposed must not depend on the clock.
        uses_clock=not is_drafted or request.sampler.params.is_greedy,
        is_adaptive=asked.adaptive,
    )


def _cost(model: Mixtral) -> ForwardCost:
    plan = model.residency.plan
    if plan is None:
        return ForwardCost(model.residency.sizes)
    return ForwardCost(model.residency.sizes, model._planner.speeds, plan.slots, plan.hit_rates)


def _piece(tokenizer: Tokenizer, token: int) -> str | None:
    return tokenizer.id_to_piece(token) if token < tokenizer.vocab_size else None


def _quoted(piece: str | None) -> str:
    return "nothing" if piece is None else repr(piece)


def _check_count(name: str, value: object, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise InvalidRequestError(f"{name} is {value!r}; it must be an integer from 1 to {most}")
