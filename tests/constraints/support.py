"""Schemas made at random from a seed, and texts drawn at random from masks: the harshest model there is."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from mlx_mixtral.constraints.base import Constraint, mask_words
from mlx_mixtral.constraints.token_table import TokenTable

__all__ = ["allowed_ids", "drawn_text", "make_schema", "text_of"]

PATTERNS = ("^[a-z]{2,6}$", "^[A-Z][a-z]+(-[0-9]{1,3})?$", "^#[0-9a-f]{6}$", "^(yes|no|maybe)$", "[0-9]{3}")
WORDS = ("name", "age", "tags", "city", "is_open", "price", "kind", "note", "größe", "2nd")


def make_schema(seed: int) -> dict[str, Any]:
    """An object's schema that llguidance takes strictly and ``jsonschema`` judges."""
    return _Maker(random.Random(seed)).document()


class _Maker:
    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def document(self) -> dict[str, Any]:
        schema = self._object(3)
        if self._chance.random() < 0.3:
            node = {
                "type": "object",
                "properties": {
                    "value": self._scalar(),
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
            schema["properties"]["chain"] = {"$ref": "#/$defs/node"}
            schema["required"].append("chain")
            schema["$defs"] = {"node": node}
        return schema

    def _any(self, depth: int) -> dict[str, Any]:
        chance = self._chance.random()
        if depth == 0 or chance < 0.5:
            return self._scalar()
        if chance < 0.7:
            return self._object(depth - 1)
        if chance < 0.85:
            least = self._chance.randrange(3)
            array: dict[str, Any] = {"type": "array", "items": self._any(depth - 1), "minItems": least}
            return array | ({"maxItems": least + self._chance.randrange(3)} if self._chance.random() < 0.5 else {})
        if chance < 0.95:
            return {"anyOf": [self._any(depth - 1), {"type": "null"}, self._scalar()]}
        other = {"type": "object", "properties": {"both": self._scalar()}, "required": ["both"]}
        return {"allOf": [self._object(0), other]}

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._chance.sample(WORDS, self._chance.randrange(1, 5))
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self._any(depth) for name in names},
            "required": [name for name in names if self._chance.random() < 0.7],
        }
        if depth and self._chance.random() < 0.6:
            schema["additionalProperties"] = False if self._chance.random() < 0.7 else self._scalar()
        return schema

    def _scalar(self) -> dict[str, Any]:
        low = self._chance.randrange(-50, 50)
        return self._chance.choice(
            [
                {"type": "string"},
                {
                    "type": "string",
                    "minLength": self._chance.randrange(12),
                    "maxLength": 12 + self._chance.randrange(9),
                },
                {"type": "string", "pattern": self._chance.choice(PATTERNS)},
                {"type": "string", "format": self._chance.choice(["date", "ipv4", "uuid"])},
                {"enum": self._chance.sample(["red", "green", "blue", 1, 2.5, None, True], 3)},
                {"const": self._chance.choice(["fixed", 7, None, False])},
                {"type": "integer"},
                {"type": "integer", "minimum": low, "maximum": low + self._chance.randrange(1000)},
                {"type": "integer", "multipleOf": self._chance.randrange(2, 9), "minimum": 0},
                {"type": "number", "minimum": low},
                {"type": "boolean"},
                {"type": ["string", "null"]},
            ]
        )


def allowed_ids(constraint: Constraint, vocab_size: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Ids whose bits are set, read one by one as the protocol says."""
    row = np.zeros(mask_words(vocab_size), np.int32)
    constraint.mask_into(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    assert not bits[vocab_size:].any()
    return np.flatnonzero(bits)


def text_of(table: TokenTable, tokens: list[int]) -> str:
    """Their bytes as the text they are; an end of text is none of it."""
    return b"".join(table.tokens[token] for token in tokens if token not in table.eos_token_ids).decode()


def drawn_text(constraint: Constraint, table: TokenTable, seed: int, max_tokens: int) -> tuple[list[int], str]:
    """Up to ``max_tokens`` tokens, each drawn evenly from what the mask allows; and their text."""
    chance = random.Random(seed)
    tokens: list[int] = []
    while not constraint.is_complete and len(tokens) < max_tokens:
        tokens.append(constraint.accept(int(chance.choice(allowed_ids(constraint, table.size)))))
    return tokens, text_of(table, tokens)
