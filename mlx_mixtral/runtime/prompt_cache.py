"""PromptCache that need not be computed again: caches kept between generations, or saved to a file and loaded."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from mlx_mixtral.arguments import as_path
from mlx_mixtral.budget.plan import MemoryPlan
from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.cache.prefixes import MIN_TOKENS, PrefixStore
from mlx_mixtral.distributed.link import Link
from mlx_mixtral.errors import CheckpointError, InvalidRequestError, PromptCacheError
from mlx_mixtral.files import atomic_write, check_destination, check_kind, is_special
from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.prefill import last_hidden
from mlx_mixtral.model.transformer import MixtralModel
from mlx_mixtral.runtime.saved_prompt import (
    FORMAT,
    VERSION,
    PromptAdapter,
    about_adapter,
    adapter_number,
    compare,
    compare_storage,
    is_saved_prompt,
    read_about,
    read_layers,
    read_tokens,
)
from mlx_mixtral.runtime.shared_prompts import collect, layer_count, spread
from mlx_mixtral.weights.dtypes import MLX_DTYPES

__all__ = ["DEFAULT_KEPT_BYTES", "PromptCache", "RowPrefixes"]

DEFAULT_KEPT_BYTES = 10**9
_TYPES = {kind: name for name, kind in MLX_DTYPES.items()} | {mx.uint32: "U32"}


class PromptCache:
    """Caches of one model's prompts.

    Args:
        plan: the plan in force.
        limit_bytes: of what is kept. When None the plan decides: under a budget one sequence is kept, in the memory of the
            next one's cache.
        identity: tells the checkpoint from others; asked when a prompt is saved or loaded.
        settings: what the model computes otherwise than its checkpoint says.
        link: to machines whose parts of a cache may be larger than this one's; none of them keeps more than the limit.
        max_tokens: longest sequence whose keys serve another one; beyond it rope scaling turns them by the sequence's length.
            None for any.

    Raises:
        PromptCacheError: by ``save`` and ``load``, where ``identity`` raises CheckpointError.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        limit_bytes: int | None,
        identity: Callable[[], str],
        *,
        settings: str = "",
        link: Link | None = None,
        max_tokens: int | None = None,
    ) -> None:
        share = Fraction(1) if link is None else link.kept_share
        self._given = None if limit_bytes is None else int(share * limit_bytes)
        self._default = int(share * DEFAULT_KEPT_BYTES)
        self._identify, self._settings, self._max_tokens = identity, settings, max_tokens
        self.fit(plan)

    def fit(self, plan: MemoryPlan) -> None:
        """Keep nothing, and from now on what ``plan`` allows."""
        limit = plan.kv_bytes if plan.is_bound else self._default
        self.kept = PrefixStore(
            limit if self._given is None else self._given, has_memory=self._given is not None or not plan.is_bound
        )

    def take(self, tokens: Sequence[int], left: int = 1, adapter: int | None = None) -> KVCache | None:
        """A cache of the longest beginning of ``tokens`` that is kept; it belongs to the caller. None when there is none.

        ``left`` tokens at least are left to compute. It was computed with ``adapter``.
        """
        found = None
        if self.serves(tokens):
            found = self.kept.take(tokens, left, adapter)
        else:
            why = f"past {self._max_tokens} tokens rope scaling turns keys by the length of the whole text"
            self.kept.why_not = why if len(self.kept) else None
        self.free()
        return found

    def put(self, tokens: Sequence[int], cache: KVCache) -> None:
        """Keep ``cache``, which holds just ``tokens``; the caller must not use it any more."""
        if self.serves(tokens):
            self.free()
            self.kept.put(tokens, cache)

    def serves(self, tokens: Sequence[int]) -> bool:
        """Whether the keys of ``tokens`` are those that another sequence has which begins with them."""
        return self._max_tokens is None or len(tokens) <= self._max_tokens

    def free(self) -> None:
        """Give back what lies in the memory of the next generation's cache, which something else needs now."""
        if not self.kept.has_memory:
            self.kept.clear()

    def forget(self, adapter: int) -> None:
        """Keep nothing that was computed with an adapter."""
        self.kept.forget(adapter)

    def clear(self) -> None:
        """Keep nothing of what there is."""
        self.kept.clear()

    def save(
        self, path: str | Path, tokens: Sequence[int], context: DecodeContext, adapter: PromptAdapter | None = None
    ) -> None:
        """Write what ``tokens`` leave in a cache to a safetensors file; it appears whole or not at all.

        They are computed with ``adapter``, which the file names.

        Raises:
            InvalidRequestError: more tokens than a cache of bounded size holds.
            DestinationError, DiskSpaceError: it cannot be written, or something that is no saved prompt lies there.
        """
        place, module = check_destination("path", path), context.model
        if not self.serves(tokens):
            raise InvalidRequestError(
                f"a prompt of {len(tokens)} tokens cannot be saved: past {self._max_tokens} tokens this model's rope scaling "
                "depends on the length of the whole text; save at most that many"
            )
        check_kind(place, "a saved prompt", is_saved_prompt)
        window = module.kv.window(module.config)
        if window is not None and len(tokens) > window.columns:
            raise InvalidRequestError(
                f"a prompt of {len(tokens)} tokens does not fit a KV cache of {window.size}; load it with a larger kv_size"
            )
        number = None if adapter is None else adapter.number
        cache = self.take(tokens, module.min_prompt_tokens, number)
        cache = cache or module.make_cache(max_tokens=len(tokens), adapter=number)
        rest = mx.array([list(tokens[cache.length :])], mx.int32)
        mx.eval(last_hidden(module, rest, cache, context.chunk_tokens))
        arrays = {
            f"layers.{layer}.{index}": array
            for layer, held in enumerate(collect(module, cache.fork(len(tokens))))
            for index, array in enumerate(held)
        }
        arrays["tokens"] = mx.array(list(tokens), mx.int32)
        nbytes = sum(array.nbytes for array in arrays.values())
        with atomic_write(place) as file:
            try:
                mx.save_safetensors(file, arrays, self._about(cache) | about_adapter(adapter))
            except (RuntimeError, ValueError) as error:
                # What MLX makes of a write that failed.
                full = shutil.disk_usage(tempfile.gettempdir() if is_special(place) else place.parent).free < nbytes
                raise OSError(errno.ENOSPC if full else errno.EIO, "a write failed") from error
        self.put(tokens, cache)

    def load(
        self,
        path: str | Path,
        module: MixtralModel,
        adapter_of: Callable[[str], PromptAdapter | None] = lambda identity: None,
    ) -> list[int]:
        """Keep a saved prompt, and return its tokens; a prompt that begins with them is computed from there on.

        ``adapter_of`` gives the adapter of an identity, if there is one.

        Raises:
            PromptCacheError: not such a file, a damaged one, one of another version, model or kind of cache.
        """
        place = as_path("path", path)
        about, infos = read_about(place)
        adapter = adapter_number(place, about, adapter_of)
        cache = module.make_cache(adapter=adapter)
        ours = self._about(cache)
        storage = ours.pop("storage")
        for key, expected in ours.items():
            compare(place, key, about.get(key, "" if key == "settings" else None), expected)
        compare_storage(place, about.get("storage", ""), storage, module)
        tokens = read_tokens(place, infos, module)
        if not self.serves(tokens):
            raise PromptCacheError(
                f"{place} holds {len(tokens)} tokens, which no prompt of this model can have; save it again"
            )
        if cache.window is not None and len(tokens) > cache.window.columns:
            raise PromptCacheError(
                f"{place} holds {len(tokens)} tokens, more than this model's KV cache; give a larger kv_size"
            )
        # Before anything of that size is allocated.
        wanted = cache.storage.empty(1, len(tokens))
        names = [[f"layers.{layer}.{index}" for index in range(len(wanted))] for layer in range(layer_count(module))]
        described = [(array.shape, _TYPES.get(array.dtype)) for array in wanted]
        for layer, own in enumerate(names):
            if [(infos[name].shape, infos[name].dtype) for name in own if name in infos] != described:
                raise PromptCacheError(
                    f"{place}: layer {layer} is not what {len(tokens)} tokens produce; save the prompt again"
                )
        if len(infos) != 1 + sum(map(len, names)):
            raise PromptCacheError(f"{place} holds more than this model's layers; save the prompt again")
        nbytes = sum(info.nbytes for info in infos.values())
        if nbytes <= self.kept.limit_bytes:
            spread(module, cache, read_layers(place, names), len(tokens))
            self.put(tokens, cache)
        if not len(self.kept):
            raise PromptCacheError(
                f"{place} takes {nbytes} bytes, but only {self.kept.limit_bytes} may be kept; load the model with a larger "
                "prefix_cache"
            )
        return tokens

    @cached_property
    def _identity(self) -> str:
        try:
            return self._identify()
        except CheckpointError as error:
            raise PromptCacheError(
                f"the model's own files are needed to check which model the prompt belongs to: {error}"
            ) from None

    def _about(self, cache: KVCache) -> dict[str, str]:
        model = {"model": self._identity, "settings": self._settings}
        return {"format": FORMAT, "version": VERSION, **model, "storage": repr(cache.storage)}


class RowPrefixes:
    """What a batch takes of a ``PromptCache``, and leaves in it. Under a budget that is the memory of rows which do not run."""

    def __init__(self, prompts: PromptCache) -> None:
        self._prompts = prompts

    @property
    def is_borrowed(self) -> bool:
        return not self._prompts.kept.has_memory

    def reusable(self, tokens: Sequence[int], left: int, adapter: int | None) -> int:
        return self._prompts.kept.reusable(tokens, left, adapter) if self._prompts.serves(tokens) else 0

    def take(self, tokens: Sequence[int], left: int, adapter: int | None) -> KVCache | None:
        return self._prompts.kept.take(tokens, left, adapter) if self._prompts.serves(tokens) else None

    def put(self, tokens: Sequence[int], cache: KVCache) -> None:
        if len(tokens) >= MIN_TOKENS and self._prompts.serves(tokens):
            self._prompts.kept.put(tokens, cache)

    def shrink(self, nbytes: int) -> None:
        self._prompts.kept.shrink(nbytes)
