"""Sizes as people write them: "12GB" and "12g" are 10^9 bytes each, "12GiB" is 2^30."""

from __future__ import annotations

import re
from fractions import Fraction

from mlx_mixtral.arguments import is_integer, plain, shown
from mlx_mixtral.errors import InvalidRequestError

__all__ = ["format_bytes", "format_bytes_up", "parse_size"]

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}{end}": 1000**power for power, prefix in enumerate("kmgt", start=1) for end in ("", "b")}
_UNITS |= {f"{prefix}i{end}": 1024**power for power, prefix in enumerate("kmgt", start=1) for end in ("", "b")}
_SIZE = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(size: str | float) -> int:
    """Bytes of ``"12GB"``, ``"12g"``, ``"12 GiB"``, ``"500m"`` or a plain number, such as 12e9; case does not matter.

    Raises:
        InvalidRequestError: not a size, or not positive.
    """
    size = plain(size)
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if is_integer(size):
        count = size
    elif isinstance(size, float) and size.is_integer():
        count = int(size)
    elif match is not None and match[2].lower() in _UNITS:
        count = int(Fraction(match[1]) * _UNITS[match[2].lower()])
    else:
        raise InvalidRequestError(f"{shown(size)} is not a size; write 12GB, 12GiB, 500MB or a number of bytes")
    if count <= 0:
        raise InvalidRequestError(f"size {shown(size)} must be more than zero")
    return count


def format_bytes(count: float) -> str:
    """``26.3 GB``: three figures, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_bytes_up(count: int) -> str:
    """``26.31 GB``: rounded up, so that it is enough when typed back."""
    unit, name = next(((u, n) for u, n in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")) if count >= u), (1, "B"))
    return f"{-(-count * 100 // unit) / 100:.2f} {name}"
