"""What is asked of a model, checked before any work begins: prompts, lengths, sampling, where to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from mlx_mixtral.arguments import check_callbacks, check_type
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import ContextLengthError, InvalidRequestError, TokenizerError
from mlx_mixtral.experts.residency import Residency
from mlx_mixtral.generation.sampling import Sampler, SamplingParams
from mlx_mixtral.generation.stop import StopStrings
from mlx_mixtral.runtime.speculation import DraftModel, PromptLookup, Speculation
from mlx_mixtral.runtime.stream import TextAssembler
from mlx_mixtral.tokenizer import Tokenizer

__all__ = ["DEFAULT_MAX_TOKENS", "GenerationOptions", "Request", "Requests"]

DEFAULT_MAX_TOKENS = 256


class GenerationOptions(TypedDict, total=False):
    """What ``generate``, ``stream``, ``chat`` and ``stream_chat`` take beside the prompt. All may be left out."""

    max_tokens: int
    """Most tokens to generate (256); the context ends it earlier when it is full."""
    sampling: SamplingParams | None
    """How tokens are chosen; greedy when left out."""
    stop: str | Sequence[str]
    """Text that ends the generation and is not part of it."""
    stop_token_ids: Sequence[int]
    """Ids that end it, beside the checkpoint's end-of-sequence ids."""
    cancelled: Callable[[], bool] | None
    """Asked after every token; True ends the generation with ``finish_reason`` "cancelled"."""
    on_prefill: Callable[[int, int], None] | None
    """Told ``(done, total)`` prompt tokens while the prompt is computed."""
    speculation: Speculation | None
    """Propose tokens by ``PromptLookup`` or ``DraftModel`` and verify several at once; the text stays what it is without."""


@dataclass(frozen=True)
class Request:
    """One generation to be done. ``sampler`` and ``text`` have state: a request is carried out once."""

    tokens: list[int]
    max_tokens: int
    sampler: Sampler
    text: TextAssembler
    on_prefill: Callable[[int, int], None] | None = None
    speculation: Speculation | None = None


class Requests:
    """Makes requests to one model, and knows what it can be asked.

    Args:
        tokenizer: the checkpoint's, or why there is none.
    """

    def __init__(self, config: MixtralConfig, residency: Residency, tokenizer: Tokenizer | TokenizerError) -> None:
        self._config, self._residency, self._tokenizer = config, residency, tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises TokenizerError when there is none."""
        if isinstance(self._tokenizer, Exception):
            raise self._tokenizer
        return self._tokenizer

    @property
    def context_limit(self) -> int:
        """Tokens a sequence may have: the model's own, or those a memory budget holds KV cache for."""
        model, planned = self._config.max_position_embeddings, self._residency.planned
        return model if planned.budget_bytes is None else min(model, planned.demands.context_capacity)

    def request(
        self,
        tokens: list[int],
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        cancelled: Callable[[], bool] | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        speculation: Speculation | None = None,
        is_answer: bool = False,
    ) -> Request:
        """Check what ``GenerationOptions`` says, and put it with a prompt.

        ``is_answer``: the text starts afresh, so the space SentencePiece puts before a first word is taken off.

        Raises:
            InvalidRequestError, ContextLengthError, TokenizerError: as for ``Mixtral.generate``.
        """
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
            raise InvalidRequestError(f"max_tokens is {max_tokens!r}; it must be an integer of at least 1")
        check_type("sampling", sampling, (SamplingParams, type(None)), "SamplingParams, or None for greedy")
        check_type("stop", stop, (str, list, tuple), "text, or a list of texts")
        check_callbacks(cancelled=cancelled, on_prefill=on_prefill)
        check_type("speculation", speculation, (PromptLookup, DraftModel, type(None)), "PromptLookup or DraftModel")
        limit = min(max_tokens, self.room(len(tokens)))
        stops = StopStrings([stop] if isinstance(stop, str) else stop)
        has_tokenizer = not isinstance(self._tokenizer, Exception)
        if stop and not has_tokenizer:
            _ = self.tokenizer  # stop strings need text: raises and says why there is none
        stop_ids = frozenset(self.ids(stop_token_ids, "stop_token_ids")) | self._end_ids()
        sampler = Sampler(sampling or SamplingParams(), tokens, self._config.vocab_size)
        decoder = self.tokenizer.streaming_decoder(continues=not is_answer) if has_tokenizer else None
        text = TextAssembler(decoder, limit, stop_ids, stops, cancelled)
        return Request(tokens, limit, sampler, text, on_prefill, speculation)

    def batch(self, prompts: Sequence[str | Sequence[int]], options: GenerationOptions) -> list[Request]:
        """A request for each of ``prompts``; an error names the prompt it is about by its number, from 0."""
        if options.get("speculation") is not None:
            raise InvalidRequestError("speculation is for one text at a time; leave it out for a batch")
        requests = []
        for index, prompt in enumerate(prompts):
            try:
                requests.append(self.request(self.prompt(prompt), **options))
            except (InvalidRequestError, ContextLengthError) as error:
                raise type(error)(f"prompt {index}: {error}") from None
        return requests

    def prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of text, after BOS, or of token ids.

        Raises:
            InvalidRequestError: none, or ids out of range.
            TokenizerError: text for a checkpoint without a tokenizer.
        """
        if isinstance(prompt, str):
            tokens = self.ids(self.tokenizer.encode(prompt), "the prompt") if prompt else []
        else:
            tokens = self.ids(prompt, "the prompt")
        if not tokens:
            raise InvalidRequestError("the prompt is empty; give some text or token ids")
        return tokens

    def ids(self, ids: Sequence[int], what: str) -> list[int]:
        """``ids`` as a list of ints.

        Raises:
            InvalidRequestError: something else, or out of the vocabulary.
        """
        # Bytes are a sequence of small integers to Python, and text that was not decoded to whoever passes them.
        if isinstance(ids, bytes | bytearray) or not isinstance(ids, Iterable):
            raise InvalidRequestError(f"{what} is {type(ids).__name__}, not text or a list of token ids")
        tokens, vocab_size = [], self._config.vocab_size
        for given in ids:
            token = int(given) if hasattr(given, "__index__") and not isinstance(given, bool) else -1
            if not 0 <= token < vocab_size:
                raise InvalidRequestError(f"{what} holds token id {given!r}; ids go from 0 to {vocab_size - 1}")
            tokens.append(token)
        return tokens

    def room(self, prompt_tokens: int) -> int:
        """Tokens that can be generated after a prompt.

        Raises:
            ContextLengthError: none.
        """
        model, limit = self._config.max_position_embeddings, self.context_limit
        if prompt_tokens < limit:
            return limit - prompt_tokens
        if limit == model:
            raise ContextLengthError(
                f"the prompt has {prompt_tokens} tokens; the model's context holds {model}, and one must be left to generate"
            )
        raise ContextLengthError(
            f"the prompt has {prompt_tokens} tokens; the memory budget holds KV cache for {limit}, and one must be left to "
            f"generate: reserve more with --context or context= (the model's own is {model})"
        )

    def _end_ids(self) -> frozenset[int]:
        known = frozenset(self._config.eos_token_ids)
        return known if isinstance(self._tokenizer, Exception) else known | self._tokenizer.eos_token_ids
