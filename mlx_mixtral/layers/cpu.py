"""Products, attention and SwiGLU on MLX's CPU backend with all of the processor.

MLX computes a stream on one core, its quantised kernels for x86 are scalar, and its wheel for Linux carries the reference
BLAS. So for prompts and other long calls a matrix is unpacked, a block of its rows at a time, and multiplied by numpy's BLAS
(OpenBLAS, or Accelerate on macOS); in a decode step its rows are cut over several streams and MLX multiplies each part.

Which way a call goes depends on its shape alone, never on how many rows an expert gets of it or how much of the model is in
memory. A prompt is never multiplied in one way where it comes in one chunk and in another where it comes in several: as far as
BLAS gives a row of a product the same bits whatever stands beside it, chunks do not change them either.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from math import prod

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.layers.blas import BLOCK, FloatMatrix, Floats, matrix_of, product, write_product
from mlx_mixtral.layers.linear import MLX, Changes, Products, Weights
from mlx_mixtral.machine.device import Device
from mlx_mixtral.machine.processor import blas_name, one_blas_thread, shares_blas, thread_count
from mlx_mixtral.weights.dtypes import bytes_of

__all__ = ["CpuProducts", "products_for"]

# numpy's BLAS has other kernels, with another rounding, for matrices with next to no rows, such as a router. Those and the
# smallest of all matrices are left to MLX.
BLAS_OUT, BLAS_WEIGHTS = 32, 2**14
# Few rows are cut over streams from so many multiplications on, attention of a step too: joining costs 0.1 ms.
CUT_WORK, CUT_ATTENTION = 2**19, 2**20
# Columns of attention that are multiplied at once. Sums over them do not depend on how many are out of sight behind.
COLUMNS = 256
# Numbers of a piece that stays in a core's cache.
PIECE = 2**16
# The most numbers of scores a thread holds.
SCORES = 2**18

LOWEST = np.finfo(np.float32).min


def products_for(device: Device) -> Products:
    """Who multiplies on a device."""
    return CpuProducts(thread_count()) if device.kind == "cpu" else MLX


class CpuProducts(Products):
    """Products on ``threads`` cores.

    BLAS computes at once, on numpy views of MLX's memory: what it is given is evaluated on the thread that calls.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        # Where BLAS cannot be kept to the thread that calls it, it is given one product at a time.
        self._tasks = threads if shares_blas() else 1

    @property
    def description(self) -> str:
        count = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"prompts by numpy's BLAS ({blas_name()}) and tokens by MLX's kernels, on {count}"

    def buffer_bytes(self, largest: int) -> int:
        # Half as much again while codes become numbers.
        return self._tasks * 4 * (min(BLOCK, largest) * 3 // 2 + SCORES)

    @property
    def min_prompt_tokens(self) -> int:
        return 2

    def linear(self, x: mx.array, weights: Weights) -> mx.array:
        out, columns = _shape(weights, x)
        rows = prod(x.shape[:-1])
        if not _is_long(x.shape) or not _fits_blas(out, columns):
            return self._cut(weights, rows * out * columns, lambda part: MLX.linear(x, part))
        result, y = _allocated((*x.shape[:-1], out))
        self._multiply([(_floats(x).reshape(rows, columns), matrix_of(weights), y.reshape(rows, out))])
        return result.astype(x.dtype)

    def gathered(self, x: mx.array, weights: Weights, slots: mx.array, *, is_sorted: bool) -> mx.array:
        out, columns = _shape(weights, x)
        if not is_sorted or not _fits_blas(out, columns):
            work = slots.size * out * columns
            return self._cut(weights, work, lambda part: MLX.gathered(x, part, slots, is_sorted=is_sorted))
        result, y = _allocated((len(x), 1, out))
        rows, given = _floats(x)[:, 0], np.asarray(slots)
        starts = np.flatnonzero(np.diff(given, prepend=-1))
        runs = pairwise([*starts.tolist(), len(given)])
        self._multiply([(rows[a:b], matrix_of(weights, int(given[a])), y[a:b, 0]) for a, b in runs])
        return result.astype(x.dtype)

    def sorts(self, shape: tuple[int, ...], num_experts: int) -> bool:
        return _is_long(shape)

    def low_rank(self, x: mx.array, y: mx.array, a: Weights, b: Weights) -> mx.array:
        return y + self.linear(self.linear(x, a), b)

    def weighted_sum(
        self, residual: mx.array, weights: mx.array, y: mx.array, change: mx.array | None = None
    ) -> mx.array:
        return super().weighted_sum(residual, weights, y if change is None else y + change)

    def swiglu(self, gate: mx.array, up: mx.array, *, is_long: bool, changes: Changes = (None, None)) -> mx.array:
        of_gate, of_up = changes
        gate, up = gate if of_gate is None else gate + of_gate, up if of_up is None else up + of_up
        if not is_long:
            return super().swiglu(gate, up, is_long=False)
        result, y = _allocated(gate.shape)
        g, u = _floats(gate), _floats(up)
        step = max(1, PIECE * len(g) // g.size)
        pieces = [slice(start, start + step) for start in range(0, len(g), step)]
        self._share([partial(_swiglu, g[at], u[at], y[at]) for at in pieces])
        return result.astype(gate.dtype)

    def attention(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
    ) -> mx.array:
        B, H, L, _ = queries.shape
        KV, T = keys.shape[1:3]
        if not _is_long((B, L, H)):
            return self._step_attention(queries, keys, values, scale, mask)
        assert isinstance(mask, mx.array) or mask in (None, "causal"), mask
        result, y = _allocated(queries.shape)
        q, k, v = _floats(queries * scale), _floats(keys), _floats(values)
        seen = np.broadcast_to(np.asarray(mask), (B, 1, L, T)) if isinstance(mask, mx.array) else None
        # The queries that share a head's keys are rows of one product: H / KV for each of `step` tokens.
        group = H // KV
        step = min(L, max(1, SCORES // (T * group)))

        def run(row: int, head: int, first: int) -> None:
            end, heads = min(first + step, L), slice(head * group, (head + 1) * group)
            # Of a causal block's columns the last ones are out of every token's sight.
            columns = T - L + end if mask == "causal" else T
            hidden = None if seen is None else ~seen[row, :, first:end]
            if mask == "causal":
                hidden = np.arange(columns) > np.arange(T - L + first, columns)[None, :, None]
            y[row, heads, first:end] = _attention(q[row, heads, first:end], k[row, head], v[row, head], columns, hidden)

        blocks = itertools.product(range(B), range(KV), range(0, L, step))
        self._share([partial(run, *block) for block in blocks])
        return result.astype(queries.dtype)

    def _step_attention(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
    ) -> mx.array:
        """Heads shared out over streams as rows of matrices are."""
        _, H, _, d = queries.shape
        KV, T = keys.shape[1:3]
        if self.threads == 1 or 2 * len(queries) * H * T * d < CUT_ATTENTION:
            return MLX.attention(queries, keys, values, scale, mask)
        bounds = [KV * index // self.threads for index in range(self.threads + 1)]
        group = H // KV

        def attend(first: int, end: int) -> mx.array:
            heads = slice(first, end)
            own = queries[:, first * group : end * group]
            return MLX.attention(own, keys[:, heads], values[:, heads], scale, mask)

        return self._joined([partial(attend, *pair) for pair in pairwise(bounds) if pair[0] < pair[1]], axis=1)

    def _share(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Do ``tasks`` on all threads, each as soon as one has time."""
        left = iter(tasks)
        lock = threading.Lock()

        def run() -> None:
            while True:
                with lock:
                    task = next(left, None)
                if task is None:
                    return
                task()

        with one_blas_thread():
            others = [_pool(self._tasks).submit(run) for _ in range(min(self._tasks, len(tasks)) - 1)]
            try:
                run()
            finally:
                for other in others:
                    other.result()

    def _cut(self, weights: Weights, work: int, multiply: Callable[[Weights], mx.array]) -> mx.array:
        """The rows of a matrix shared out over streams: each is a product of its own, so the bits are those of one stream."""
        if self.threads == 1 or work < CUT_WORK:
            return multiply(weights)
        return self._joined([partial(multiply, piece) for piece in weights.rows_in(self.threads)], axis=-1)

    def _joined(self, parts: Sequence[Callable[[], mx.array]], axis: int) -> mx.array:
        """The first part on the caller's stream, each of the others on one of its own."""
        done = [parts[0]()]
        for stream, part in zip(_streams(self.threads), parts[1:], strict=False):
            with mx.stream(stream):
                done.append(part())
        return mx.concatenate(done, axis=axis)

    def _multiply(self, products: Sequence[tuple[Floats, FloatMatrix, Floats]]) -> None:
        """``y = x W^T`` of each ``(x, W, y)`` by BLAS, a block of unpacked rows of a matrix at a time."""
        tasks: list[Callable[[], None]] = []
        for x, matrix, y in products:
            out, columns = y.shape[1], x.shape[1]
            arranged, step = matrix.arranged(x), max(1, BLOCK // columns)
            for start in range(0, out, step):
                rows = slice(start, min(start + step, out))
                tasks.append(partial(write_product, arranged, matrix, rows, y[:, rows]))
        self._share(tasks)


def _swiglu(gate: Floats, up: Floats, out: Floats) -> None:
    np.negative(gate, out=out)
    # A gate far below zero gives infinity here, and 0 in the end.
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += 1
    np.divide(gate, out, out=out)
    out *= up


def _attention(
    queries: Floats, keys: Floats, values: Floats, columns: int, hidden: npt.NDArray[np.bool_] | None
) -> Floats:
    """``queries [h, L, d]`` over the first ``columns`` of ``[T, d]``; ``hidden [1, L, columns]`` is what is out of sight."""
    q = queries.reshape(-1, queries.shape[-1])
    blocks = [slice(start, start + COLUMNS) for start in range(0, columns, COLUMNS)]
    last_keys, last_values = (_padded(array[blocks[-1]]) for array in (keys, values))
    scores = np.empty((len(q), blocks[-1].stop), np.float32)
    for block in blocks:
        product(q, (last_keys if block is blocks[-1] else keys[block]).T, scores[:, block])
    scores[:, columns:] = LOWEST
    if hidden is not None:
        np.copyto(scores.reshape(*queries.shape[:2], -1)[..., :columns], LOWEST, where=hidden)
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    attended, sums, part = np.zeros_like(q), np.zeros((len(q), 1), np.float32), np.empty_like(q)
    for block in blocks:
        product(scores[:, block], last_values if block is blocks[-1] else values[block], part)
        attended += part
        sums += scores[:, block].sum(-1, keepdims=True)
    attended /= sums
    return attended.reshape(queries.shape)


def _padded(array: Floats) -> Floats:
    """``[n, d]`` with rows of zeros up to ``COLUMNS``."""
    return np.pad(array, ((0, COLUMNS - len(array)), (0, 0))) if len(array) < COLUMNS else array


def _is_long(shape: tuple[int, ...]) -> bool:
    """Whether ``[..., L, n]`` has more than the one token a row of a decode step."""
    return shape[-2] > 1


def _fits_blas(out: int, columns: int) -> bool:
    return out >= BLAS_OUT and out * columns >= BLAS_WEIGHTS


def _shape(weights: Weights, x: mx.array) -> tuple[int, int]:
    return weights.weight.shape[-2], x.shape[-1]


def _floats(x: mx.array) -> Floats:
    return np.asarray(x.astype(mx.float32))


def _allocated(shape: tuple[int, ...]) -> tuple[mx.array, Floats]:
    """An array and its memory, to be written now, before anything reads it."""
    array = mx.zeros(shape, mx.float32)
    mx.eval(array)
    return array, bytes_of(array).view(np.float32).reshape(shape)


@cache
def _streams(count: int) -> list[mx.Stream]:
    """For arrays that are computed on several cores; the caller's own stream waits for them where it needs them."""
    return [mx.new_thread_unsafe_stream(mx.Device(mx.cpu)) for _ in range(count)]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mlx-mixtral-multiply")
