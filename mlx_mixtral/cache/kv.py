"""The key-value cache: preallocated, grown in steps, bounded by a window; rows of a batch may differ in length."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import mlx.core as mx

from mlx_mixtral.cache.mirror import Mirror
from mlx_mixtral.cache.options import STEP_TOKENS
from mlx_mixtral.cache.storage import KVStorage, LayerArrays, PlainStorage, grown
from mlx_mixtral.cache.views import PrefillView, RingPrefillView
from mlx_mixtral.cache.window import Window, causal_mask
from mlx_mixtral.errors import InvalidRequestError

__all__ = ["STEP_TOKENS", "KVCache"]


class KVCache:
    """Keys and values of all layers, in columns: a token a column, until a window is full (see ``Window``).

    Rows that enter as one chunk are aligned at their last token: a row of 3 tokens beside one of 5 has ``left_padding`` 2, so
    the cache holds ``_ _ a b c`` and ``d e f g h``. Positions count from a row's own first token (a has 0), and no token
    attends to the padding. ``length`` is 5 for both.

    Args:
        num_layers, kv_heads, head_dim, dtype: shape of the model.
        window: tokens in sight of each, None for all: a sliding window, or a bound on memory. Columns beyond it are used again.
        left_padding: padding tokens of each row; None when there are none. Its length is the batch size.
        max_tokens: room is made for no more than these (in whole steps) until more are held.
        storage: how keys and values are held; plain numbers of ``dtype`` when None.

    Example:
        >>> cache = model.make_cache()
        >>> logits = model.module(mx.array([[1, 415, 2936]]), cache)  # the cache holds 3 tokens now
    """

    def __init__(
        self,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: mx.Dtype = mx.float32,
        *,
        window: Window | int | None = None,
        left_padding: Sequence[int] | None = None,
        max_tokens: int | None = None,
        storage: KVStorage | None = None,
    ) -> None:
        if left_padding is not None and any(pad < 0 for pad in left_padding):
            raise InvalidRequestError(f"left_padding is {list(left_padding)}; padding cannot be negative")
        self.length = 0
        self.window = Window(window) if isinstance(window, int) else window
        if self.window is not None and self.window.sinks and left_padding is not None and any(left_padding):
            raise InvalidRequestError("rows of different lengths cannot have attention sinks; give them one by one")
        self.storage = storage or PlainStorage(kv_heads, head_dim, dtype)
        self.left_padding = list(left_padding) if left_padding is not None and any(left_padding) else None
        self.padding = None if self.left_padding is None else mx.array(self.left_padding, mx.int32)
        self.layers: list[LayerArrays] = []
        self._num_layers = num_layers
        self._max_tokens = max_tokens
        self._written = 0
        self._lengths: mx.array | None = None
        self.adapter: int | None = None
        """Number of the adapter that all rows are computed with; None for the model itself."""
        self.mirror: Mirror | None = None
        """Told of every change, where other machines hold their part of it."""

    @property
    def capacity(self) -> int:
        """Columns there is room for."""
        return self.layers[0][0].shape[2] if self.layers else 0

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 before the first token."""
        return self.layers[0][0].shape[0] if self.layers else 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated, the unused end of the last step included."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays held: what to evaluate before another thread goes on with this cache."""
        held = [array for layer in self.layers for array in layer]
        return held if self._lengths is None else [*held, self._lengths]

    @property
    def lengths(self) -> mx.array:
        """Columns taken in each row, ``[B]`` int32, for a step."""
        if self._lengths is None:
            self._lengths = mx.full((self.rows,), self.length, mx.int32)
        return self._lengths

    def mask(self, L: int) -> mx.array | str | None:
        """What ``L`` new tokens may attend to, as ``mx.fast.scaled_dot_product_attention`` takes it.

        None or ``"causal"`` wherever that says it all, so that no mask is built; else boolean ``[B, 1, L, T]``, over the
        ``T`` last columns: all of them, or those a window lets the first new token see.
        """
        total = self.length + L
        window = self.window if self.window is not None and total > self.window.size else None
        if self.padding is None:
            if window is None:
                return None if L == 1 else "causal"
            if L == 1 and not window.sinks:  # the columns from the first key on are those in sight
                return None
        keys, queries = mx.arange(self._first_key, total), mx.arange(self.length, total)[None]
        return causal_mask(keys, queries, self.padding, window)

    def chunk(
        self, rows: int, L: int, frequencies: mx.array | None = None, ends: tuple[int, ...] | None = None
    ) -> PrefillView | RingPrefillView:
        """Begin a forward of ``L`` tokens in each of ``rows`` rows; ``advance`` ends it.

        ``frequencies`` are rotary frequencies, where the base alone does not say them; ``ends`` says where rows end that
        are shorter than others. None may be written over then.
        """
        self.reserve(rows, L)
        if self.window is not None and max(self.length + L, self._written) > self.window.columns:
            ring = (self.storage, self.layers, self.window, self.length, L, self.padding, frequencies, self.adapter)
            return RingPrefillView(*ring)
        positions = self.length if self.padding is None else self.length - self.padding
        return PrefillView(
            self.storage,
            self.layers,
            self.length,
            L,
            positions,
            self._first_key,
            self.mask(L),
            frequencies,
            ends,
            self.adapter,
        )

    def reserve(self, rows: int, L: int) -> None:
        """Make room for ``L`` tokens more: a step at least, an eighth more than there was when that is larger."""
        tokens, kept = self.length + L, self.capacity
        if self.window is not None:
            tokens = min(tokens, self.window.columns)
        if tokens <= kept:
            return
        capacity = kept + kept // 8
        if self._max_tokens is not None:
            capacity = min(capacity, self._max_tokens)
        capacity = max(tokens, capacity)
        capacity = -(-capacity // STEP_TOKENS) * STEP_TOKENS
        if self.window is not None:
            capacity = min(capacity, self.window.columns)
        if not self.layers:
            self.layers = [self.storage.empty(rows, capacity) for _ in range(self._num_layers)]
            return
        for layer, held in enumerate(self.layers):
            self.layers[layer] = grown(held, self.storage.empty(rows, capacity - kept))

    def advance(self, L: int, lengths: mx.array | None = None) -> None:
        """Count ``L`` tokens as seen, after all layers were updated; ``lengths`` as a step left them."""
        self.length += L
        self._written = max(self._written, self.length)
        self._lengths = lengths

    @property
    def trimmable(self) -> int:
        """How many of the last tokens can be forgotten: all, while nothing was overwritten."""
        if self.window is None or self.is_whole:
            return self.length
        return max(0, self.window.slack - (self._written - self.length))

    def trim(self, tokens: int) -> None:
        """Forget the last ``tokens`` tokens.

        Raises:
            InvalidRequestError: fewer are held, or what came before them was overwritten.
        """
        if not 0 <= tokens <= self.length:
            raise InvalidRequestError(f"cannot forget {tokens} tokens of a cache that holds {self.length}")
        if tokens > self.trimmable:
            raise InvalidRequestError(
                f"cannot forget {tokens} tokens of a cache whose window is full; {self.trimmable} can be"
            )
        self.length -= tokens
        self._lengths = None
        if self.mirror is not None:
            self.mirror.did("trim", self, None, tokens)

    def fork(self, tokens: int) -> KVCache:
        """A cache of its own of the first ``tokens`` tokens, a copy; nothing was overwritten so far.

        Raises:
            InvalidRequestError: fewer are held, or some were overwritten.
        """
        if tokens > self.length or self.length - tokens > self.trimmable or not self.is_whole:
            raise InvalidRequestError(f"cannot copy the first {tokens} tokens of a cache that holds {self.length}")
        other = copy.copy(self)
        other.layers = [tuple(mx.contiguous(array[:, :, :tokens]) for array in layer) for layer in self.layers]
        other.length = other._written = tokens
        other._lengths = None
        mx.eval(other.arrays)
        if self.mirror is not None:
            self.mirror.made("fork", other, self, tokens)
        return other

    def take(self, rows: Sequence[int]) -> KVCache:
        """A cache of its own of these rows, in this order, copied; a row may be taken several times.

        Raises:
            InvalidRequestError: tokens were overwritten.
        """
        if not self.is_whole:
            raise InvalidRequestError("cannot copy rows of a cache whose window is full")
        other, places = copy.copy(self), mx.array(list(rows))
        other.layers = [tuple(array[places, :, : self.length] for array in layer) for layer in self.layers]
        if self.left_padding is not None:
            other.left_padding = [self.left_padding[row] for row in rows]
            other.padding = mx.array(other.left_padding, mx.int32)
        other._written, other._lengths = self.length, None
        if self.mirror is not None:
            self.mirror.made("take", other, self, *rows)
        return other

    def row(self, row: int, tokens: int) -> KVCache:
        """A cache of its own of the first ``tokens`` tokens of one row: a copy, which is lazy. There is no padding.

        Raises:
            InvalidRequestError: they are not the row's last ones, and some were overwritten.
        """
        assert self.padding is None
        if tokens != self.length and not self.is_whole:
            raise InvalidRequestError(f"cannot copy the first {tokens} tokens of a cache whose window is full")
        other, used = copy.copy(self), min(tokens, self.capacity)
        layers = [tuple(mx.contiguous(array[row : row + 1, :, :used]) for array in layer) for layer in self.layers]
        other.adopt(layers, tokens, written=max(self._written, tokens) if tokens == self.length else tokens)
        if self.mirror is not None:
            self.mirror.made("row", other, self, row, tokens)
        return other

    def adopt(self, layers: Sequence[LayerArrays], tokens: int, *, written: int | None = None) -> None:
        """Hold ``layers`` of ``tokens`` tokens, as ``fork`` left them; of ``written`` some were forgotten."""
        self.layers, self.length, self._lengths = list(layers), tokens, None
        self._written = tokens if written is None else written

    @property
    def written(self) -> int:
        """The most tokens there were before some were forgotten."""
        return self._written

    @property
    def parts(self) -> Sequence[KVCache]:
        """What a step computes: all rows at once."""
        return (self,)

    @property
    def orders(self) -> None:
        """Rows lie in their own order."""
        return

    @property
    def is_whole(self) -> bool:
        """Whether every token taken in is still there, none overwritten."""
        return self.window is None or self._written <= self.window.columns

    @property
    def _first_key(self) -> int:
        window = self.window
        return 0 if window is None or window.sinks else max(0, self.length + 1 - window.size)
