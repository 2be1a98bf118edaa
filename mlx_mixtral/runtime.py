"""The object apps use: load a model, generate text with it, ask it for logits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import mlx.core as mx

from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.config import MixtralConfig
from mlx_mixtral.device import Device, compute_dtype, current_device
from mlx_mixtral.errors import (
    BusyError,
    ClosedError,
    ContextLengthError,
    DtypeRangeError,
    InvalidRequestError,
    MissingDependencyError,
    TokenizerError,
)
from mlx_mixtral.generation.loop import PREFILL_CHUNK_TOKENS, GenerationStats, Token, decode
from mlx_mixtral.generation.sampling import Sampler, SamplingParams
from mlx_mixtral.generation.stop import StopStrings
from mlx_mixtral.hub import resolve
from mlx_mixtral.loading import LoadProgress, load_module
from mlx_mixtral.model.mixtral import MixtralModel
from mlx_mixtral.stream import Generation, TextAssembler, TextStream
from mlx_mixtral.tokenizer import Tokenizer, load_tokenizer
from mlx_mixtral.weights.checkpoint import Checkpoint
from mlx_mixtral.weights.manifest import check_files, check_sizes

__all__ = ["CHAT_SAMPLING", "GenerationOptions", "Mixtral", "load"]

DEFAULT_MAX_TOKENS = 256
CHAT_SAMPLING = SamplingParams(temperature=0.7, top_p=0.95)

Message = Mapping[str, Any]


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


class Mixtral:
    """A loaded model. Made by ``load``; use it from any thread, one generation at a time.

    ``config``, ``device`` and ``module`` (the ``nn.Module``: token ids in, logits out) are public.
    """

    def __init__(
        self, module: MixtralModel, config: MixtralConfig, device: Device, tokenizer: Tokenizer | TokenizerError
    ) -> None:
        self.config = config
        self.device = device
        self._module: MixtralModel | None = module
        self._tokenizer = tokenizer
        self._busy = threading.Lock()
        # MLX streams belong to the thread that made them, except for this kind: it lets a model be loaded on one thread and
        # used on another, and a generation be resumed from several. The lock above keeps it to one user at a time.
        self._stream = mx.new_thread_unsafe_stream(mx.default_device())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def module(self) -> MixtralModel:
        """The network itself: ``module(tokens [B, L] int32, cache)`` gives lazy logits ``[B, L, V]``.

        Work with it on the thread that evaluates the result, and not while a generation runs.
        """
        if self._module is None:
            raise ClosedError("this model was closed; load it again")
        return self._module

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            TokenizerError: the checkpoint has none, or one that cannot be used; the message says which.
        """
        if isinstance(self._tokenizer, Exception):
            raise self._tokenizer
        return self._tokenizer

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as they lie in memory."""
        return self.module.nbytes

    def make_cache(self, left_padding: Sequence[int] | None = None) -> KVCache:
        """An empty key-value cache for ``module``; ``left_padding`` has one entry a row of a batch."""
        return self.module.make_cache(left_padding)

    def close(self) -> None:
        """Release the weights. The object cannot be used afterwards.

        Raises:
            BusyError: a generation is running; close it first.
        """
        with self._exclusive():
            self._module = None
        mx.clear_cache()

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> Generation:
        """Continue ``prompt``: text, sent as it is after BOS, or token ids, sent as they are.

        Args:
            options: max_tokens, sampling, stop, stop_token_ids, cancelled, on_prefill: see ``GenerationOptions``.

        Raises:
            InvalidRequestError: an empty prompt, a token id or an argument out of range.
            ContextLengthError: the prompt leaves no room in the model's context.
            TokenizerError: text for a checkpoint without a tokenizer.
            BusyError: another generation is running on this model.
        """
        return self.stream(prompt, **options).collect()

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> TextStream:
        """As ``generate``, chunk by chunk. Arguments are checked here; work starts with the first step."""
        return self._text_stream(self._prompt_ids(prompt), **options)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """The assistant's next turn, in the checkpoint's chat format. Samples at temperature 0.7 and top-p 0.95 by default.

        Args:
            messages: ``{"role": "system" | "user" | "assistant" | "tool", "content": text}`` each, the newest last.
            tools: function descriptions, for models trained to call them.
            options: as for ``generate``.

        Raises:
            ChatTemplateError: messages the format has no place for.
        """
        return self.stream_chat(messages, tools=tools, **options).collect()

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> TextStream:
        """As ``chat``, chunk by chunk."""
        tokens = self.tokenizer.encode_chat(messages, tools)
        options.setdefault("sampling", CHAT_SAMPLING)
        return self._text_stream(tokens, is_answer=True, **options)

    def logits(self, token_ids: Sequence[int]) -> mx.array:
        """Logits ``[L, V]`` (in the compute type, evaluated) for every position of ``token_ids``.

        Computed in chunks, so that working memory does not grow with the square of L; the logits themselves take
        L x V numbers.
        """
        tokens = self._check_ids(token_ids, "token_ids")
        if not tokens:
            raise InvalidRequestError("token_ids is empty; give at least one token")
        if len(tokens) > self.config.max_position_embeddings:
            raise ContextLengthError(
                f"{len(tokens)} tokens were given; the model's context holds {self.config.max_position_embeddings}"
            )
        with self._exclusive(), mx.stream(self._stream):
            module, parts = self.module, []
            cache = module.make_cache()
            for start in range(0, len(tokens), PREFILL_CHUNK_TOKENS):
                chunk = mx.array([tokens[start : start + PREFILL_CHUNK_TOKENS]], mx.int32)
                parts.append(module(chunk, cache)[0])
                mx.eval(parts[-1], cache.arrays)
            result = parts[0] if len(parts) == 1 else mx.concatenate(parts)
            mx.eval(result)
        return result

    def _text_stream(
        self,
        tokens: list[int],
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        cancelled: Callable[[], bool] | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        is_answer: bool = False,
    ) -> TextStream:
        """``is_answer``: the text starts afresh, so the space SentencePiece puts before a first word is taken off."""
        module, vocab_size = self.module, self.config.vocab_size
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
            raise InvalidRequestError(f"max_tokens is {max_tokens!r}; it must be an integer of at least 1")
        room = self.config.max_position_embeddings - len(tokens)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(tokens)} tokens; the model's context holds "
                f"{self.config.max_position_embeddings}, and one must be left to generate"
            )
        limit = min(max_tokens, room)
        stops = StopStrings([stop] if isinstance(stop, str) else stop)
        has_tokenizer = not isinstance(self._tokenizer, Exception)
        if stop and not has_tokenizer:
            _ = self.tokenizer  # stop strings need text: raises and says why there is none
        stop_ids = frozenset(self._check_ids(stop_token_ids, "stop_token_ids")) | self._end_ids()
        sampler = Sampler(sampling or SamplingParams(), tokens, vocab_size)

        def run(stats: GenerationStats) -> Generator[Token, None, None]:
            return decode(
                module,
                tokens,
                module.make_cache(),
                sampler,
                limit,
                stats,
                stream=self._stream,
                prefill_chunk=PREFILL_CHUNK_TOKENS,
                on_prefill=on_prefill,
            )

        decoder = self.tokenizer.streaming_decoder(continues=not is_answer) if has_tokenizer else None
        text = TextAssembler(decoder, limit, stop_ids, stops, cancelled)
        return TextStream(run, text, self._exclusive(), self.device, self._stream)

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        _ = self.module  # a closed model says so before anything else
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequestError("the prompt is empty; give some text or token ids")
            return self._check_ids(self.tokenizer.encode(prompt), "the prompt")
        tokens = self._check_ids(prompt, "the prompt")
        if not tokens:
            raise InvalidRequestError("the prompt is empty; give some text or token ids")
        return tokens

    def _check_ids(self, ids: Sequence[int], what: str) -> list[int]:
        try:
            tokens = [int(i) if hasattr(i, "__index__") and not isinstance(i, bool) else None for i in ids]
        except TypeError:
            raise InvalidRequestError(f"{what} is {type(ids).__name__}, not text or a list of token ids") from None
        for given, token in zip(ids, tokens, strict=True):
            if token is None or not 0 <= token < self.config.vocab_size:
                raise InvalidRequestError(
                    f"{what} holds token id {given!r}; ids go from 0 to {self.config.vocab_size - 1}"
                )
        return [token for token in tokens if token is not None]

    def _end_ids(self) -> frozenset[int]:
        known = frozenset(self.config.eos_token_ids)
        return known if isinstance(self._tokenizer, Exception) else known | self._tokenizer.eos_token_ids

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise BusyError("this model is already generating; finish or close that stream first, or load it twice")
        try:
            yield
        finally:
            self._busy.release()


def load(
    path: str | Path,
    *,
    memory: str | int | None = None,
    context: int | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    verify: bool = False,
    progress: Callable[[LoadProgress], None] | None = None,
) -> Mixtral:
    """Load a model from a folder or a hub repository.

    Reads MLX checkpoints (ours and mlx-lm's, quantised in any MLX mode) and unquantised Hugging Face folders; dense Mistral
    and Llama models as the one-expert case. Weights are read straight into arrays of their final size.

    Args:
        path: folder, ``owner/name`` or ``owner/name@revision``.
        memory: budget for weights and the KV cache of ``context`` tokens, such as "12GB"; the model must fit it.
        context: tokens the budget reserves KV cache for; the smaller of the model's and 4096 when left out.
        dtype: compute type: auto (by device), float32, float16 or bfloat16.
        verify: compare every file of one of our conversions with its sha256 first, which reads the weights once more. The
            sizes of its weight files are compared always.
        progress: told the bytes read so far, from this thread.

    Raises:
        CheckpointError, ConfigError, HubError: the model cannot be found, read or run.
        MemoryBudgetError: it does not fit ``memory``.
        InvalidRequestError: an argument out of range.
    """
    device = current_device()
    kind = compute_dtype(dtype, device)
    folder = resolve(path, revision=revision)
    check_sizes(folder)
    if verify:
        check_files(folder)
    config = MixtralConfig.from_folder(folder)
    checkpoint = Checkpoint(folder)
    tokenizer: Tokenizer | TokenizerError
    try:
        tokenizer = load_tokenizer(folder, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
    except MissingDependencyError as error:
        tokenizer = TokenizerError(str(error))
    except TokenizerError as error:
        tokenizer = error
    try:
        module = load_module(config, checkpoint, kind, memory, context, progress)
    except DtypeRangeError:
        if kind != "F16" or dtype != "auto":
            raise
        module = load_module(config, checkpoint, "BF16", memory, context, progress)
    return Mixtral(module, config, device, tokenizer)
