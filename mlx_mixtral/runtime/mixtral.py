"""The object apps use: generate text with a model, ask it for logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import mlx.core as mx

from mlx_mixtral.arguments import check_type, checked
from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.calls.definitions import read_tools
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import BusyError, TokenizerError
from mlx_mixtral.experts.residency import Residency
from mlx_mixtral.experts.trace import RoutingTrace
from mlx_mixtral.generation.request import PieceOf
from mlx_mixtral.generation.scheduler import DEFAULT_MAX_STALL_S
from mlx_mixtral.machine.device import Device
from mlx_mixtral.model.routing import record_routing
from mlx_mixtral.model.transformer import MixtralModel
from mlx_mixtral.runtime.adapters import Adapters
from mlx_mixtral.runtime.batch import Batch, collect_batch, stream_batch
from mlx_mixtral.runtime.chat import CHAT_SAMPLING, ChatRequests
from mlx_mixtral.runtime.described import described
from mlx_mixtral.runtime.engine import Engine
from mlx_mixtral.runtime.requests import GenerationOptions, Requests, TextRequest, with_options
from mlx_mixtral.runtime.steps import Steps
from mlx_mixtral.runtime.stream import Chunk, Generation, TextStream
from mlx_mixtral.tokenizer import Tokenizer
from mlx_mixtral.tokenizer.base import Message

__all__ = ["CHAT_SAMPLING", "Mixtral"]


class Mixtral:
    """A loaded model, made by ``load``; use it from any thread, one generation at a time.

    An ``engine``, which knows token ids, and a tokenizer. ``config``, ``device``, ``residency`` (what stays in memory, and what
    was read) and ``module`` (the ``nn.Module``: token ids in, logits out) are the engine's.

    Example:
        >>> with load("mixtral-4bit") as model:
        ...     print(model.generate("Mixtral is", max_tokens=64).text)
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | TokenizerError) -> None:
        self.engine = engine
        self._requests = Requests(engine, tokenizer)
        self._chats = ChatRequests(self._requests)

    def __repr__(self) -> str:
        return described(self.engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except BusyError as busy:
            if error is None:
                raise
            # The caller's own error is the one to see.
            error.add_note(f"the model could not be closed: {busy}")

    @property
    def config(self) -> MixtralConfig:
        """What ``config.json`` says, and what ``load`` was told in its place."""
        return self.engine.config

    @property
    def device(self) -> Device:
        """Where it computes."""
        return self.engine.device

    @property
    def adapters(self) -> Adapters:
        """The adapters that generations can be computed with."""
        return self.engine.adapters

    @property
    def residency(self) -> Residency:
        """What stays in memory, and the counts of what did not."""
        return self.engine.residency

    @property
    def module(self) -> MixtralModel:
        """The network itself: ``module(tokens [B, L] int32, cache)`` gives lazy logits ``[B, L, V]``.

        Use it on the thread that evaluates them, not while a generation runs; on another device than MLX's default one within
        ``mx.stream(model.device.mlx)``.
        """
        return self.engine.module

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
        return self.engine.plan.min_bytes

    def make_cache(self, left_padding: Sequence[int] | None = None) -> KVCache:
        """An empty key-value cache for ``module``; ``left_padding`` has one entry a row of a batch."""
        return self.module.make_cache(left_padding)

    @property
    def is_leader(self) -> bool:
        """Whether this is the machine to ask: the only one, or the first of its group."""
        return self.engine.link is None or self.engine.link.is_leader

    def follow(self) -> None:
        """On the other machines of a group: compute what the first asks for, until it closes its model.

        Raises InvalidRequestError on the first, CheckpointError for an unreadable expert, GroupError for a machine lost.
        """
        self.engine.follow()

    def close(self) -> None:
        """Release the weights. The object cannot be used afterwards, and open streams end.

        Raises:
            BusyError: another thread computes something that is not a stream, such as ``logits``.
        """
        self.engine.close()

    @checked()
    def set_memory(self, memory: str | float | None, *, context: int | None = None) -> None:
        """Give the model another budget, without loading it again: banks of experts shrink or grow.

        ``memory`` is such as "12GB", None for what this machine can give; ``context`` as for ``load``, or the present one.

        Raises:
            MemoryBudgetError: less than the model can do with; nothing has changed then.
            InvalidRequestError, ContextLengthError: an argument out of range.
            CheckpointError: experts that have to be read cannot be; their layer goes on streaming.
            BusyError: a generation is running.
        """
        self.engine.set_memory(memory, context=context)

    @with_options
    def generate(
        self, prompt: str | Sequence[int], *, special: bool = True, **options: Unpack[GenerationOptions]
    ) -> Generation:
        """Continue ``prompt``: text, sent as it is after BOS, or token ids, sent as they are.

        Args:
            special: text that spells a control token, such as ``<|im_start|>``, becomes that token; False where the prompt
                holds what somebody else wrote.
            options: max_tokens, sampling, stop, stop_token_ids, cancelled, on_prefill, logits_processors, speculation,
                constraint, adapter: see ``GenerationOptions``.

        Raises:
            InvalidRequestError: an empty prompt, a token id or an argument out of range.
            ContextLengthError: the prompt leaves no room in the model's context.
            ConstraintError: a constraint that is refused, that no text within ``max_tokens`` keeps, or that cannot be kept.
            TokenizerError: text, or a constraint, for a checkpoint without a tokenizer.
            MissingDependencyError: a constraint without the extra ``constraints``.
            BusyError: another generation is running on this model.
        """
        return self.stream(prompt, special=special, **options).collect()

    @with_options
    def stream(
        self, prompt: str | Sequence[int], *, special: bool = True, **options: Unpack[GenerationOptions]
    ) -> TextStream:
        """As ``generate``, chunk by chunk. Arguments are checked here; work starts with the first step."""
        _ = self.module  # a closed model says so first
        return self._stream(self._requests.request(self._requests.prompt(prompt, special=special), **options))

    @with_options
    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_rows: int | None = None,
        n: int = 1,
        each: Sequence[GenerationOptions] | None = None,
        special: bool = True,
        **options: Unpack[GenerationOptions],
    ) -> list[Generation]:
        """Continue several prompts at once, each as ``generate`` would; weights are read once a step for all of them.

        A row's text is the one it would have alone, with a seed too: to the bit on the CPU, as far as rounding goes on GPUs.
        Prompts that begin like earlier ones are computed from where they differ.

        Args:
            prompts: text or token ids each.
            max_rows: generations at once; the rest wait, and join when one has ended or, under a memory budget, when its KV
                cache has room for them. When None it is 8, or fewer where experts are streamed (``Engine.default_rows``).
            n: continuations of each prompt, which is computed once; the first ``n`` results are the first prompt's. With a
                seed the i-th, from 0, is the text of that seed plus i.
            each: options of each prompt, where they differ from ``options``.
            special: as for ``generate``.
            options: for all of them: see ``GenerationOptions``.

        Raises:
            InvalidRequestError, ContextLengthError, TokenizerError, BusyError: as for ``generate``, the prompt's number named.
        """
        requests, chunks = self._batch(prompts, max_rows, special, options, n, each)
        return collect_batch(chunks, [made for group in requests for made in group])

    @with_options
    def stream_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_rows: int | None = None,
        n: int = 1,
        each: Sequence[GenerationOptions] | None = None,
        special: bool = True,
        **options: Unpack[GenerationOptions],
    ) -> Steps[tuple[int, Chunk]]:
        """As ``generate_batch``, by pairs of a result's number and its next chunk; busy until the last, or until closed."""
        return self._batch(prompts, max_rows, special, options, n, each)[1]

    @checked()
    def batch(self, *, max_rows: int | None = None, max_stall_s: float = DEFAULT_MAX_STALL_S) -> Batch:
        """A batch whose generations come and go while others run; the model is busy until it is closed.

        Args:
            max_rows: as for ``generate_batch``.
            max_stall_s: how long a chunk of a prompt may take while others wait for their next token.

        Raises:
            InvalidRequestError: an argument out of range.
            BusyError: another generation is running on this model.
        """
        return Batch(self.engine, self._requests, max_rows=max_rows, max_stall_s=max_stall_s)

    @with_options
    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """The assistant's next turn, in the checkpoint's chat format. Samples at temperature 0.7 and top-p 0.95 by default.

        Args:
            messages: ``{"role": "system" | "user" | "assistant" | "tool", "content": text}`` each, the newest last; one of the
                assistant at the end begins the answer. Calls and their results are written as OpenAI's API has them.
            tools: ``{"type": "function", "function": {"name", "description", "parameters"}}`` each: what the model may call. It
                is held to their schemas where the extra ``constraints`` is installed. Calls are in ``tool_calls``.
            tool_choice: "auto", "none", "required", or ``{"type": "function", "function": {"name": …}}``.
            parallel_tool_calls: False: one call at most.
            options: as for ``generate``.

        Raises:
            ChatTemplateError: messages the format has no place for.
            InvalidRequestError: tools that are none, or that cannot be kept; see ``read_tools``.
        """
        return self.stream_chat(
            messages, tools=tools, tool_choice=tool_choice, parallel_tool_calls=parallel_tool_calls, **options
        ).collect()

    @with_options
    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        **options: Unpack[GenerationOptions],
    ) -> TextStream:
        """As ``chat``, chunk by chunk; a chunk's ``call_events`` say what became certain of calls."""
        _ = self.module
        use = read_tools(tools, tool_choice, parallel_tool_calls)
        return self._stream(self._chats.request(messages, use, **options))

    @checked()
    def save_prompt(self, path: str | Path, prompt: str | Sequence[int], *, special: bool = True) -> None:
        """Compute ``prompt`` and save its keys and values to a file, for ``load_prompt`` of another day.

        Raises:
            InvalidRequestError, ContextLengthError, TokenizerError, BusyError: as for ``generate``.
            DestinationError, DiskSpaceError: the file cannot be written.
        """
        self.engine.save_prompt(path, self._requests.prompt(prompt, special=special).tokens)

    @checked()
    def load_prompt(self, path: str | Path) -> list[int]:
        """Load a saved prompt and return its token ids: a prompt that begins with them is computed from there on.

        Raises:
            PromptCacheError: not such a file, one of another model, version or ``kv_bits``, or more than may be kept.
        """
        return self.engine.load_prompt(path)

    @checked()
    def logits(self, token_ids: Sequence[int]) -> mx.array:
        """Logits ``[L, V]`` (in the compute type, evaluated) for every position of ``token_ids``, computed in chunks."""
        return self.engine.logits(self.engine.checked_ids(token_ids, "token_ids"))

    @checked()
    def routing_trace(self, texts: Sequence[Sequence[int]]) -> RoutingTrace:
        """Experts the routers choose for ``texts`` of token ids: what plans and replacement policies are judged by.

        Saved as ``routing.trace`` beside the weights, it is what budgets of this model are planned with.

        Raises:
            InvalidRequestError: no tokens, ids out of range, or a dense model, which has no routers.
        """
        check_type("texts", texts, (list, tuple), "a list of lists of token ids")
        return record_routing(self.module, self.logits, texts)

    @property
    def piece_of(self) -> PieceOf | None:
        """From a token id to the vocabulary's spelling of it; None without a tokenizer."""
        return self._requests.piece_of

    def _stream(self, made: TextRequest) -> TextStream:
        return TextStream(self.engine.generate(made.request), made.text, made.request.stats)

    def _batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_rows: int | None,
        special: bool,
        options: GenerationOptions,
        n: int,
        each: Sequence[GenerationOptions] | None,
    ) -> tuple[list[list[TextRequest]], Steps[tuple[int, Chunk]]]:
        engine = self.engine
        engine.scheduler(max_rows)  # arguments are checked here; work starts with the first step
        requests = self._requests.batch(prompts, options, each=each, n=n, special=special)
        begin = partial(Batch, engine, self._requests, max_rows=max_rows)
        return requests, engine.opened(stream_batch(begin, requests))
