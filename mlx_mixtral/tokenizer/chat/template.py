"""The checkpoint's own jinja chat template, with the text of messages kept apart from the template's markers.

A template is rendered to one text, and the markers in it become control and added tokens. A marker that came from a
message must not. So the conversation is rendered a second time with every character that occurs in any marker replaced,
in message texts, by a private-use stand-in, one for one. What is a marker in that rendering was written by the template
alone, to the last character. Putting the characters back gives the first rendering again, as templates hardly ever look
at what a text says, and then its markers are where the second has them. Where the two differ (the template looks for
`</think>` in an answer, say) the first is used if both hold the same markers in the same order, else the second is:
it is always safe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from mlx_mixtral.errors import ChatTemplateError, MissingDependencyError
from mlx_mixtral.tokenizer.base import Message, Tokenizer, check_text
from mlx_mixtral.tokenizer.chat.messages import check_messages
from mlx_mixtral.tokenizer.markers import AddedToken, Markers
from mlx_mixtral.tokenizer.sentencepiece_proto import MARKER_FORM

__all__ = ["JinjaChat", "is_mistral_template"]

# Words that structure messages and JSON schemas: templates look for them, and no marker is made of one alone.
# fmt: off
_STRUCTURE = frozenset({
    "arguments", "array", "assistant", "boolean", "content", "description", "enum", "function", "id", "integer",
    "items", "name", "null", "number", "object", "parameters", "properties", "reasoning_content", "required", "role",
    "string", "system", "text", "tool", "tool_call_id", "tool_calls", "type", "user"
})
# fmt: on
_MISTRAL_MARKERS = {
    f"[{slash}{name}]" for slash in ("", "/") for name in ("INST", "AVAILABLE_TOOLS", "TOOL_CALLS", "TOOL_RESULTS")
}
_THE_TEMPLATE = "the checkpoint's chat template"
_FIRST_STAND_IN, _LAST_STAND_IN = 0xF0000, 0xFFFFD  # supplementary private use area A


def is_mistral_template(source: str) -> bool:
    """Whether a template is one of Mistral's own, whose result the native formats write (exactly, as they see tokens).

    It is when it has [INST] and [/INST], and no marker that Mistral's v1 and v3 formats lack: no other [CAPITALS], no
    <tag> but <s> and </s>, no ### headings.
    """
    source = re.sub(r"\{#.*?#\}", "", source, flags=re.DOTALL)
    brackets = set(re.findall(r"\[/?[A-Z][A-Z_]+\]", source))
    tags = set(re.findall(r"<[|/]?[^\s<>{}%'\"]+>|<<SYS>>", source))
    return {"[INST]", "[/INST]"} <= brackets <= _MISTRAL_MARKERS and tags <= {"<s>", "</s>"} and "###" not in source


class JinjaChat:
    """A chat format given by jinja templates by name; "tool_use" is taken when there are tools.

    Args:
        name: What the format is called where it is one of ours, and not the checkpoint's own.
    """

    is_native = False

    def __init__(self, templates: Mapping[str, str], name: str = "template") -> None:
        self._templates, self.name = templates, name

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Message] | None) -> list[int]:
        """See `Tokenizer.encode_chat`. No BOS is added: the template writes `bos_token` where it wants one."""
        render, given = self._prepared(tokenizer, messages, tools)
        return tokenizer.encode_parts(_split_rendering(render, given, tokenizer.markers))

    @property
    def source(self) -> str:
        return self._default()

    def render(self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Message] | None = None) -> str:
        """What the template makes of the messages."""
        render, given = self._prepared(tokenizer, messages, tools)
        return render(given)

    def end_of_turn(self, tokenizer: Tokenizer) -> int | str | None:
        """The marker that the default template writes right after an answer, be it after blanks; one that is no token of the
        vocabulary as text."""
        asked, answered = {"role": "user", "content": "asked"}, {"role": "assistant", "content": "answered"}
        try:
            render, given = self._prepared(tokenizer, [asked, answered, asked], None)
            parts = _split_rendering(render, given, tokenizer.markers)
        except (ChatTemplateError, MissingDependencyError):
            return None
        for part, following in pairwise(parts):
            if isinstance(part, str) and part.rstrip().endswith("answered") and isinstance(following, AddedToken):
                return following.token_id
        written = "".join(part if isinstance(part, str) else part.content for part in parts)
        found = MARKER_FORM.match(written.rpartition("answered")[2].lstrip())
        return found.group() if found else None

    def _prepared(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Message] | None
    ) -> tuple[Callable[[Any], str], dict[str, Any]]:
        check_messages(messages)
        given = {"messages": _plain(messages), "tools": _plain(tools) if tools else None}
        size = sum(map(len, _texts([*given.values()]))) + 4096 * len(messages)
        return self._renderer(tokenizer, bool(tools), size), given

    def _renderer(self, tokenizer: Tokenizer, tools: bool, input_size: int) -> Callable[[Any], str]:
        try:
            import jinja2

            from mlx_mixtral.tokenizer.chat.limits import Budget, TemplateLimitError
            from mlx_mixtral.tokenizer.chat.sandbox import Sandbox
        except ImportError as error:
            raise MissingDependencyError("a chat template needs jinja2: `pip install jinja2`") from error
        source = self._templates["tool_use"] if tools and "tool_use" in self._templates else self._default()
        sandbox = Sandbox()

        def named(token_id: int | None) -> str:
            return "" if token_id is None else tokenizer.id_to_piece(token_id)

        def render(given: Any) -> str:
            try:
                template = sandbox.from_string(source)
                sandbox.budget = Budget(input_size)
                return template.render(
                    **given,
                    add_generation_prompt=True,
                    bos_token=named(tokenizer.bos_token_id if self._has_bos(tokenizer) else None),
                    eos_token=named(tokenizer.eos_token_id),
                )
            except TemplateLimitError as error:
                raise ChatTemplateError(f"{_THE_TEMPLATE} is out of bounds: {error.message}") from error
            except jinja2.TemplateSyntaxError as error:
                raise ChatTemplateError(f"{_THE_TEMPLATE} is broken: {error.message} (line {error.lineno})") from error
            except jinja2.UndefinedError as error:
                raise ChatTemplateError(f"{_THE_TEMPLATE} is broken: {error.message}") from error
            except jinja2.TemplateError as error:
                message = error.message or type(error).__name__
                raise ChatTemplateError(f"{_THE_TEMPLATE} refuses these messages: {message}") from error
            except (RecursionError, MemoryError) as error:
                raise ChatTemplateError(f"{_THE_TEMPLATE} is out of bounds: {type(error).__name__}") from error
            except Exception as error:
                raise ChatTemplateError(f"{_THE_TEMPLATE} fails: {type(error).__name__}: {error}") from error

        return render

    def _has_bos(self, tokenizer: Tokenizer) -> bool:
        """A checkpoint's own template knows whether it wants BOS; one of ours asks the tokenizer."""
        return self.name == "template" or tokenizer.adds_bos

    def _default(self) -> str:
        if "default" in self._templates:
            return self._templates["default"]
        if len(self._templates) == 1:
            return next(iter(self._templates.values()))
        raise ChatTemplateError(f"no chat template is named default (there are {', '.join(sorted(self._templates))})")


