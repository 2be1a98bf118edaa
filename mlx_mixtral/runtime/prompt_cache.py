"""PromptCache that need not be computed again: caches kept between generations, or saved to a file and loaded."""

from __future__ import annotations

import errno
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

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
from mlx_mixtral.reading import open_descriptor, open_file, parse_json
from mlx_mixtral.runtime.shared_prompts import collect, layer_count, spread
from mlx_mixtral.weights.dtypes import MLX_DTYPES
from mlx_mixtral.weights.safetensors import TensorInfo, read_header, read_into

__all__ = ["DEFAULT_KEPT_BYTES", "PromptCache", "RowPrefixes", "check_saved", "is_saved_prompt"]

DEFAULT_KEPT_BYTES = 10**9
FORMAT, VERSION = "mlx-mixtral-prompt", "1"
OWN_SETTINGS = "the checkpoint's own settings"
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

    def take(self, tokens: Sequence[int], left: int = 1) -> KVCache | None:
        """A cache of the longest beginning of ``tokens`` that is kept; it belongs to the caller. None when there is none.

        ``left`` tokens at least are left to compute.
        """
        found = None
        if self.serves(tokens):
            found = self.kept.take(tokens, left)
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

    def clear(self) -> None:
        """Keep nothing of what there is."""
        self.kept.clear()

    def save(self, path: str | Path, tokens: Sequence[int], context: DecodeContext) -> None:
        """Write what ``tokens`` leave in a cache to a safetensors file; it appears whole or not at all.

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
        cache = self.take(tokens, module.min_prompt_tokens) or module.make_cache(max_tokens=len(tokens))
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
                mx.save_safetensors(file, arrays, self._about(cache))
            except (RuntimeError, ValueError) as error:
                # What MLX makes of a write that failed.
                full = shutil.disk_usage(tempfile.gettempdir() if is_special(place) else place.parent).free < nbytes
                raise OSError(errno.ENOSPC if full else errno.EIO, "a write failed") from error
        self.put(tokens, cache)

    def load(self, path: str | Path, module: MixtralModel) -> list[int]:
        """Keep a saved prompt, and return its tokens; a prompt that begins with them is computed from there on.

        Raises:
            PromptCacheError: not such a file, a damaged one, one of another version, model or kind of cache.
        """
        place = as_path("path", path)
        about, infos = _read_about(place)
        cache = module.make_cache()
        ours = self._about(cache)
        storage = ours.pop("storage")
        for key, expected in ours.items():
            _compare(place, key, about.get(key, "" if key == "settings" else None), expected)
        _compare_storage(place, about.get("storage", ""), storage, module)
        tokens = _read_tokens(place, infos, module)
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
            spread(module, cache, _read_layers(place, names), len(tokens))
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

    def reusable(self, tokens: Sequence[int], left: int) -> int:
        return self._prompts.kept.reusable(tokens, left) if self._prompts.serves(tokens) else 0

    def take(self, tokens: Sequence[int], left: int) -> KVCache | None:
        return self._prompts.kept.take(tokens, left) if self._prompts.serves(tokens) else None

    def put(self, tokens: Sequence[int], cache: KVCache) -> None:
        if len(tokens) >= MIN_TOKENS and self._prompts.serves(tokens):
            self._prompts.kept.put(tokens, cache)

    def shrink(self, nbytes: int) -> None:
        self._prompts.kept.shrink(nbytes)


_DIFFERENCES = {
    "format": "is not a saved prompt",
    "version": "is of version {found}; this program reads version {expected}: save the prompt again",
    "model": "was made with another model; save the prompt again with this one",
    "settings": "was made with {found}, but this model runs with {expected}; load it with the same experts_per_token and rope",
}


def check_saved(path: str | Path) -> None:
    """That ``path`` is a saved prompt, before a model is loaded for it.

    Raises:
        PromptCacheError: it is not, or of another version.
    """
    place = as_path("path", path)
    about, _ = _read_about(place)
    for key, expected in (("format", FORMAT), ("version", VERSION)):
        _compare(place, key, about.get(key), expected)


def is_saved_prompt(place: Path) -> bool:
    """Whether a file is a saved prompt, of whatever version and model."""
    try:
        return _read_about(place)[0].get("format") == FORMAT
    except PromptCacheError:
        return False


def _compare(place: Path, key: str, found: str | None, expected: str) -> None:
    if found != expected:
        said = {"found": found or OWN_SETTINGS, "expected": expected or OWN_SETTINGS}
        raise PromptCacheError(f"{place} {_DIFFERENCES[key].format_map(said)}")


def _compare_storage(place: Path, found: str, expected: str, module: MixtralModel) -> None:
    """Raise PromptCacheError unless both are the same ``KVStorage``; it says how to load the model for the first."""
    if found == expected:
        return
    bits, dtype = _bits_and_dtype(found)
    own_dtype = str(module.dtype).rpartition(".")[2]
    wanted = []
    if bits is not None and bits != module.kv.bits:
        wanted.append(f"kv_bits={bits} (--kv-bits {bits})")
    elif bits is None and (dtype, own_dtype) == ("float16", "float32"):
        wanted, dtype = ["kv_bits=16 (--kv-bits 16)"], None
    elif bits is None and module.kv.bits is not None:
        wanted.append("no kv_bits")
    if dtype not in (None, own_dtype):
        wanted.append(f"dtype={dtype!r} (--dtype {dtype})")
    fix = f"load the model with {' and '.join(wanted)}, or save the prompt again" if wanted else "save the prompt again"
    held = [_held(*_bits_and_dtype(text)) for text in (found, expected)]
    raise PromptCacheError(f"{place} was saved with {held[0]}, and this model has {held[1]}; {fix}")


def _bits_and_dtype(storage: str) -> tuple[int | None, str | None]:
    bits, dtype = re.search(r"\bbits=(\d{1,2})\b", storage), re.search(r"\bdtype=mlx\.core\.(\w{1,12})", storage)
    return int(bits[1]) if bits else None, dtype[1] if dtype else None


def _held(bits: int | None, dtype: str | None) -> str:
    if bits is not None:
        return f"a KV cache of {bits} bits (compute type {dtype})"
    return f"a KV cache in {dtype}" if dtype else "a KV cache of another kind"


def _read_about(place: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """The metadata of a safetensors file, and its tensors; sizes are checked before anything is used."""
    try:
        infos = read_header(place)
        with open_file(place) as file:
            (length,) = struct.unpack("<Q", file.read(8))
            metadata = parse_json(place, file.read(length)).get("__metadata__", {})
    except (CheckpointError, OSError, struct.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PromptCacheError(f"{place} is not a saved prompt: {reason.removeprefix(f'{place} ')}") from None
    return metadata if isinstance(metadata, dict) else {}, infos


def _read_tokens(place: Path, infos: Mapping[str, TensorInfo], module: MixtralModel) -> list[int]:
    """Raises PromptCacheError for tokens that no prompt of ``module`` has."""
    info, limit = infos.get("tokens"), module.config.max_position_embeddings
    count = info.shape[0] if info is not None and len(info.shape) == 1 and info.dtype == "I32" else 0
    if info is None or not 0 < count < limit:
        raise PromptCacheError(f"{place} holds {count} tokens, which no prompt of this model can have; save it again")
    raw = np.empty(count, "<i4")
    descriptor = open_descriptor(place, PromptCacheError)
    try:
        read_into(descriptor, memoryview(raw.view(np.uint8)), info.offset, str(place))  # type: ignore[arg-type]
    except CheckpointError as error:
        raise PromptCacheError(f"{error}; save the prompt again") from None
    finally:
        os.close(descriptor)
    if not ((raw >= 0) & (raw < module.config.vocab_size)).all():
        raise PromptCacheError(f"{place} holds tokens that this model does not have; save the prompt again")
    return [int(token) for token in raw]


def _read_layers(place: Path, names: Sequence[Sequence[str]]) -> list[tuple[mx.array, ...]]:
    """Keys and values as they were held. Raises PromptCacheError for what cannot be read, or is not finite."""
    try:
        arrays = mx.load(str(place), format="safetensors")
        mx.eval(arrays)
    except (RuntimeError, ValueError, OSError) as error:
        raise PromptCacheError(f"{place} cannot be read: {error}; save the prompt again") from None
    assert isinstance(arrays, dict)
    layers = [tuple(arrays[name] for name in own) for own in names]
    numbers = [array for held in layers for array in held if mx.issubdtype(array.dtype, mx.floating)]
    if not all(bool(mx.isfinite(array).all()) for array in numbers):
        raise PromptCacheError(f"{place} is damaged: it holds NaN or infinity; save the prompt again")
    return layers
