"""The engine: token ids in, tokens out. It knows nothing of text; applications, programs and servers are built on it."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import mlx.core as mx

from mlx_mixtral.budget.plan import MemoryPlan
from mlx_mixtral.budget.planner import Planner
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import BusyError, ClosedError, ContextLengthError, InvalidRequestError
from mlx_mixtral.experts.residency import AllocateBank, Residency
from mlx_mixtral.generation.constrained import decode_constrained
from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.logits import all_logits
from mlx_mixtral.generation.loop import decode
from mlx_mixtral.generation.request import Request
from mlx_mixtral.generation.scheduler import DEFAULT_MAX_STALL_S, Scheduler
from mlx_mixtral.generation.speculation.cost import ForwardCost
from mlx_mixtral.generation.stats import Token
from mlx_mixtral.machine.device import Device, wired
from mlx_mixtral.machine.streams import StreamLease
from mlx_mixtral.model.adapting import Adapting
from mlx_mixtral.model.prefetch import PrefetchControl
from mlx_mixtral.model.step import DecodeStep
from mlx_mixtral.model.transformer import MixtralModel
from mlx_mixtral.runtime.adapters import Adapters
from mlx_mixtral.runtime.follow import Follower
from mlx_mixtral.runtime.generating import generated
from mlx_mixtral.runtime.limits import context_limit, room_after
from mlx_mixtral.runtime.prompt_cache import PromptCache, RowPrefixes
from mlx_mixtral.runtime.rows import check_limits, default_rows
from mlx_mixtral.runtime.steps import Closable, Steps
from mlx_mixtral.runtime.token_ids import checked_ids

__all__ = ["Engine"]

T = TypeVar("T")


class Engine:
    """A model in memory and everything it takes to generate with it; one user at a time.

    Use it from any thread. MLX's work goes to a stream of its own on ``device``, which is entered for one step at a time,
    because steps may be taken from different threads.

    Args:
        config: of all of the model.
        module: the network, or this machine's share of it.
        residency: what of it stays in memory, with the plan in force.
        planner: makes other plans of it.
        lease: the stream on ``device`` that it computes on; the engine's from now on, and given back when it is closed.
        allocate: a bank of expert slots, for when the plan changes.
        adapting: puts adapters on ``module``.
        identity: tells the checkpoint from others; asked when a prompt is saved or loaded.
        settings: what it computes otherwise than the checkpoint says; a saved prompt is of the same.
        prefix_cache: bytes of earlier prompts that are kept; what the plan allows when None.

    Example:
        >>> engine = load("mixtral-4bit").engine
        >>> request = Request([1, 415, 2936], max_tokens=8, sampler=Sampler(SamplingParams(), [], engine.vocab_size))
        >>> [token.token_id for token in engine.generate(request)]
    """

    def __init__(
        self,
        config: MixtralConfig,
        module: MixtralModel,
        residency: Residency,
        planner: Planner,
        device: Device,
        prefetch: PrefetchControl,
        *,
        lease: StreamLease,
        allocate: AllocateBank,
        adapting: Adapting,
        identity: Callable[[], str],
        prefix_cache: int | None = None,
        settings: str = "",
    ) -> None:
        self.config = config
        self.device, self.residency = device, residency
        self.link, longest = module.link, config.rope.switches_at()
        self.prompt_cache = PromptCache(
            residency.plan, prefix_cache, identity, settings=settings, link=self.link, max_tokens=longest
        )
        # The lock below keeps it to one user at a time.
        self._lease, self.stream = lease, lease.stream
        self.planner, self.prefetch, self._allocate = planner, prefetch, allocate
        self._busy = threading.Lock()
        self._open: weakref.WeakSet[Closable] = weakref.WeakSet()
        self._step: DecodeStep | None = None
        self._module: MixtralModel | None = module
        self.adapters = Adapters(self, adapting)
        self._begin(module)

    @property
    def context(self) -> DecodeContext:
        """What loops work with, under the plan in force.

        Raises:
            ClosedError: the model was closed.
            UnsupportedPlatformError: this process was forked after the model was loaded.
        """
        if self._module is None or self._step is None:
            raise ClosedError("this model was closed; load it again")
        self._lease.check()
        return DecodeContext(self._module, self._step, self.stream, self.plan.chunk_tokens)

    @property
    def is_closed(self) -> bool:
        """Whether the weights were released."""
        return self._module is None

    @property
    def module(self) -> MixtralModel:
        """The network itself; raises ClosedError as ``context`` does."""
        return self.context.model

    @property
    def plan(self) -> MemoryPlan:
        """What a memory budget, or the machine, lets it take."""
        return self.residency.plan

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def context_limit(self) -> int:
        """Tokens a sequence may have: the model's own, or those a memory budget holds KV cache for."""
        return context_limit(self.config, self.plan)

    def room(self, prompt_tokens: int) -> int:
        """Tokens that can be generated after a prompt.

        Raises:
            ContextLengthError: none.
        """
        return room_after(prompt_tokens, self.config, self.plan)

    def checked_ids(self, ids: Iterable[int], what: str) -> list[int]:
        """``ids`` as a list of ints.

        Raises:
            InvalidRequestError: something else, or out of the vocabulary; ``what`` names them.
        """
        return checked_ids(ids, what, self.vocab_size)

    def forward_cost(self) -> ForwardCost:
        """What a forward over several tokens costs, as far as the plan in force tells."""
        sizes, plan = self.residency.sizes, self.plan.residency
        known = () if plan is None else (self.planner.speeds, plan.slots, plan.hit_rates)
        return ForwardCost(sizes, *known)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nobody else generates meanwhile.

        Raises:
            BusyError: somebody does.
        """
        if not self._busy.acquire(blocking=False):
            raise BusyError("this model is already generating; finish or close that stream first, or load it twice")
        try:
            yield
        finally:
            self._busy.release()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """``exclusive``, with weights wired, and everything that was scheduled done at the end.

        A step scheduled ahead may still run when its reader has seen enough: a program that ended then would take MLX's
        threads down under it.
        """
        with self.exclusive(), wired(self.device, self.stream, self.plan.budget_bytes):
            mx.reset_peak_memory()
            try:
                yield
            finally:
                mx.synchronize(self.stream)

    @contextlib.contextmanager
    def computing(self) -> Iterator[DecodeContext]:
        """For other work than generating: ``running``, on the engine's stream, with the memory of kept prompts given back.

        The block must not be left by a ``yield``: whatever else ran in between would run on this stream.
        """
        context = self.context
        with self.guarded(), self.running(), mx.stream(self.stream):
            self.prompt_cache.free()
            yield context

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Around whatever waits for results; raises GroupError when another machine was lost."""
        with contextlib.nullcontext() if self.link is None else self.link.guarded():
            yield

    def follow(self) -> None:
        """As ``Mixtral.follow``."""
        if self.link is None or self.link.is_leader:
            raise InvalidRequestError("this is the first machine of its group: generate, and let the others follow")
        with self.running():
            Follower(self.context, self.link).run()

    def generate(self, request: Request) -> Steps[Token]:
        """Carry out a request: its tokens one by one, the model being busy from the first until they end or are closed.

        Keys and values of an earlier prompt that begins alike are used again, and these are kept for the next one unless an
        error ends the generation.

        Raises:
            ClosedError: the model was closed.
            BusyError: with the first token: another generation is running.
            CheckpointError: an expert cannot be read.
            ConstraintError: the request's constraint cannot be kept.
        """
        speculation, rope = request.speculation, self.config.rope
        longest = len(request.tokens) + request.max_tokens
        if rope.table_of(len(request.tokens)) != rope.table_of(longest):
            speculation = None  # every step has other rotary frequencies: several tokens cannot share a forward
        plain = decode if request.constraint is None else decode_constrained
        decoder = plain if speculation is None else speculation.decoder(self, request)
        steps = self.opened(generated(self, decoder, request))
        if speculation is not None:
            for other in speculation.engines:
                other.remember(steps)
        return steps

    def opened(self, generator: Generator[T, None, None]) -> Steps[T]:
        """What generates on this engine, ended when the engine is closed."""
        self.remember(steps := Steps(generator, self.guarded))
        return steps

    def remember(self, steps: Closable) -> None:
        """End ``steps`` when this engine is closed."""
        self._open.add(steps)

    def scheduler(
        self, max_rows: int | None = None, *, max_stall_s: float = DEFAULT_MAX_STALL_S, keeps_prompts: bool = True
    ) -> Scheduler:
        """For several requests at once, within the memory budget. Use it in a block of ``running`` only.

        Args:
            max_rows: generations at once; ``default_rows`` of the plan when None.
            max_stall_s: how long a chunk of a prompt may take while rows wait for it.
            keeps_prompts: rows go on from earlier prompts that begin alike, and leave theirs.

        Raises:
            InvalidRequestError: not a number of rows, or of seconds.
            ClosedError: the model was closed.
        """
        check_limits(max_rows, max_stall_s)
        return Scheduler(
            self.context,
            max_rows=default_rows(self.plan, self.forward_cost()) if max_rows is None else max_rows,
            max_columns=None if self.plan.budget_bytes is None else self.plan.kv_columns,
            max_stall_s=max_stall_s,
            prefixes=RowPrefixes(self.prompt_cache) if keeps_prompts else None,
        )

    def logits(self, tokens: Sequence[int]) -> mx.array:
        """Logits ``[L, V]`` (in the compute type, evaluated) for every position of ``tokens``.

        Raises:
            InvalidRequestError, ContextLengthError, BusyError: no tokens, too many, or a generation is running.
        """
        if not tokens:
            raise InvalidRequestError("token_ids is empty; give at least one token")
        own = self.config.max_context_tokens
        if len(tokens) > own:
            raise ContextLengthError(f"{len(tokens)} tokens were given; the model's context holds {own}")
        with self.computing() as context:
            return all_logits(context, tokens)

    def save_prompt(self, path: str | Path, tokens: Sequence[int]) -> None:
        """Compute a prompt and save its keys and values. Raises as ``PromptCache.save``, and BusyError."""
        self.room(len(tokens))
        with self.guarded(), self.exclusive(), mx.stream(self.stream):
            adapter = self.adapters.by_number(self.module.adapter)
            self.prompt_cache.save(path, tokens, self.context, adapter)

    def load_prompt(self, path: str | Path) -> list[int]:
        """Load a saved prompt and return its tokens. Raises as ``PromptCache.load``, and BusyError."""
        with self.guarded(), self.exclusive(), mx.stream(self.stream):
            return self.prompt_cache.load(path, self.module, self.adapters.of)

    def set_memory(self, memory: str | float | None, *, context: int | None = None) -> None:
        """Go over to another budget: banks of experts shrink or grow. Raises as ``Mixtral.set_memory``."""
        if self.link is not None:
            raise InvalidRequestError(
                "the memory budget of several machines is set when they load: start them again with --memory"
            )
        with self.changing():
            self.replan(self.planner.plan(memory, self.plan.context_tokens if context is None else context))

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """As ``AdaptedEngine`` of the adapters has it."""
        with self.exclusive(), mx.stream(self.stream):
            module = self.module
            try:
                yield
            finally:
                self._begin(module)

    def replan(self, plan: MemoryPlan) -> None:
        """As ``AdaptedEngine`` of the adapters has it."""
        try:
            self.residency.change(plan, self._allocate)
        finally:
            self.prompt_cache.fit(self.plan)

    def close(self) -> None:
        """Release the weights; nothing can be generated afterwards. Open streams end, after the step under way.

        Raises:
            BusyError: something else is computed on another thread.
        """
        with contextlib.nullcontext() if self.link is None else self.link.ending():
            for steps in list(self._open):
                steps.close()
            with self.exclusive():
                if self.link is not None:
                    self.link.end()
                self._module = self._step = None
                self.prompt_cache.clear()
                self.residency.close()
                self.residency.release()
                self._lease.close()
            mx.clear_cache()

    def _begin(self, module: MixtralModel) -> None:
        """Look at the banks there are now: the step's graph holds them, and layers that prefetch look at the next one's."""
        self.prefetch.connect(module.layers)
        self._step = DecodeStep(module, compiled=self.device.kind != "cpu")
