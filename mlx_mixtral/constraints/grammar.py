"""A definition as llguidance takes it, and what it says about one it refuses.

Text begins as the model writes it. With SentencePiece JSON begins with the piece ``▁{``, so a space may come first. Where a
text is shown from its beginning its first space is taken off, so one has to come before other text: what is shown is then the
text that the definition describes, to the character.
"""

from __future__ import annotations

import json
import re
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from mlx_mixtral.constraints.specs import ConstraintSpec, Grammar, JsonObject, JsonSchema, Regex
from mlx_mixtral.constraints.token_table import TokenTable, check_package
from mlx_mixtral.errors import ConstraintError

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["check", "definition", "is_json", "match"]

# One space, or a line break and an indentation: a model that may write white space without end does.
WHITESPACE = r" |\n[ \t]{0,20}"
# Of the lexer's work for one token of JSON, some times llguidance's own: published schemas of 45 kB need it. 40 ms at most.
STEP_FUEL = 600_000
# Tokens are never forced: what is forced is the text, and the model spells it in its own way.
OPTIONS = '%llguidance { "no_forcing": true }\n'
# Lines of a message that show the place it speaks of.
SHOWN_PLACE = re.compile(r"\s*(\d+ \||\^+\s*$)")


def is_json(spec: ConstraintSpec) -> bool:
    """Whether what it describes is JSON."""
    return isinstance(spec, JsonSchema | JsonObject)


def definition(spec: ConstraintSpec, *, drops_first_space: bool) -> str:
    """What llguidance compiles; also what tells one compiled grammar from another.

    Raises:
        ConstraintError: a pydantic model that has no schema after all.
    """
    from llguidance import LLMatcher

    if isinstance(spec, Regex):
        body: dict[str, Any] = json.loads(LLMatcher.grammar_from_regex(spec.pattern))["grammars"][0]
    elif isinstance(spec, Grammar):
        body = {"lark_grammar": spec.lark}
    else:
        strict = isinstance(spec, JsonSchema) and spec.strict
        schema = spec.document if isinstance(spec, JsonSchema) else {"type": "object"}
        if isinstance(schema, dict):
            options = {"whitespace_pattern": WHITESPACE, "lenient": not strict, "coerce_one_of": not strict}
            schema = {key: value for key, value in schema.items() if key != "x-guidance"} | {"x-guidance": options}
        body = {"json_schema": schema}
    first = '" "? ' if is_json(spec) else '" " ' if drops_first_space else ""
    return json.dumps({"grammars": [{"lark_grammar": f"{OPTIONS}start: {first}@body"}, body | {"name": "body"}]})


def check(spec: ConstraintSpec) -> None:
    """Refuse what can be refused without a vocabulary: all but a grammar, which may name tokens of one.

    Raises:
        ConstraintError, MissingDependencyError: as ``match``, and where llguidance is not installed.
    """
    check_package()
    from llguidance import LLMatcher

    if not isinstance(spec, Grammar):
        is_error, said = LLMatcher.validate_grammar_with_warnings(definition(spec, drops_first_space=False))
        if is_error:
            raise ConstraintError(_refusal(spec, said[0]))


def match(text: str, vocabulary: TokenTable, spec: ConstraintSpec) -> LLMatcher:
    """Compile a ``definition``: a matcher at its start. Drops the interpreter's lock.

    Raises:
        ConstraintError: llguidance refuses it; the message is what it says, with the keyword or the place.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False, step_lexer_fuel=STEP_FUEL if is_json(spec) else None)
    matcher = LLMatcher(vocabulary.table, text, log_level=0, limits=limits)
    if matcher.is_error():
        raise ConstraintError(_refusal(spec, matcher.get_error()))
    return matcher


def _refusal(spec: ConstraintSpec, said: str) -> str:
    # Without the lines that show the place, and the chain of what was being done.
    lines = [line for line in said.split("\n  while ")[0].splitlines() if not SHOWN_PLACE.match(line)]
    reason = " ".join(" ".join(lines).split())
    if isinstance(spec, Grammar):
        return f"the grammar cannot be kept: {reason}"
    reason = reason.rpartition("error: ")[2]
    if isinstance(spec, Regex):
        return f"the regular expression {shorten(spec.pattern, 60)} cannot be kept: {reason}"
    fix = "; leave it out, or give strict=False" if isinstance(spec, JsonSchema) and spec.strict else ""
    return f"the schema cannot be kept: {reason}{fix}"
