"""Ids of calls: nine letters or digits, the only ones that Mistral's v3 format was trained on."""

from __future__ import annotations

import hashlib
import re
import secrets
import string

__all__ = ["ID_LENGTH", "nine_characters", "random_id"]

ID_LENGTH = 9
_ALPHABET = string.ascii_letters + string.digits
_FORM = re.compile(rf"[a-zA-Z0-9]{{{ID_LENGTH}}}")


def random_id() -> str:
    """A new id: one of 62^9."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(ID_LENGTH))


def nine_characters(given: str) -> str:
    """``given`` where it is such an id, else one that depends on it alone: a call and its result keep the same."""
    if _FORM.fullmatch(given):
        return given
    number = int.from_bytes(hashlib.sha256(given.encode("utf-8", "surrogatepass")).digest())
    digits = []
    for _ in range(ID_LENGTH):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(digits)
