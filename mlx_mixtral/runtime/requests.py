"""What is asked of a model, checked before any work begins: prompts, lengths, sampling, where to stop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypedDict

from mlx_mixtral.arguments import check_callbacks, check_integer, check_type, checked, shown
from mlx_mixtral.calls.parser import CallParser
from mlx_mixtral.constraints.base import Constraint
from mlx_mixtral.constraints.compiler import Compiler
from mlx_mixtral.constraints.specs import ConstraintSpec
from mlx_mixtral.constraints.token_table import TokenTable
from mlx_mixtral.errors import ContextLengthError, InvalidRequestError, TokenizerError
from mlx_mixtral.generation.processors import LogitsProcessor, check_processors
from mlx_mixtral.generation.request import PieceOf, Request, Speculation
from mlx_mixtral.generation.sampling import Sampler, SamplingParams
from mlx_mixtral.generation.stats import GenerationStats
from mlx_mixtral.runtime.adapters import IN_USE
from mlx_mixtral.runtime.engine import Engine
from mlx_mixtral.runtime.marked_stops import MarkedStops
from mlx_mixtral.runtime.stream import TextAssembler
from mlx_mixtral.tokenizer import Tokenizer
from mlx_mixtral.tokenizer.breakers import completing_sequences

__all__ = ["DEFAULT_MAX_TOKENS", "GenerationOptions", "Prompt", "Requests", "TextRequest", "with_options"]

DEFAULT_MAX_TOKENS = 256
MAX_SAMPLES = 128


class GenerationOptions(TypedDict, total=False):
    """What ``generate``, ``stream``, ``chat`` and ``stream_chat`` take beside the prompt. All may be left out.

    Example:
        >>> options: GenerationOptions = {"max_tokens": 64, "stop": ["\\n\\n"]}
        >>> model.generate("Mixtral is", **options).text
    """

    max_tokens: int
    """Most tokens to generate (256); the context ends it earlier when it is full."""
    sampling: SamplingParams | None
    """How tokens are chosen; greedy when left out."""
    stop: str | Sequence[str]
    """Text that ends the generation and is not part of it; where it spells a control token, that token does."""
    stop_token_ids: Sequence[int]
    """Ids that end it, beside the checkpoint's end-of-sequence ids."""
    cancelled: Callable[[], bool] | None
    """Asked after every token; True ends the generation with ``finish_reason`` "cancelled"."""
    on_prefill: Callable[[int, int], None] | None
    """Told ``(done, total)`` prompt tokens while the prompt is computed."""
    logits_processors: Sequence[LogitsProcessor] | Sequence[Sequence[LogitsProcessor]] | None
    """Functions called for every token with the ids so far ``[n]`` (int32, prompt first) and the logits ``[V]`` (float32, after
    penalties), which return other logits; one after the other. They may be called for tokens that are then not taken, so what
    they return should follow from what they are given. For a batch also a list of them for each prompt."""
    speculation: Speculation | None
    """Propose tokens by ``PromptLookup`` or ``DraftModel`` and verify several at once; the text stays what it is without."""
    adapter: str | None
    """Name of the adapter it is computed with; None for the model itself. The one in use when left out."""
    constraint: ConstraintSpec | None
    """What the text has to be: ``JsonSchema``, ``Regex``, ``Grammar`` or ``JsonObject``. It ends when it is whole, and is made
    whole within ``max_tokens``; what cannot be kept ends with an error."""


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue, and how many of them are control tokens that a text spelled."""

    tokens: list[int]
    special_tokens: int = 0


@dataclass(frozen=True)
class TextRequest:
    """A request to the engine, and what makes text of its tokens."""

    request: Request
    text: TextAssembler


class Requests:
    """Makes requests to one model.

    Args:
        tokenizer: the checkpoint's, or why there is none.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | TokenizerError) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._known_breakers: tuple[tuple[str, ...], frozenset[tuple[int, ...]]] | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises TokenizerError when there is none."""
        if isinstance(self._tokenizer, Exception):
            raise self._tokenizer
        return self._tokenizer

    @property
    def piece_of(self) -> PieceOf | None:
        """From a token id to its piece, None beyond the end of the vocabulary; None without a tokenizer."""
        return None if isinstance(self._tokenizer, Exception) else partial(_piece, self._tokenizer)

    def request(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        cancelled: Callable[[], bool] | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        logits_processors: Sequence[Any] | None = None,
        speculation: Speculation | None = None,
        constraint: ConstraintSpec | None = None,
        adapter: str | None = IN_USE,
        is_answer: bool = False,
        parser: CallParser | None = None,
    ) -> TextRequest:
        """Check what ``GenerationOptions`` says, and put it with a prompt.

        ``is_answer``: the text starts afresh, so the space SentencePiece puts before a first word is taken off. ``parser``
        takes calls of tools out of it.

        Raises:
            InvalidRequestError, ContextLengthError, ConstraintError, TokenizerError: as for ``Mixtral.generate``.
        """
        check_integer("max_tokens", max_tokens, 1)
        check_type("sampling", sampling, (SamplingParams, type(None)), "SamplingParams, or None for greedy")
        check_type("stop", stop, (str, list, tuple), "text, or a list of texts")
        check_callbacks(cancelled=cancelled, on_prefill=on_prefill)
        check_type("speculation", speculation, (Speculation, type(None)), "PromptLookup or DraftModel")
        check_type("adapter", adapter, (str, type(None)), "the name of an adapter, or None for the model itself")
        number = self._engine.adapters.number_of(adapter)
        tokens = prompt.tokens
        engine, own = self._engine, None if isinstance(self._tokenizer, Exception) else self._tokenizer
        limit = min(max_tokens, engine.room(len(tokens)))
        stops = MarkedStops([stop] if isinstance(stop, str) else stop, own)
        if stop and own is None:
            _ = self.tokenizer  # stop strings need text: raises and says why there is none
        stop_ids = {*engine.checked_ids(stop_token_ids, "stop_token_ids"), *engine.config.eos_token_ids}
        if own is not None:
            stop_ids |= own.eos_token_ids
        if speculation is not None:
            speculation.check(engine, self.piece_of)
        sampler = self._sampler(sampling or SamplingParams(), tokens, stop_ids, check_processors(logits_processors))
        decoder = None if own is None else own.streaming_decoder(continues=not is_answer)
        text = TextAssembler(decoder, limit, frozenset(stop_ids), stops, cancelled, parser)
        stats = GenerationStats(prompt_special_tokens=prompt.special_tokens)
        state: Constraint | None = None
        if constraint is not None:
            compiled = self.constraints.compile(constraint, from_start=is_answer)
            state, stats.warnings = compiled.begin(limit), compiled.warnings
        return TextRequest(Request(tokens, limit, sampler, speculation, on_prefill, stats, state, number), text)

    @cached_property
    def constraints(self) -> Compiler:
        """Compiles constraints for this model's vocabulary, and keeps them.

        Raises:
            TokenizerError: there is no tokenizer.
            MissingDependencyError: the package that compiles them is not installed.
        """
        engine = self._engine
        return Compiler(TokenTable(self.tokenizer, engine.vocab_size, engine.config.eos_token_ids))

    def _sampler(
        self, params: SamplingParams, tokens: list[int], stop_ids: Set[int], processors: Sequence[LogitsProcessor]
    ) -> Sampler:
        own = None if isinstance(self._tokenizer, Exception) else self._tokenizer
        special, breakers = set(stop_ids), frozenset[tuple[int, ...]]()
        if params.xtc_probability and own is not None:
            special |= set(own.encode("\n", bos=False))
        if params.repels and params.dry_sequence_breakers:
            breakers = self._breakers(tuple(params.dry_sequence_breakers))
        return Sampler(
            params,
            tokens,
            self._engine.vocab_size,
            xtc_special_tokens=special,
            dry_breakers=breakers,
            processors=processors,
        )

    def _breakers(self, texts: tuple[str, ...]) -> frozenset[tuple[int, ...]]:
        """Looks at the whole vocabulary: once for the same texts."""
        if self._known_breakers is None or self._known_breakers[0] != texts:
            try:
                self._known_breakers = (texts, completing_sequences(self.tokenizer, texts))
            except TokenizerError as error:
                raise TokenizerError(
                    f"dry_sequence_breakers are texts: give none, () or none on the command line; {error}"
                ) from None
        return self._known_breakers[1]

    def samples(self, prompt: Prompt, n: int, options: GenerationOptions) -> list[TextRequest]:
        """``n`` requests that continue one prompt; the i-th, from 0, has the seed plus i where there is one."""
        check_integer("n", n, 1, MAX_SAMPLES)
        if options.get("speculation") is not None:
            raise InvalidRequestError("speculation is for one text at a time; leave it out for a batch")
        sampling = options.get("sampling")
        made = []
        for i in range(n):
            own = GenerationOptions(**options)
            if i and isinstance(sampling, SamplingParams) and sampling.seed is not None:
                own["sampling"] = dataclasses.replace(sampling, seed=sampling.seed + i)
            made.append(self.request(prompt, **own))
        return made

    def batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        options: GenerationOptions,
        *,
        each: Sequence[GenerationOptions] | None = None,
        n: int = 1,
        special: bool = True,
    ) -> list[list[TextRequest]]:
        """``n`` requests for each of ``prompts``; an error names the prompt it is about by its number, from 0.

        ``each`` are options of each prompt, which go before ``options``.
        """
        check_type("prompts", prompts, (list, tuple), "a list of texts, or of lists of token ids")
        check_type("each", each, (list, tuple, type(None)), "a list of options, a dict for each prompt")
        processors = options.get("logits_processors")
        is_listed = isinstance(processors, list | tuple) and any(isinstance(item, list | tuple) for item in processors)
        for name, given, kind in (
            ("logits_processors", processors if is_listed else None, "lists"),
            ("each", each, "dicts"),
        ):
            if given is not None and len(given) != len(prompts):
                advice = "functions for all of them" if kind == "lists" else "leave it out"
                raise InvalidRequestError(
                    f"{name} has {len(given)} {kind} for {len(prompts)} prompts; give one for each, or {advice}"
                )
        requests = []
        for index, prompt in enumerate(prompts):
            own = GenerationOptions(**options)
            if is_listed and processors is not None:
                own["logits_processors"] = processors[index]  # type: ignore[typeddict-item]
            try:
                own.update(GenerationOptions() if each is None else _own_options(each[index]))
                requests.append(self.samples(self.prompt(prompt, special=special), n, own))
            except (InvalidRequestError, ContextLengthError) as error:
                raise type(error)(f"prompt {index}: {error}") from None
        return requests

    def prompt(self, prompt: str | Sequence[int], *, special: bool = True) -> Prompt:
        """Token ids of text, after BOS, or of token ids; ``special``: text that spells a control token is that token.

        Raises:
            InvalidRequestError: none, or ids out of range.
            TokenizerError: text for a checkpoint without a tokenizer.
        """
        check_type("special", special, bool, "True or False")
        count = 0
        if isinstance(prompt, str):
            ids: Sequence[int] = self.tokenizer.encode(prompt, special=special) if prompt else []
            count = len(self.tokenizer.markers.sequence(prompt)) if special else 0
        else:
            ids = prompt
        if tokens := self._engine.checked_ids(ids, "the prompt"):
            return Prompt(tokens, count)
        raise InvalidRequestError("the prompt is empty; give some text or token ids")


def _own_options(given: object) -> GenerationOptions:
    """Raises InvalidRequestError for what is no dict of options."""
    check_type("each", given, dict, "a dict of options for each prompt")
    assert isinstance(given, dict)
    known = [name for name in GenerationOptions.__annotations__ if name != "speculation"]
    for name in given:
        if name not in known:
            raise InvalidRequestError(f"each holds {shown(name)}; options of a prompt are {', '.join(known)}")
    return GenerationOptions(**given)  # type: ignore[typeddict-item]


def _piece(tokenizer: Tokenizer, token: int) -> str | None:
    return tokenizer.id_to_piece(token) if token < tokenizer.vocab_size else None


# What people know from other libraries by its name alone.
_SAMPLING = {
    field.name: f"give it as sampling=SamplingParams({field.name}=…)" for field in dataclasses.fields(SamplingParams)
}
with_options = checked(options=Requests.request, without=("prompt", "is_answer", "parser"), elsewhere=_SAMPLING)
"""For methods that take ``GenerationOptions`` as ``**options``: see ``checked``."""
