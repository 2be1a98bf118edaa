"""The beginning of each held-out text, and a record of it."""

from __future__ import annotations

from pathlib import Path

from mlx_mixtral.evaluation.texts import Text, read_texts

HELD_OUT = Path(__file__).parents[2] / "goldens" / "tiny-mixtral" / "heldout"


def beginnings(characters: int) -> list[Text]:
    """Of all seven domains."""
    return [Text(text.domain, text.name, text.text[:characters]) for text in read_texts([HELD_OUT])]
