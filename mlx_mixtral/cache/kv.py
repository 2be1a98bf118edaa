"""The plain key-value cache: preallocated, grown in steps, with left padding so that rows of a batch may differ in length."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_mixtral.errors import InvalidRequestError

__all__ = ["KVCache"]

STEP_TOKENS = 256


class KVCache:
    """Keys and values of all layers, ``[B, KV, capacity, d]`` each.

    Rows of a batch are aligned at their last token: a row of 3 tokens beside one of 5 has ``left_padding`` 2, so the cache
    holds ``_ _ a b c`` and ``d e f g h``. Its positions count from its own first token (a has 0), and no token attends to
    the padding. ``length`` is 5 for both. A sliding window of 4 would let h attend to e..h and hand attention just those.

    Args:
        num_layers, kv_heads, head_dim: shape of the model.
        window: sliding window in tokens, None for full attention.
        left_padding: padding tokens of each row; None when there are none. Its length is the batch size.
        most_tokens: room is made for no more than these (in whole steps) until more are held.
    """

    def __init__(
        self,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        window: int | None = None,
        left_padding: Sequence[int] | None = None,
        most_tokens: int | None = None,
    ) -> None:
        if left_padding is not None and any(pad < 0 for pad in left_padding):
            raise InvalidRequestError(f"left_padding is {list(left_padding)}; padding cannot be negative")
        self.length = 0
        self.window = window
        self.left_padding = list(left_padding) if left_padding is not None and any(left_padding) else None
        self._padding = None if self.left_padding is None else mx.array(self.left_padding, mx.int32)
        self._kv_heads, self._head_dim = kv_heads, head_dim
        self._most_tokens = most_tokens
        self._keys: list[mx.array | None] = [None] * num_layers
        self._values: list[mx.array | None] = [None] * num_layers

    @property
    def positions(self) -> int | mx.array:
        """Position of the next token: one number, or one a row ``[B]`` when rows are padded."""
        return self.length if self._padding is None else self.length - self._padding

    @property
    def nbytes(self) -> int:
        """Bytes allocated, the unused end of the last step included."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays held: what to evaluate before another thread goes on with this cache."""
        return [array for array in (*self._keys, *self._values) if array is not None]

    def mask(self, L: int) -> mx.array | str | None:
        """What ``L`` new tokens may attend to, as ``mx.fast.scaled_dot_product_attention`` takes it.

        None or ``"causal"`` wherever that says it all, so that no mask is built; else boolean ``[L, T]``, or
        ``[B, 1, L, T]`` with padding, over the ``T`` keys that ``update`` returns.
        """
        total = self.length + L
        window = self.window if self.window is not None and total > self.window else None
        if self._padding is None and (L == 1 or window is None):
            return None if L == 1 else "causal"
        keys = mx.arange(self._first_key(L), total)
        queries = mx.arange(self.length, total)[:, None]
        allowed = keys <= queries
        if window is not None:
            allowed = allowed & (keys > queries - window)
        if self._padding is None:
            return allowed
        real = keys >= self._padding[:, None, None, None]
        # A padding token attends to itself: a row of a softmax without any key would be NaN, and spread.
        return (allowed & real) | (keys == queries)

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add ``[B, KV, L, d]`` of new tokens; returns all keys and values they may attend to, ``[B, KV, T, d]``.

        Every layer is updated once a forward; ``advance`` then moves on.
        """
        L = keys.shape[2]
        end = self.length + L
        held_keys, held_values = self._keys[layer], self._values[layer]
        if held_keys is None or held_values is None or end > held_keys.shape[2]:
            held_keys = self._grown(held_keys, keys, end)
            held_values = self._grown(held_values, values, end)
        # Slices are written in place: nothing else holds these arrays once the names below let go of them.
        held_keys[..., self.length : end, :] = keys
        held_values[..., self.length : end, :] = values
        self._keys[layer], self._values[layer] = held_keys, held_values
        first = self._first_key(L)
        return held_keys[..., first:end, :], held_values[..., first:end, :]

    def advance(self, L: int) -> None:
        """Count ``L`` tokens as seen, after all layers were updated."""
        self.length += L

    def trim(self, tokens: int) -> None:
        """Forget the last ``tokens`` tokens.

        Raises:
            InvalidRequestError: fewer are held.
        """
        if not 0 <= tokens <= self.length:
            raise InvalidRequestError(f"cannot forget {tokens} tokens of a cache that holds {self.length}")
        self.length -= tokens

    def _first_key(self, L: int) -> int:
        return 0 if self.window is None else max(0, self.length + 1 - self.window)

    def _grown(self, held: mx.array | None, new: mx.array, tokens: int) -> mx.array:
        """``held`` with room for ``tokens``: a step at least, an eighth more than there was when that is larger."""
        kept = 0 if held is None else held.shape[2]
        capacity = kept + kept // 8
        if self._most_tokens is not None:
            capacity = min(capacity, self._most_tokens)
        capacity = max(tokens, capacity)
        capacity = -(-capacity // STEP_TOKENS) * STEP_TOKENS
        B = new.shape[0]
        room = mx.zeros((B, self._kv_heads, capacity - kept, self._head_dim), new.dtype)
        return room if held is None else mx.concatenate([held, room], axis=2)
