"""Counting the GPU kernels of a lazy graph on a machine without a GPU.

On the CPU backend MLX replaces each call of ``mx.fast`` by a dozen small operations, where a GPU runs one kernel. Here each is
replaced by one operation that nothing else uses and that ``mx.compile`` does not fuse. Views move no data and count nothing; a
fused group of elementwise operations counts one; so does everything else.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx

__all__ = ["kernels"]

VIEWS = frozenset(
    {
        "AsStrided",
        "Broadcast",
        "BroadcastAxes",
        "Depends",
        "ExpandDims",
        "Flatten",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "StopGradient",
        "Transpose",
        "Unflatten",
    }
)
# What stands for each of mx.fast, and its name in the graph.
STAND_INS = {"Scan": "rms_norm", "Sort": "rope", "Partition": "scaled_dot_product_attention"}


@contextmanager
def _fast_as_one() -> Iterator[None]:
    def after(x: mx.array, others: tuple[Any, ...]) -> mx.array:
        arrays = [other for other in others if isinstance(other, mx.array)]
        return mx.depends([x], arrays)[0] if arrays else x

    def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
        return mx.cumsum(after(x, (weight,)), axis=-1)

    def rope(x: mx.array, dims: int, *, offset: int | mx.array, freqs: mx.array | None = None, **_: Any) -> mx.array:
        return mx.sort(after(x, (offset, freqs)), axis=-1)

    def attention(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **_: Any) -> mx.array:
        return mx.partition(after(q, (k, v, mask)), 0, axis=-1)

    with (
        patch.object(mx.fast, "rms_norm", rms_norm),
        patch.object(mx.fast, "rope", rope),
        patch.object(mx.fast, "scaled_dot_product_attention", attention),
    ):
        yield


def kernels(graph: Callable[[], mx.array]) -> Counter[str]:
    """Kernels by name of what ``graph`` returns; its inputs are evaluated, its result is not."""
    with _fast_as_one():
        dot = io.StringIO()
        mx.export_to_dot(dot, graph())
    found = Counter(re.findall(r'label ="(\w+)", shape=rectangle', dot.getvalue()))
    assert found, "the graph is empty"
    return Counter({STAND_INS.get(name, name): count for name, count in found.items() if name not in VIEWS})
