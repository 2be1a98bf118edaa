"""The adapters of a loaded model: added, used and removed while it runs."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlx_mixtral.adapters.adapter import Adapter
from mlx_mixtral.adapters.opening import open_adapter
from mlx_mixtral.adapters.source import AdapterSource
from mlx_mixtral.arguments import check_type, checked, shown
from mlx_mixtral.budget.plan import MemoryPlan
from mlx_mixtral.budget.planner import Planner
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.distributed.link import Link
from mlx_mixtral.errors import ClosedError, InvalidRequestError
from mlx_mixtral.experts.residency import Residency
from mlx_mixtral.machine.device import Device
from mlx_mixtral.model.adapting import Adapting
from mlx_mixtral.model.transformer import MixtralModel
from mlx_mixtral.runtime.prompt_cache import PromptCache

__all__ = ["IN_USE", "AdapterInfo", "AdapterSources", "Adapters", "LoadedAdapter", "open_all", "sources_of"]

AdapterSources = str | Path | AdapterSource | Sequence[str | Path | AdapterSource]
"""What ``load`` takes for ``adapter``."""


IN_USE = "in use"
"""In place of a name, which has no spaces: the adapter that is in use, if any."""


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter that is loaded.

    ``fingerprint`` is a sha256 over what it holds; ``scale`` what its changes were multiplied with beside its own; ``nbytes``
    what it takes in memory.
    """

    name: str
    kind: str
    scale: float
    nbytes: int
    fingerprint: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter under the number by which layers know it."""

    number: int
    info: AdapterInfo

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def identity(self) -> str:
        """Tells keys and values that were computed with it from others."""
        return f"{self.info.fingerprint} {self.info.scale!r}"


class AdaptedEngine(Protocol):
    """What the adapters of a model ask of its engine."""

    @property
    def config(self) -> MixtralConfig: ...

    @property
    def device(self) -> Device: ...

    @property
    def link(self) -> Link | None: ...

    @property
    def module(self) -> MixtralModel: ...

    @property
    def plan(self) -> MemoryPlan: ...

    @property
    def planner(self) -> Planner: ...

    @property
    def residency(self) -> Residency: ...

    @property
    def prompt_cache(self) -> PromptCache: ...

    def exclusive(self) -> contextlib.AbstractContextManager[None]: ...

    def changing(self) -> contextlib.AbstractContextManager[None]:
        """Nobody computes meanwhile, and what was compiled of the layers is compiled again after it."""
        ...

    def replan(self, plan: MemoryPlan) -> None:
        """Go over to another plan, within ``changing``."""
        ...


class Adapters:
    """The adapters of a model, by name: ``model.adapters``.

    An adapter changes what the model computes for the generations that ask for it; the weights stay as they are, wherever they
    lie, and so do the bits of generations without one. One that is in use is what generations have that name none.

    Example:
        >>> model = load("mixtral-4bit")
        >>> model.adapters.add("./lora-sql", name="sql")
        >>> model.generate("List all users:", adapter="sql").text
        >>> model.adapters.use("sql")  # from now on, for every generation that names none
        >>> model.adapters.use(None)
        >>> model.adapters.remove("sql")
    """

    def __init__(self, engine: AdaptedEngine, adapting: Adapting) -> None:
        # The engine holds this: an engine that is dropped goes at once.
        self._owner, self._adapting = weakref.ref(engine), adapting
        self._loaded: dict[str, LoadedAdapter] = {}
        self._in_use: str | None = None
        self._last = -1

    @property
    def _engine(self) -> AdaptedEngine:
        if (engine := self._owner()) is None:
            raise ClosedError("the model of these adapters was closed; load it again")
        return engine

    def __repr__(self) -> str:
        names = ", ".join(f"{name} (in use)" if name == self._in_use else name for name in self._loaded)
        return f"<Adapters: {names or 'none'}>"

    def __iter__(self) -> Iterator[str]:
        return iter([*self._loaded])

    def __len__(self) -> int:
        return len(self._loaded)

    def __contains__(self, name: object) -> bool:
        return name in self._loaded

    def __getitem__(self, name: str) -> AdapterInfo:
        return self.named(name).info

    @property
    def in_use(self) -> str | None:
        """The name of the one that generations have which name none; None where that is the model itself."""
        return self._in_use

    @property
    def nbytes(self) -> int:
        """Bytes of all of them in memory."""
        return sum(loaded.info.nbytes for loaded in self._loaded.values())

    @checked()
    def add(
        self,
        adapter: str | Path | AdapterSource,
        *,
        name: str | None = None,
        scale: float = 1.0,
        revision: str | None = None,
    ) -> str:
        """Load an adapter beside those there are, and return its name. It is not in use yet.

        Args:
            adapter: a folder, ``owner/name`` of the hub, or an ``AdapterSource``, which has the other arguments in it.
            name: the last part of the folder's or repository's name when None.
            scale: multiplies what it changes.
            revision: a branch, tag or commit of the repository.

        Raises:
            InvalidRequestError: a name that is taken, a scale that is no number, or what this model cannot run with.
            CheckpointError, ConfigError, HubError: it cannot be found or read, or is one of another model.
            MemoryBudgetError: the budget has no room for it; nothing has changed then.
            BusyError: a generation is running.
        """
        source = adapter if isinstance(adapter, AdapterSource) else AdapterSource(adapter, name, scale, revision)
        if self._engine.link is not None:
            raise InvalidRequestError(
                "the adapters of several machines are given when they load: start them again with --adapter"
            )
        with self._engine.changing():
            return self._add(source)

    @checked()
    def use(self, name: str | None) -> None:
        """Let generations that name none have this one; None: the model itself.

        Raises:
            InvalidRequestError: there is none of this name.
            BusyError: a generation is running.
        """
        check_type("name", name, (str, type(None)), "the name of an adapter, or None")
        number = None if name is None else self.named(name).number
        with self._engine.exclusive():
            self._engine.module.adapter, self._in_use = number, name

    @checked()
    def remove(self, name: str) -> None:
        """Forget an adapter, and give its memory back.

        Raises:
            InvalidRequestError: there is none of this name.
            BusyError: a generation is running.
        """
        loaded = self.named(name)
        if self._engine.link is not None:
            raise InvalidRequestError("an adapter of several machines cannot be removed; use(None) leaves it out")
        with self._engine.changing():
            if self._in_use == name:
                self._engine.module.adapter = self._in_use = None
            self._adapting.take_off(self._engine.module, loaded.number)
            del self._loaded[name]
            self._engine.prompt_cache.forget(loaded.number)
            self._reserve(self.nbytes)

    def named(self, name: str) -> LoadedAdapter:
        """The adapter of a name.

        Raises:
            InvalidRequestError: there is none; those there are are named.
        """
        if (found := self._loaded.get(name)) is None:
            there = ", ".join(self._loaded) or "none is loaded"
            raise InvalidRequestError(f"there is no adapter {shown(name)}; there are: {there}")
        return found

    def of(self, identity: str) -> LoadedAdapter | None:
        """The adapter of an identity, if it is loaded."""
        return next((loaded for loaded in self._loaded.values() if loaded.identity == identity), None)

    def by_number(self, number: int | None) -> LoadedAdapter | None:
        """The adapter of a number; None for the model itself.

        Raises:
            InvalidRequestError: it was removed.
        """
        if number is None:
            return None
        found = next((loaded for loaded in self._loaded.values() if loaded.number == number), None)
        if found is None:
            raise InvalidRequestError("the adapter of this generation was removed before it began")
        return found

    def number_of(self, name: str | None) -> int | None:
        """The number of an adapter; None for the model itself, and "in use" for the one in use. Raises as ``named``."""
        if name == IN_USE:
            return self._engine.module.adapter
        return None if name is None else self.named(name).number

    def put_on(self, sources: Sequence[AdapterSource], opened: Sequence[Adapter]) -> None:
        """Load adapters that were opened, whose memory is planned for; nothing is computed yet."""
        for source, adapter in zip(sources, opened, strict=True):
            self._put_on(source.label, adapter)

    def _add(self, source: AdapterSource) -> str:
        name = source.label
        self._check_name(name)
        with contextlib.closing(
            open_adapter(source.path, self._engine.config, scale=source.scale, revision=source.revision, name=name)
        ) as own:
            self._adapting.check(own, on_cpu=self._engine.device.kind == "cpu")
            before = self.nbytes
            self._reserve(before + self._adapting.nbytes(own))
            try:
                self._put_on(name, own)
            except BaseException:
                self._reserve(before)
                raise
        return name

    def _put_on(self, name: str, adapter: Adapter) -> None:
        self._check_name(name)
        nbytes = self._adapting.nbytes(adapter)
        self._last += 1
        self._adapting.put_on(self._engine.module, self._last, adapter)
        info = AdapterInfo(name, adapter.kind, adapter.scale, nbytes, adapter.fingerprint, adapter.notes)
        self._loaded[name] = LoadedAdapter(self._last, info)

    def _reserve(self, nbytes: int) -> None:
        """Plan for so many bytes of adapters in all; after an error for as many as before."""
        engine, planner = self._engine, self._engine.planner
        before, planner.adapter_bytes = planner.adapter_bytes, nbytes
        try:
            plan = planner.again(engine.plan)
            if plan.is_bound:
                engine.replan(plan)
            else:
                # Nothing moves, and kept prompts stay.
                engine.residency.plan = plan
        except BaseException:
            planner.adapter_bytes = before
            raise

    def _check_name(self, name: str) -> None:
        if name in self._loaded:
            raise InvalidRequestError(f"an adapter {shown(name)} is loaded already; give this one another name")


def sources_of(adapter: AdapterSources | None) -> list[AdapterSource]:
    """What ``load`` was given, as a list.

    Raises:
        InvalidRequestError: something else, or two of one name.
    """
    if adapter is None:
        return []
    given = [adapter] if isinstance(adapter, str | Path | AdapterSource) else adapter
    if not isinstance(given, list | tuple):
        raise InvalidRequestError(
            f"adapter is {shown(adapter)}; give a folder, a repository, an AdapterSource, or a list of them"
        )
    sources = [each if isinstance(each, AdapterSource) else AdapterSource(each) for each in given]
    labels = [source.label for source in sources]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise InvalidRequestError(f"two adapters have the name {twice!r}; give one of them another: NAME=PATH")
    return sources


def open_all(sources: Sequence[AdapterSource], config: MixtralConfig, held: contextlib.ExitStack) -> list[Adapter]:
    """Adapters that were opened; ``held`` closes them. Raises as ``open_adapter``."""
    return [
        held.enter_context(
            contextlib.closing(
                open_adapter(source.path, config, scale=source.scale, revision=source.revision, name=source.label)
            )
        )
        for source in sources
    ]
