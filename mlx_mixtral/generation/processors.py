"""Functions of the user's own that change logits before a token is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_mixtral.arguments import check_type
from mlx_mixtral.errors import InvalidRequestError

__all__ = ["LogitsProcessor", "check_processors", "processed"]

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""From the ids so far, prompt first, ``[n]`` int32, and the logits of the next token, ``[V]`` float32, to other logits."""


def check_processors(processors: object) -> tuple[LogitsProcessor, ...]:
    """``processors`` as a tuple.

    Raises:
        InvalidRequestError: something else than functions.
    """
    if processors is None:
        return ()
    check_type("logits_processors", processors, (list, tuple), "a list of functions of ids and logits")
    assert isinstance(processors, list | tuple)
    for place, processor in enumerate(processors):
        if not callable(processor):
            check_type(f"logits_processors[{place}]", processor, (), "a function of ids and logits")
    return tuple(processors)


def processed(processors: Sequence[LogitsProcessor], ids: mx.array, logits: mx.array) -> mx.array:
    """``logits [V]`` after all processors, one after the other, evaluated.

    Raises:
        InvalidRequestError: one returned something else than logits, or none that a token can be drawn from.
    """
    size = logits.size
    for place, processor in enumerate(processors):
        name = f"logits_processors[{place}]"
        # Copies: a processor that writes into what it is given changes nothing of ours.
        changed = processor(mx.array(ids), mx.array(logits))
        if not isinstance(changed, mx.array):
            raise InvalidRequestError(f"{name} returned {type(changed).__name__}; it must return an mlx array [{size}]")
        if changed.shape != (size,):
            raise InvalidRequestError(
                f"{name} returned shape {list(changed.shape)}; it must return the logits of all tokens, [{size}]"
            )
        if not mx.issubdtype(changed.dtype, mx.floating):
            raise InvalidRequestError(f"{name} returned {changed.dtype}; it must return floating-point logits")
        logits = changed.astype(mx.float32)
        largest = float(np.asarray(mx.max(mx.where(mx.isnan(logits), mx.inf, logits))))
        if not -float("inf") < largest < float("inf"):
            raise InvalidRequestError(
                f"{name} returned {'-inf for every token' if largest < 0 else 'NaN or inf'}; logits must be numbers, "
                "-inf for excluded tokens, and at least one token must remain"
            )
    return logits
