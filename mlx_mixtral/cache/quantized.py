"""Keys and values in 4 or 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_mixtral.cache.storage import Kernel, KVStorage, LayerArrays
from mlx_mixtral.cache.window import causal_mask
from mlx_mixtral.errors import InvalidRequestError

__all__ = ["PACKED_QUERIES", "QuantizedStorage"]

PACKED_QUERIES = 16
"""Up to so many tokens a row are computed from the packed numbers; for more, unpacking once pays."""


@dataclass(frozen=True)
class QuantizedStorage(KVStorage):
    """Keys and values in ``bits``, with a scale and a bias for every ``group_size`` numbers of one token and head.

    Held as ``(keys, scales, biases, values, scales, biases)``, each ``[B, KV, capacity, …]``. A token is packed when it comes
    and never again, so what is held does not depend on how a prompt was cut into chunks.

    A step multiplies with the packed numbers themselves. A chunk of a prompt has one layer's unpacked for as long as that
    layer's attention takes: less than the 16-bit cache of all layers that is not there.

    Args:
        dtype: the compute type; scales and biases are held in it, in float16 where it is float32.

    Raises:
        InvalidRequestError: a group size that does not divide ``head_dim``, or bits that MLX has no packing for.
    """

    kv_heads: int
    head_dim: int
    dtype: mx.Dtype
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 5, 6, 8) or self.group_size not in (32, 64, 128):
            raise InvalidRequestError(
                f"a KV cache of {self.bits} bits in groups of {self.group_size} is not possible; bits are 4 or 8, "
                "groups 32, 64 or 128"
            )
        if self.head_dim % self.group_size:
            raise InvalidRequestError(
                f"a KV cache in groups of {self.group_size} needs a head_dim they divide; this model's is {self.head_dim}"
            )

    @property
    def scale_dtype(self) -> mx.Dtype:
        return mx.float16 if self.dtype == mx.float32 else self.dtype

    def empty(self, rows: int, capacity: int) -> LayerArrays:
        shape = (rows, self.kv_heads, capacity)
        words, groups = self.head_dim * self.bits // 32, self.head_dim // self.group_size
        kinds = ((words, mx.uint32), (groups, self.scale_dtype), (groups, self.scale_dtype)) * 2
        return tuple(mx.zeros((*shape, width), kind) for width, kind in kinds)

    def pack(self, keys: mx.array, values: mx.array) -> LayerArrays:
        packed: list[mx.array] = []
        for array in (keys, values):
            packed += mx.quantize(array.astype(self.scale_dtype), group_size=self.group_size, bits=self.bits)
        return tuple(packed)

    def attend(
        self,
        held: LayerArrays,
        first: int,
        end: int,
        queries: mx.array,
        scale: float,
        mask: mx.array | str | None,
        attention: Kernel,
    ) -> mx.array:
        keys, values = self._columns(held[:3], first, end), self._columns(held[3:], first, end)
        if queries.shape[2] <= PACKED_QUERIES and not _is_cuda():
            return self._attend_packed(keys, values, queries, scale, mask)
        plain_keys, plain_values = (self._unpacked(part, queries.dtype) for part in (keys, values))
        return attention(queries, plain_keys, plain_values, scale, mask)

    @staticmethod
    def _columns(part: LayerArrays, first: int, end: int) -> LayerArrays:
        return tuple(array[:, :, first:end] for array in part)

    def _unpacked(self, part: LayerArrays, dtype: mx.Dtype) -> mx.array:
        weight, scales, biases = part
        scales, biases = scales.astype(dtype), biases.astype(dtype)
        return mx.dequantize(weight, scales, biases, group_size=self.group_size, bits=self.bits)

    def _attend_packed(
        self, keys: LayerArrays, values: LayerArrays, queries: mx.array, scale: float, mask: mx.array | str | None
    ) -> mx.array:
        B, H, L, d = queries.shape
        KV, T = self.kv_heads, keys[0].shape[2]
        # The queries that share a head's keys are rows of one product: [B, KV, H / KV * L, d].
        scores = self._times((queries * scale).reshape(B, KV, -1, d), keys, transpose=True)
        if mask is not None:
            allowed = _last_columns(L, T) if isinstance(mask, str) else mask
            scores = scores.reshape(B, KV, H // KV, L, T)
            scores = mx.where(allowed[:, :, None], scores, mx.finfo(scores.dtype).min).reshape(B, KV, -1, T)
        weights = mx.softmax(scores, axis=-1, precise=True)
        return self._times(weights, values, transpose=False).reshape(B, H, L, d)

    def _times(self, x: mx.array, part: LayerArrays, *, transpose: bool) -> mx.array:
        weight, scales, biases = part
        return mx.quantized_matmul(
            x, weight, scales, biases, transpose=transpose, group_size=self.group_size, bits=self.bits
        )


def _is_cuda() -> bool:
    """CUDA's quantised products take no columns of a larger array (MLX 0.32)."""
    return mx.cuda.is_available() and mx.default_device().type == mx.DeviceType.gpu


def _last_columns(L: int, T: int) -> mx.array:
    """What the tokens of the last ``L`` of ``T`` columns may see, ``[1, 1, L, T]``."""
    return causal_mask(mx.arange(T), mx.arange(T - L, T)[None], None, None)
