"""/tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from mlx_mixtral.server.wire.chat import CONTINUATION_FIELDS, MESSAGE, TOOL
from mlx_mixtral.server.wire.fields import BodyField, BodyTable
from mlx_mixtral.server.wire.kinds import Flag, Integer, ListOf, String
from mlx_mixtral.server.wire.unsupported import NOT_IN_TEMPLATES

__all__ = ["DETOKENIZE_BODY", "TOKENIZE_BODY"]

TOKENIZE_BODY = BodyTable((
    BodyField("model", String(), "Its name or an alias."),
    BodyField("prompt", String(), "Text; or messages."),
    BodyField("messages", ListOf(MESSAGE, 1), "A conversation, written in the chat format."),
    BodyField("tools", ListOf(TOOL, most=128), "Functions that are told with messages."),
    BodyField("add_special_tokens", Flag(), "Put BOS before a text.", True),
    BodyField("special", Flag(), "Control tokens that the text spells become these tokens.", True),
    BodyField("return_token_strs", Flag(), "The vocabulary's spelling of each token.", False),
    *CONTINUATION_FIELDS,
    *NOT_IN_TEMPLATES,
), "TokenizeRequest")  # fmt: skip

DETOKENIZE_BODY = BodyTable((
    BodyField("model", String(), "Its name or an alias."),
    BodyField("tokens", ListOf(Integer(0)), "Token ids.", required=True),
), "DetokenizeRequest")  # fmt: skip
