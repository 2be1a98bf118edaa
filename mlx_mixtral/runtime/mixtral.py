"""The object apps use: generate text with a model, ask it for logits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import mlx.core as mx

from mlx_mixtral.arguments import check_type
from mlx_mixtral.budget.planner import Planner
from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import (
    BusyError,
    ChatTemplateError,
    ClosedError,
    ContextLengthError,
    InvalidRequestError,
    TokenizerError,
)
from mlx_mixtral.experts.residency import Residency
from mlx_mixtral.experts.trace import RoutingTrace
from mlx_mixtral.generation.sampling import SamplingParams
from mlx_mixtral.generation.scheduler import SequenceRequest
from mlx_mixtral.generation.stats import GenerationStats, Token
from mlx_mixtral.machine.device import Device, wired
from mlx_mixtral.model.prefetch import PrefetchControl
from mlx_mixtral.model.routing import record_routing
from mlx_mixtral.model.step import DecodeStep
from mlx_mixtral.model.transformer import MixtralModel
from mlx_mixtral.runtime.batch import DEFAULT_ROWS, collect_batch, make_scheduler, stream_batch
from mlx_mixtral.runtime.prompt_cache import PromptCache
from mlx_mixtral.runtime.requests import GenerationOptions, Requests
from mlx_mixtral.runtime.speculation import decoding, exclusive
from mlx_mixtral.runtime.stream import Chunk, Generation, TextStream
from mlx_mixtral.tokenizer import Tokenizer

__all__ = ["CHAT_SAMPLING", "Mixtral"]

CHAT_SAMPLING = SamplingParams(temperature=0.7, top_p=0.95)

Message = Mapping[str, Any]


class Mixtral:
    """A loaded model, made by ``load``; use it from any thread, one generation at a time.

    ``config``, ``device``, ``residency`` (what stays in memory, and what was read) and ``module`` (the ``nn.Module``: token
    ids in, logits out) are public.
    """

    def __init__(
        self,
        module: MixtralModel,
        residency: Residency,
        planner: Planner,
        config: MixtralConfig,
        device: Device,
        tokenizer: Tokenizer | TokenizerError,
        prefetch: PrefetchControl,
        prefix_cache: int | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.residency = residency
        self._planner, self._prefetch = planner, prefetch
        prefetch.connect(module.layers)
        self._module: MixtralModel | None = module
        self._requests = Requests(config, residency, tokenizer)
        self._prompt_cache = PromptCache(planner, residency, prefix_cache)
        self._step: DecodeStep | None = self._decode_step(module)
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
        return self._requests.tokenizer

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as they lie in memory."""
        return self.module.nbytes

    @property
    def min_memory_bytes(self) -> int:
        """Bytes of the smallest memory budget the model can do with, for the context it was loaded for."""
        return self.residency.planned.demands.min_bytes

    def make_cache(self, left_padding: Sequence[int] | None = None) -> KVCache:
        """An empty key-value cache for ``module``; ``left_padding`` has one entry a row of a batch."""
        return self.module.make_cache(left_padding)

    def close(self) -> None:
        """Release the weights. The object cannot be used afterwards.

        Raises:
            BusyError: a generation is running; close it first.
        """
        with self._exclusive():
            self._module = self._step = None
            self._prompt_cache.kept.clear()
            self.residency.close()
            self.residency.release()
        mx.clear_cache()

    def set_memory(self, memory: str | int | None, *, context: int | None = None) -> None:
        """Give the model another budget, without loading it again: banks of experts shrink or grow.

        Args:
            memory: such as "12GB"; what this machine can give when None.
            context: as for ``load``; the present one when None.

        Raises:
            MemoryBudgetError: less than the model can do with; nothing has changed then.
            InvalidRequestError, ContextLengthError: an argument out of range.
            CheckpointError: experts that have to be read cannot be; their layer goes on streaming.
            BusyError: a generation is running.
        """
        with self._exclusive(), mx.stream(self._stream):
            _ = self.module
            planned = self._planner.plan(memory, self.residency.planned.demands.context if context is None else context)
            try:
                self.residency.change(planned, self._planner.builder.bank)
            finally:
                self._prompt_cache.fit()
                self._prefetch.connect(self.module.layers)
                self._step = self._decode_step(self.module)

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> Generation:
        """Continue ``prompt``: text, sent as it is after BOS, or token ids, sent as they are.

        Args:
            options: max_tokens, sampling, stop, stop_token_ids, cancelled, on_prefill, speculation: see ``GenerationOptions``.

        Raises:
            InvalidRequestError: an empty prompt, a token id or an argument out of range.
            ContextLengthError: the prompt leaves no room in the model's context.
            TokenizerError: text for a checkpoint without a tokenizer.
            BusyError: another generation is running on this model.
        """
        return self.stream(prompt, **options).collect()

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> TextStream:
        """As ``generate``, chunk by chunk. Arguments are checked here; work starts with the first step."""
        _ = self.module  # a closed model says so before anything else
        return self._text_stream(self._requests.prompt(prompt), **options)

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_rows: int = DEFAULT_ROWS,
        **options: Unpack[GenerationOptions],
    ) -> list[Generation]:
        """Continue several prompts at once, each as ``generate`` would; weights are read once a step for all of them.

        A row's text is the one it would have alone, as far as rounding goes (about 1e-6 in float32), with a seed too.

        Args:
            prompts: text or token ids each.
            max_rows: generations at once; the rest wait, and join when one has ended or, under a memory budget, when its KV
                cache has room for them.
            options: for all of them: see ``GenerationOptions``.

        Raises:
            InvalidRequestError, ContextLengthError, TokenizerError, BusyError: as for ``generate``, the prompt's number named.
        """
        sequences, chunks = self._batch(prompts, max_rows, options)
        return collect_batch(chunks, sequences)

    def stream_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_rows: int = DEFAULT_ROWS,
        **options: Unpack[GenerationOptions],
    ) -> Generator[tuple[int, Chunk], None, None]:
        """As ``generate_batch``, by pairs of a prompt's number and its next chunk; busy until the last, or until closed."""
        return self._batch(prompts, max_rows, options)[1]

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
        if not tokens:
            raise ChatTemplateError(
                "the checkpoint's chat template makes nothing of these messages; use generate instead"
            )
        options.setdefault("sampling", CHAT_SAMPLING)
        return self._text_stream(tokens, is_answer=True, **options)

    def save_prompt(self, path: str | Path, prompt: str | Sequence[int]) -> None:
        """Compute ``prompt`` and save its keys and values to a file, for ``load_prompt`` of another day.

        Raises:
            InvalidRequestError, ContextLengthError, TokenizerError, BusyError: as for ``generate``.
            DestinationError, DiskSpaceError: the file cannot be written.
        """
        tokens = self._requests.prompt(prompt)
        self._requests.room(len(tokens))
        with self._exclusive(), mx.stream(self._stream):
            self._prompt_cache.save(path, tokens, self.module, self.residency.planned.chunk_tokens)

    def load_prompt(self, path: str | Path) -> list[int]:
        """Load a saved prompt and return its token ids: a prompt that begins with them is computed from there on.

        Raises:
            PromptCacheError: not such a file, one of another model, version or ``kv_bits``, or more than may be kept.
        """
        with self._exclusive(), mx.stream(self._stream):
            return self._prompt_cache.load(path, self.module)

    def logits(self, token_ids: Sequence[int]) -> mx.array:
        """Logits ``[L, V]`` (in the compute type, evaluated) for every position of ``token_ids``.

        Computed in chunks, so that working memory does not grow with the square of L.
        """
        tokens = self._requests.ids(token_ids, "token_ids")
        if not tokens:
            raise InvalidRequestError("token_ids is empty; give at least one token")
        if len(tokens) > self.config.max_position_embeddings:
            raise ContextLengthError(
                f"{len(tokens)} tokens were given; the model's context holds {self.config.max_position_embeddings}"
            )
        with self._exclusive(), mx.stream(self._stream):
            self._prompt_cache.give_way()
            return self.module.logits(tokens, self.residency.planned.chunk_tokens)

    def routing_trace(self, texts: Sequence[Sequence[int]]) -> RoutingTrace:
        """Experts the routers choose for ``texts`` of token ids: what plans and replacement policies are judged by.

        Saved as ``routing.trace`` beside the weights, it is what budgets of this model are planned with.

        Raises:
            InvalidRequestError: no tokens, ids out of range, or a dense model, which has no routers.
        """
        check_type("texts", texts, (list, tuple), "a list of lists of token ids")
        return record_routing(self.module, self.logits, texts)

    def _text_stream(
        self, tokens: list[int], *, is_answer: bool = False, **options: Unpack[GenerationOptions]
    ) -> TextStream:
        module, step = self.module, self._step
        assert step is not None
        request = self._requests.request(tokens, is_answer=is_answer, **options)
        decode = decoding(request, self)

        def run(stats: GenerationStats) -> Generator[Token, None, None]:
            plan = self.residency.plan
            stats.predicted_tok_s = None if plan is None else plan.tok_s
            start = partial(
                decode,
                module,
                step,
                sampler=request.sampler,
                max_tokens=request.max_tokens,
                stats=stats,
                stream=self._stream,
                prefill_chunk=self.residency.planned.chunk_tokens,
                on_prefill=request.on_prefill,
            )
            new = partial(module.make_cache, max_tokens=self._requests.context_limit)
            return self._prompt_cache.generate(request.tokens, new, start, stats, self._stream)

        budget = self.residency.budget_bytes
        return TextStream(run, request.text, exclusive(request, self), self.device, self._stream, budget)

    def _batch(
        self, prompts: Sequence[str | Sequence[int]], max_rows: int, options: GenerationOptions
    ) -> tuple[list[SequenceRequest], Generator[tuple[int, Chunk], None, None]]:
        module, step, planned = self.module, self._step, self.residency.planned
        assert step is not None
        check_type("prompts", prompts, (list, tuple), "a list of texts, or of lists of token ids")
        scheduler = make_scheduler(module, step, planned, self._requests.context_limit, max_rows, self._stream)
        requests = self._requests.batch(prompts, options)
        self._prompt_cache.give_way()
        sequences = [
            SequenceRequest(made.tokens, made.max_tokens, made.sampler, on_prefill=made.on_prefill) for made in requests
        ]
        memory = wired(self.device, self._stream, self.residency.budget_bytes)
        return sequences, stream_batch(scheduler, requests, self._exclusive(), memory, sequences, self._stream)

    def _decode_step(self, module: MixtralModel) -> DecodeStep:
        return DecodeStep(module, compiled=self.device.kind != "cpu")

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise BusyError("this model is already generating; finish or close that stream first, or load it twice")
        try:
            yield
        finally:
            self._busy.release()
