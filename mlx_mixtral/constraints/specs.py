"""What a text has to be: a JSON schema, a regular expression, a grammar, any JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlx_mixtral.arguments import check_type
from mlx_mixtral.constraints.limits import MAX_DEPTH, check_definition, check_schema
from mlx_mixtral.errors import ConstraintError

__all__ = ["ConstraintSpec", "Grammar", "JsonObject", "JsonSchema", "Regex"]


class ConstraintSpec:
    """Base of what ``constraint=`` takes: ``JsonSchema``, ``Regex``, ``Grammar`` and ``JsonObject``.

    Attributes:
        is_shown: whether it describes a text as it is shown, from its first character; otherwise as the model writes it, with
            control tokens and the space that SentencePiece puts before a first word.
        is_loose: whether a part of a text, JSON, that no way out of is found from may begin all the same; it is left open where
            ``max_tokens`` ends it.
    """

    is_shown: ClassVar[bool] = True
    is_loose: ClassVar[bool] = False

    @property
    def schemas(self) -> tuple[JsonSchema, ...]:
        """Schemas that parts of it keep."""
        return ()


@dataclass(frozen=True)
class JsonSchema(ConstraintSpec):
    """JSON that a schema (draft 2020-12) validates. Properties come in the schema's order.

    Args:
        schema: a mapping, JSON text, or a pydantic model class.
        strict: refuse a schema with keywords that cannot be kept, and name them; otherwise they are left out, and
            ``stats.warnings`` of the generation lists them.

    Raises:
        ConstraintError: not a schema, or one beyond the limits: 64 kB, 50 levels, 512 properties, 4,096 enum values, and no
            string that must match several patterns at once.

    Example:
        >>> city = JsonSchema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})
        >>> model.generate("A city as JSON:", constraint=city)
    """

    schema: Mapping[str, Any] | str | type
    strict: bool = False

    def __post_init__(self) -> None:
        check_type("strict", self.strict, bool, "True or False")
        check_schema(self.document)

    @property
    def document(self) -> dict[str, Any] | bool:
        """The schema as JSON has it: an object, or True or False.

        Raises:
            ConstraintError: it is not JSON, or another kind of value.
        """
        given: Any = self.schema
        if isinstance(given, type):
            describe = getattr(given, "model_json_schema", None)
            if not callable(describe):
                raise ConstraintError(
                    f"schema is the class {given.__name__}; give a pydantic model, a mapping or JSON text"
                )
            given = describe()
        if not isinstance(given, str | Mapping | bool):
            check_type("schema", given, (), "a mapping, JSON text, or a pydantic model class")
        try:
            # Written and read again: a copy of plain values, whatever kinds of mappings and lists were given.
            text = given if isinstance(given, str) else json.dumps(given, default=_plain, allow_nan=False)
            check_definition("the schema", text)
            parsed = json.loads(text, parse_constant=_refuse_constant)
        except RecursionError:
            raise ConstraintError(f"the schema is nested more than {MAX_DEPTH} levels deep; write it flatter") from None
        except (TypeError, ValueError) as error:
            if isinstance(error, ConstraintError):
                raise
            raise ConstraintError(f"the schema is not JSON: {error}") from None
        if not isinstance(parsed, dict | bool):
            raise ConstraintError(f"the schema is a JSON {type(parsed).__name__}; it must be an object")
        return parsed


@dataclass(frozen=True)
class Regex(ConstraintSpec):
    """Text that a regular expression matches from its first character to its last.

    The syntax is that of Rust's regex crate (https://docs.rs/regex/latest/regex/#syntax): without back-references, and without
    look-around and word boundaries.

    Raises:
        ConstraintError: more than 64 kB.

    Example:
        >>> model.generate("Phone number:", constraint=Regex(r"\\\\+[0-9]{6,15}"))
    """

    pattern: str

    def __post_init__(self) -> None:
        check_type("pattern", self.pattern, str, "a regular expression, as text")
        check_definition("the regular expression", self.pattern)


@dataclass(frozen=True)
class Grammar(ConstraintSpec):
    """Text that a context-free grammar derives from its rule ``start``.

    Args:
        lark: the grammar in llguidance's variant of Lark's notation
            (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).

    Raises:
        ConstraintError: more than 64 kB.

    Example:
        >>> model.generate("2 + 2 = 5 is", constraint=Grammar('start: "right" | "wrong"'))
    """

    lark: str

    def __post_init__(self) -> None:
        check_type("lark", self.lark, str, "a grammar, as text")
        check_definition("the grammar", self.lark)


@dataclass(frozen=True)
class JsonObject(ConstraintSpec):
    """A JSON object, whatever it holds."""


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"it holds a {type(value).__name__}")


def _refuse_constant(name: str) -> object:
    raise ConstraintError(f"the schema is not JSON: it holds {name}")
