"""Fields that say what an answer has to be: OpenAI's ``response_format``, and vLLM's names for regular expressions, grammars
and choices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.server.wire.fields import BodyField, BodyTable
from mlx_mixtral.server.wire.kinds import Anything, Choice, Either, Flag, ListOf, Text

__all__ = ["STRUCTURE_FIELDS", "wanted_structure"]

_SCHEMA = Either((Anything(is_object=True), Flag(), Text(1)))

STRUCTURE_FIELDS = (
    BodyField(
        "response_format",
        BodyTable((
            BodyField("type", Choice(("text", "json_object", "json_schema")), "What the answer is.", required=True),
            BodyField("json_schema", BodyTable((
                BodyField("name", Text(), "Ignored.", ""),
                BodyField("description", Text(), "Ignored."),
                BodyField("schema", Either((Anything(is_object=True), Flag())), "The schema."),
                BodyField("strict", Flag(), "Refuse a schema that cannot be kept to the letter.", False),
            )), "With json_schema."),
        )),
        "JSON, or JSON of a schema.",
    ),
    BodyField("guided_json", _SCHEMA, "A JSON schema, as an object or as text."),
    BodyField("guided_regex", Text(1), "A regular expression for the whole answer."),
    BodyField("guided_choice", ListOf(Text(1), 1, 1024), "The answer is one of these."),
    BodyField("guided_grammar", Text(1), "A grammar in llguidance's variant of Lark's notation."),
    BodyField(
        "structured_outputs",
        BodyTable((
            BodyField("json", _SCHEMA, "As guided_json."),
            BodyField("regex", Text(1), "As guided_regex."),
            BodyField("choice", ListOf(Text(1), 1, 1024), "As guided_choice."),
            BodyField("grammar", Text(1), "As guided_grammar."),
            BodyField("json_object", Flag(), "Any JSON object.", False),
        )),
        "The newer names of these.",
    ),
)  # fmt: skip


def wanted_structure(body: Mapping[str, Any]) -> tuple[str, Any, bool] | None:
    """What a body with ``STRUCTURE_FIELDS`` asks for: kind, definition and whether it is strict; None for any text.

    Raises:
        ApiError: 400: several at once, or no schema.
    """
    asked = [found for found in (_response_format(body["response_format"]), *_guided(body)) if found is not None]
    if len(asked) > 1:
        raise ApiError(
            400, f"{asked[0][0]} and {asked[1][0]} say both what the answer is; give one of them", asked[1][0]
        )
    return asked[0][1:] if asked else None


def _response_format(given: Mapping[str, Any] | None) -> tuple[str, str, Any, bool] | None:
    if given is None or given["type"] == "text":
        return None
    if given["type"] == "json_object":
        return "response_format", "json_object", None, False
    schema = (given["json_schema"] or {}).get("schema")
    if schema is None:
        place = "response_format.json_schema.schema"
        raise ApiError(400, f"{place} is missing; give a JSON schema", place)
    return "response_format", "json", schema, given["json_schema"]["strict"]


def _guided(body: Mapping[str, Any]) -> list[tuple[str, str, Any, bool] | None]:
    found: list[tuple[str, str, Any, bool] | None] = []
    for kind in ("json", "regex", "choice", "grammar"):
        for place, value in (
            (f"guided_{kind}", body[f"guided_{kind}"]),
            (f"structured_outputs.{kind}", (body["structured_outputs"] or {}).get(kind)),
        ):
            found.append(None if value is None else (place, kind, value, False))
    if (body["structured_outputs"] or {}).get("json_object"):
        found.append(("structured_outputs.json_object", "json_object", None, False))
    return found
