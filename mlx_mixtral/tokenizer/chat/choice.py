"""Which chat format a checkpoint gets, and how that is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlx_mixtral.arguments import as_path, check_type
from mlx_mixtral.errors import InvalidRequestError, TokenizerError
from mlx_mixtral.tokenizer.base import ChatFormat
from mlx_mixtral.tokenizer.chat.named import TEMPLATES, recognised
from mlx_mixtral.tokenizer.chat.native import MistralV1, MistralV3, NoChat
from mlx_mixtral.tokenizer.chat.template import JinjaChat, is_mistral_template
from mlx_mixtral.tokenizer.markers import Markers
from mlx_mixtral.tokenizer.settings import Settings, read_template

__all__ = ["ChatChoice", "GivenTemplate", "choose_chat_format", "given_template"]

_NATIVE = {"mistral-v1": MistralV1, "mistral-v3": MistralV3}
FORMAT_NAMES = (*TEMPLATES, *_NATIVE)
_OVERRIDE = "--chat-template FILE or NAME selects another"


@dataclass(frozen=True)
class ChatChoice:
    """A format, where it is from ("chat_template.jinja", "control tokens", "a guess", …), and what to tell a user of it."""

    format: ChatFormat
    origin: str
    note: str = ""


@dataclass(frozen=True)
class GivenTemplate:
    """What a user chose: the ``name`` of a format, or ``templates`` of their own; ``origin`` is how it was given."""

    origin: str
    name: str | None = None
    templates: Mapping[str, str] = field(default_factory=dict)


def given_template(value: str | Path) -> GivenTemplate:
    """Read ``value``: the name of a format, a file (jinja, or JSON with `chat_template`), or a template itself.

    Raises:
        InvalidRequestError: it is none of these; the message lists the names.
    """
    check_type("chat_template", value, (str, Path), "a name, a file, or a jinja template as text")
    if str(value) in FORMAT_NAMES:
        return GivenTemplate(str(value), name=str(value))
    if isinstance(value, str) and ("{%" in value or "{{" in value):
        return GivenTemplate("the given text", templates={"default": value})
    path = as_path("chat_template", value)
    if not path.is_file():
        raise InvalidRequestError(
            f"chat template {str(value)!r} is neither a file here nor a known format; the formats are {', '.join(FORMAT_NAMES)}"
        )
    try:
        templates = read_template(path)
    except TokenizerError as error:
        raise InvalidRequestError(str(error)) from error
    if not templates:
        raise InvalidRequestError(f"{path} has no chat_template; give a Jinja file, or JSON that has one")
    return GivenTemplate(path.name, templates=templates)


def choose_chat_format(
    markers: Markers, settings: Settings, *, native: str, given: GivenTemplate | None = None
) -> ChatChoice:
    """What was given, else the checkpoint's own template, else the family whose control tokens there are, else a guess.

    A template of Mistral's stands for a native format: v3 when [INST] is a control or special token, else v1. The guess is v1,
    and only for a SentencePiece vocabulary: ``native`` "none" is for others.

    Raises:
        InvalidRequestError: the given format needs control tokens that are not there.
    """
    if given is not None and given.name is not None:
        return _by_name(given.name, markers)
    templates, origin = settings.templates, settings.template_file
    if any(not is_mistral_template(source) for source in templates.values()):
        return ChatChoice(JinjaChat(templates), origin)
    if templates:
        return ChatChoice(MistralV3() if "[INST]" in markers.by_content else MistralV1(), origin)
    name = recognised(markers.by_content)
    if name is None and "[INST]" in markers.by_content:
        name = "mistral-v3"
    if name == "mistral-v3":
        return ChatChoice(MistralV3(), "control tokens")
    if name is not None:
        note = f"there is no chat template; the control tokens indicate {name}: {_OVERRIDE}"
        return ChatChoice(JinjaChat({"default": TEMPLATES[name]}, name), "control tokens", note)
    if native == "mistral-v1":
        note = f"there is no chat template; mistral-v1 is assumed: {_OVERRIDE}"
        return ChatChoice(MistralV1(), "a guess", note)
    return ChatChoice(NoChat(), "")


def _by_name(name: str, markers: Markers) -> ChatChoice:
    if name == "mistral-v3" and not {"[INST]", "[/INST]"} <= markers.by_content.keys():
        raise InvalidRequestError(
            "chat template mistral-v3 needs the control token [INST], which the vocabulary does not have; use mistral-v1"
        )
    if name in _NATIVE:
        return ChatChoice(_NATIVE[name](), name)
    return ChatChoice(JinjaChat({"default": TEMPLATES[name]}, name), name)