def _split_rendering(render: Callable[[Any], str], given: dict[str, Any], markers: Markers) -> list[str | AddedToken]:
    rendered = render(given)
    used = set().union(*_texts([*given.values()]))
    suspects = sorted(used & markers.alphabet)
    if not suspects:
        return list(markers.split(rendered))
    stand_ins = _stand_ins(suspects, used.union(rendered))
    back = {ord(stand_in): char for char, stand_in in stand_ins.items()}
    safe = render(_replace(given, str.maketrans(stand_ins)))
    if safe.translate(back) != rendered and markers.sequence(safe) == markers.sequence(rendered):
        return list(markers.split(rendered))
    return [part.translate(back) if isinstance(part, str) else part for part in markers.split(safe)]


def _stand_ins(chars: Sequence[str], used: set[str]) -> dict[str, str]:
    free = (chr(code) for code in range(_FIRST_STAND_IN, _LAST_STAND_IN + 1) if chr(code) not in used)
    found = dict(zip(chars, free, strict=False))
    if len(found) < len(chars):
        raise ChatTemplateError(
            "the messages use all of Unicode's private characters; a template needs some of its own"
        )
    return found


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy made of dicts, lists and checked strings only, so that a template meets nothing else."""
    if depth > 100:
        raise ChatTemplateError("messages or tools are nested more than 100 deep")
    if isinstance(value, Mapping):
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, str):
        check_text(value)
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise ChatTemplateError(f"messages and tools may hold what JSON can, not {type(value).__name__}")


def _texts(value: Any) -> Iterator[str]:
    """Every string of a structure but the words of its structure."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str) and value not in _STRUCTURE:
        yield value


def _replace(given: dict[str, Any], table: dict[int, str]) -> Any:
    """The same structure with characters replaced in every text `_texts` gives."""

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {replaced(key): replaced(item) for key, item in value.items()}
        if isinstance(value, list):
            return [replaced(item) for item in value]
        return value.translate(table) if isinstance(value, str) and value not in _STRUCTURE else value

    return {key: replaced(value) for key, value in given.items()}
