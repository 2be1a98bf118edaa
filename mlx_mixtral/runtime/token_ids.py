"""Token ids as they are given: lists, tuples and arrays of numbers in the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

from mlx_mixtral.arguments import is_integer, shown
from mlx_mixtral.errors import InvalidRequestError

__all__ = ["checked_ids"]


def checked_ids(ids: Iterable[int], what: str, vocab_size: int) -> list[int]:
    """``ids`` as a list of ints.

    Raises:
        InvalidRequestError: something else, or out of the vocabulary; ``what`` names them.
    """
    # Bytes are a sequence of small integers to Python, and undecoded text to the caller.
    if isinstance(ids, bytes | bytearray) or not isinstance(ids, Iterable):
        raise InvalidRequestError(f"{what} is {type(ids).__name__}, not text or a list of token ids")
    if (ndim := getattr(ids, "ndim", 1)) != 1:
        raise InvalidRequestError(f"{what} is an array of {ndim} dimensions; give one row of token ids")
    tokens = []
    # Arrays, and scalars of them in a list, have their numbers as Python's.
    for given in ids.tolist() if hasattr(ids, "tolist") else ids:
        token = given.tolist() if hasattr(given, "tolist") else given
        if not is_integer(token) or not 0 <= token < vocab_size:
            raise InvalidRequestError(f"{what} holds token id {shown(token)}; ids go from 0 to {vocab_size - 1}")
        tokens.append(token)
    return tokens
