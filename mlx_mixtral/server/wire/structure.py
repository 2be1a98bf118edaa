"""Fields that say what an answer has to be: OpenAI's ``response_format``, and vLLM's names for regular expressions, grammars
and choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_mixtral.server.wire.errors import ApiError
from mlx_mixtral.server.wire.fields import BodyField, BodyTable
from mlx_mixtral.server.wire.kinds import Anything, Choice, Either, Flag, ListOf, String
from mlx_mixtral.server.wire.unsupported import NOT_IN_STRUCTURES

__all__ = ["STRUCTURE_FIELDS", "WantedStructure", "wanted_structure"]

_SCHEMA = Either((Anything(is_object=True), Flag(), String(1)))

STRUCTURE_FIELDS = (
    BodyField(
        "response_format",
        BodyTable((
            BodyField("type", Choice(("text", "json_object", "json_schema")), "What the answer is.", required=True),
            BodyField("json_schema", BodyTable((
                BodyField("name", String(), "Ignored.", ""),
                BodyField("description", String(), "Ignored."),
                BodyField("schema", Either((Anything(is_object=True), Flag())), "The schema."),
                BodyField("strict", Flag(), "Refuse a schema that cannot be kept to the letter.", False),
            )), "With json_schema."),
            BodyField("schema", Either((Anything(is_object=True), Flag())), "With json_object: a schema, as llama.cpp has it."),
        )),
        "JSON, or JSON of a schema.",
    ),
    BodyField("guided_json", _SCHEMA, "A JSON schema, as an object or as text."),
    BodyField("guided_regex", String(1), "A regular expression for the whole answer."),
    BodyField("guided_choice", ListOf(String(1), 1, 1024), "The answer is one of these."),
    BodyField("guided_grammar", String(1), "A grammar in llguidance's variant of Lark's notation."),
    BodyField(
        "structured_outputs",
        BodyTable((
            BodyField("json", _SCHEMA, "As guided_json."),
            BodyField("regex", String(1), "As guided_regex."),
            BodyField("choice", ListOf(String(1), 1, 1024), "As guided_choice."),
            BodyField("grammar", String(1), "As guided_grammar."),
            BodyField("json_object", Flag(), "Any JSON object.", False),
            *NOT_IN_STRUCTURES,
        )),
        "The newer names of these.",
    ),
    # llama.cpp's: an answer that does not keep to them would be worse than none.
    BodyField("json_schema", None, "A JSON schema.", instead="give it as response_format"),
    BodyField("grammar", None, "A grammar in llama.cpp's notation.", off=("",), instead="give guided_grammar, in Lark's"),
)  # fmt: skip


@dataclass(frozen=True)
class WantedStructure:
    """What an answer has to be.

    Args:
        param: the field that says so.
        kind: "json", "json_object", "regex", "choice" or "grammar".
        definition: as it was given; None for "json_object".
        is_strict: whether a schema that cannot be kept to the letter is refused.
    """

    param: str
    kind: str
    definition: Any = None
    is_strict: bool = False


def wanted_structure(body: Mapping[str, Any]) -> WantedStructure | None:
    """What a body with ``STRUCTURE_FIELDS`` asks for; None for any text.

    Raises:
        ApiError: 400: several at once, or no schema.
    """
    asked = [*_response_format(body["response_format"]), *_guided(body)]
    if len(asked) > 1:
        first, second = asked[:2]
        raise ApiError(
            400, f"{first.param} and {second.param} say both what the answer is; give one of them", second.param
        )
    return asked[0] if asked else None


def _response_format(given: Mapping[str, Any] | None) -> list[WantedStructure]:
    if given is None or given["type"] == "text":
        return []
    if given["type"] == "json_object":
        if given["schema"] is not None:
            return [WantedStructure("response_format.schema", "json", given["schema"])]
        return [WantedStructure("response_format", "json_object")]
    described = given["json_schema"] or {}
    place = "response_format.json_schema.schema"
    if described.get("schema") is None:
        raise ApiError(400, f"{place} is missing; give a JSON schema", place)
    return [WantedStructure(place, "json", described["schema"], described["strict"])]


def _guided(body: Mapping[str, Any]) -> list[WantedStructure]:
    newer = body["structured_outputs"] or {}
    found = []
    for kind in ("json", "regex", "choice", "grammar"):
        given = {f"guided_{kind}": body[f"guided_{kind}"], f"structured_outputs.{kind}": newer.get(kind)}
        found += [WantedStructure(param, kind, value) for param, value in given.items() if value is not None]
    if newer.get("json_object"):
        found.append(WantedStructure("structured_outputs.json_object", "json_object"))
    return found
