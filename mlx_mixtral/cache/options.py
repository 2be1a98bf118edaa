"""How a model's keys and values are kept: in how many bits, and how many of them."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_mixtral.arguments import check_integer
from mlx_mixtral.cache.quantized import QuantizedStorage
from mlx_mixtral.cache.storage import KVStorage, PlainStorage
from mlx_mixtral.cache.window import Window
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import InvalidRequestError

__all__ = ["DEFAULT_SINKS", "KVOptions"]

DEFAULT_SINKS = 4
STEP_TOKENS = 256
"""Columns are allocated in steps of so many."""


@dataclass(frozen=True)
class KVOptions:
    """Bits and bounds of the key-value cache.

    Args:
        bits: 4 or 8 with a scale and a bias a group, 16 for half precision; None for the compute type.
        size: most tokens in sight of each, the last ones and ``sinks``; None for all, or for the model's own sliding window.
        sinks: tokens at the start of a sequence that stay in sight.

    Raises:
        InvalidRequestError: a number that is none of these, or a size not larger than the sinks.
    """

    bits: int | None = None
    size: int | None = None
    sinks: int = DEFAULT_SINKS

    def __post_init__(self) -> None:
        if self.bits not in (None, 4, 8, 16):
            raise InvalidRequestError(f"kv_bits is {self.bits!r}; a KV cache has 4, 8 or 16 bits")
        for name, value, minimum in (("kv_size", self.size, 1), ("kv_sinks", self.sinks, 0)):
            if value is None and name == "kv_size":
                continue
            check_integer(name, value, minimum, wanted=f"a number of tokens, at least {minimum}")
        if self.size is not None and self.size <= self.sinks:
            raise InvalidRequestError(
                f"kv_size is {self.size} and kv_sinks {self.sinks}; the cache has to hold more tokens than its sinks: "
                "give a larger size or fewer sinks"
            )

    def storage(self, config: MixtralConfig, dtype: mx.Dtype) -> KVStorage:
        """How one layer's are held, for a model that computes in ``dtype``.

        Raises:
            InvalidRequestError: the model's heads cannot be quantised.
        """
        heads, width = config.num_key_value_heads, config.head_dim
        if self.bits in (None, 16):
            kind = mx.float16 if self.bits == 16 and dtype == mx.float32 else dtype
            return PlainStorage(heads, width, kind)
        assert self.bits is not None
        return QuantizedStorage(heads, width, dtype, self.bits, _group_size(width, self.bits))

    def window(self, config: MixtralConfig) -> Window | None:
        """What is in sight of a token; None when all is."""
        own = config.sliding_window
        if self.size is None or (own is not None and own <= self.size):
            return None if own is None else Window(own)
        return Window(self.size, self.sinks)

    def columns(self, config: MixtralConfig, tokens: int) -> int:
        """Columns allocated for ``tokens`` tokens at most."""
        whole, window = -(-tokens // STEP_TOKENS) * STEP_TOKENS, self.window(config)
        return whole if window is None else min(whole, window.columns)

    def bytes_per_token(self, config: MixtralConfig, item_bytes: int) -> int:
        """Bytes of one column in all layers, the compute type having ``item_bytes``."""
        if self.bits in (None, 16):
            return config.kv_bytes_per_token(item_bytes if self.bits is None else 2)
        assert self.bits is not None
        numbers = config.kv_bytes_per_token(1)
        return numbers * self.bits // 8 + numbers // _group_size(config.head_dim, self.bits) * 4

    def unpacked_bytes(self, config: MixtralConfig, item_bytes: int, columns: int) -> int:
        """What attention to one layer's ``columns`` needs for a while, where they are not held as they are computed with."""
        if self.bits is None or (self.bits == 16 and item_bytes == 2):
            return 0
        return columns * config.kv_bytes_per_token(item_bytes) // config.num_hidden_layers


def _group_size(head_dim: int, bits: int) -> int:
    for size in (64, 32):
        if head_dim % size == 0:
            return size
    raise InvalidRequestError(
        f"a KV cache of {bits} bits needs a head_dim that 32 divides; this model's is {head_dim}: leave kv_bits out"
    )
