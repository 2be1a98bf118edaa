"""Saved prompts as files: what they say of themselves, and whether they are a model's."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_mixtral.arguments import as_path
from mlx_mixtral.errors import CheckpointError, PromptCacheError
from mlx_mixtral.model.transformer import MixtralModel
from mlx_mixtral.reading import open_descriptor, open_file, parse_json
from mlx_mixtral.weights.safetensors import TensorInfo, read_header, read_into

__all__ = [
    "FORMAT",
    "VERSION",
    "PromptAdapter",
    "about_adapter",
    "adapter_number",
    "check_saved",
    "compare",
    "compare_storage",
    "is_saved_prompt",
    "read_about",
    "read_layers",
    "read_tokens",
]

FORMAT, VERSION = "mlx-mixtral-prompt", "1"
OWN_SETTINGS = "the checkpoint's own settings"


class PromptAdapter(Protocol):
    """The adapter that a prompt is computed with."""

    @property
    def number(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str:
        """Tells it from others, its scale included."""
        ...


_DIFFERENCES = {
    "format": "is not a saved prompt",
    "version": "is of version {found}; this program reads version {expected}: save the prompt again",
    "model": "was made with another model; save the prompt again with this one",
    "settings": "was made with {found}, but this model runs with {expected}; load it with the same experts_per_token and rope",
}


def check_saved(path: str | Path, *, has_adapter: bool | None = None) -> None:
    """That ``path`` is a saved prompt, before a model is loaded for it.

    Args:
        has_adapter: whether it is to be continued with an adapter; None: not known yet.

    Raises:
        PromptCacheError: it is not, or of another version, or was computed with an adapter and is to be continued without
            one, or the other way round.
    """
    place = as_path("path", path)
    about, _ = read_about(place)
    for key, expected in (("format", FORMAT), ("version", VERSION)):
        compare(place, key, about.get(key), expected)
    if has_adapter is False and "adapter" in about:
        raise _needs_adapter(place, about)
    if has_adapter and "adapter" not in about:
        raise PromptCacheError(
            f"{place} was made without an adapter; continue it without --adapter, or save the prompt again with it"
        )


def is_saved_prompt(place: Path) -> bool:
    """Whether a file is a saved prompt, of whatever version and model."""
    try:
        return read_about(place)[0].get("format") == FORMAT
    except PromptCacheError:
        return False


def about_adapter(adapter: PromptAdapter | None) -> dict[str, str]:
    return {} if adapter is None else {"adapter": adapter.identity, "adapter_name": adapter.name}


def adapter_number(
    place: Path, about: Mapping[str, str], adapter_of: Callable[[str], PromptAdapter | None]
) -> int | None:
    """The number of the adapter that a saved prompt was computed with. Raises PromptCacheError where it is not loaded."""
    if (identity := about.get("adapter")) is None:
        return None
    if (found := adapter_of(identity)) is None:
        raise _needs_adapter(place, about)
    return found.number


def _needs_adapter(place: Path, about: Mapping[str, str]) -> PromptCacheError:
    name, scale = about.get("adapter_name", "")[:64], about["adapter"].rpartition(" ")[2][:12]
    return PromptCacheError(
        f"{place} was made with the adapter {name} at scale {scale}, which is not loaded; load the model with it "
        f"(--adapter PATH={scale}), or save the prompt again"
    )


def compare(place: Path, key: str, found: str | None, expected: str) -> None:
    if found != expected:
        said = {"found": found or OWN_SETTINGS, "expected": expected or OWN_SETTINGS}
        raise PromptCacheError(f"{place} {_DIFFERENCES[key].format_map(said)}")


def compare_storage(place: Path, found: str, expected: str, module: MixtralModel) -> None:
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


def read_about(place: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
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


def read_tokens(place: Path, infos: Mapping[str, TensorInfo], module: MixtralModel) -> list[int]:
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


def read_layers(place: Path, names: Sequence[Sequence[str]]) -> list[tuple[mx.array, ...]]:
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
