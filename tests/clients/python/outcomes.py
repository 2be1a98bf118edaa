"""What the programs of all clients share: a line of JSON tells what became of a check, and this is what they ask for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

__all__ = ["BASE_URL", "CITY", "MODEL", "PARAMETERS", "check"]

BASE_URL, MODEL = sys.argv[1], sys.argv[2]
CITY = "Name a city and how many people live in it, as JSON."
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
"""Of a tool that tells the weather."""


def check(name: str, carry_out: Callable[[], None]) -> None:
    """Carry out one check; whatever it raises is why it failed."""
    try:
        carry_out()
        told = {"check": name}
    except Exception as error:
        told = {"check": name, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
    print(json.dumps(told), flush=True)
