"""Chats with tools: what a model is given for a request, and what reads its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mlx_mixtral.calls.definitions import NO_TOOLS, ToolUse
from mlx_mixtral.calls.generic import GenericCalls
from mlx_mixtral.calls.grammar import AnswerGrammar, answer_rule, refusal
from mlx_mixtral.calls.hermes import BEGIN, HermesCalls
from mlx_mixtral.calls.markup import Delimiters, Markup
from mlx_mixtral.calls.mistral import MARKER, MistralCalls
from mlx_mixtral.calls.parser import CallParser
from mlx_mixtral.calls.turns import read_conversation
from mlx_mixtral.calls.writing import ChatWriter
from mlx_mixtral.constraints.specs import ConstraintSpec, JsonSchema
from mlx_mixtral.errors import ConstraintError, InvalidRequestError
from mlx_mixtral.tokenizer import Tokenizer
from mlx_mixtral.tokenizer.base import Message

__all__ = ["TOOL_FORMATS", "ChatPrompt", "ToolChat"]

TOOL_FORMATS = ("auto", "mistral", "hermes", "generic", "none")


@dataclass(frozen=True)
class ChatPrompt:
    """What an answer is generated from.

    Attributes:
        tokens: of the prompt.
        constraint: what the answer keeps; None: nothing.
        begun: text that the prompt ends with, which the answer goes on from.
        use: tools, and what was asked of them.
        delimiters: what the parser looks for; None: all is text.
    """

    tokens: list[int]
    constraint: ConstraintSpec | None = None
    begun: str = ""
    use: ToolUse = NO_TOOLS
    delimiters: Delimiters | None = None

    def parser(self) -> CallParser:
        """A fresh parser of an answer."""
        names = frozenset(tool.name for tool in self.use.callable_tools)
        return CallParser(self.delimiters if names else None, names, max_calls=self.use.max_calls)

    def explained(self, error: ConstraintError) -> InvalidRequestError:
        """``error``, or which tool it is about, where its constraint was refused: "tools[0].function.parameters: …"."""
        for tool in self.use.callable_tools:
            if (refused := refusal(tool)) is not None:
                return InvalidRequestError(f"{tool.place}.parameters: {refused}")
        return error


class ToolChat:
    """Chats of one tokenizer. Any thread may use it.

    Args:
        tools: which way of writing calls. "auto": Mistral's where the chat format is its v3 or writes ``[TOOL_CALLS]``,
            ``<tool_call>`` for templates that write it and for ChatML, JSON by instructions for others. "none": no tools.

    Attributes:
        name: the way that was chosen.

    Raises:
        InvalidRequestError: no such way, or one that needs a control token which is not there.

    Example:
        >>> prompt = ToolChat(tokenizer).prompt([{"role": "user", "content": "What is the time?"}], read_tools(tools))
        >>> parser = prompt.parser()
    """

    def __init__(self, tokenizer: Tokenizer, tools: str = "auto") -> None:
        if tools not in TOOL_FORMATS:
            raise InvalidRequestError(f"tools is {tools!r}; it must be one of {', '.join(TOOL_FORMATS)}")
        self._tokenizer = tokenizer
        own = own_markup(tokenizer)
        self.name = (own or "generic") if tools == "auto" else tools
        self._is_own = self.name == own
        self._markup: Markup
        if self.name == "mistral":
            self._markup = MistralCalls(tokenizer)
        elif self.name == "hermes":
            self._markup = HermesCalls(tokenizer)
        else:
            self._markup = GenericCalls()

    @cached_property
    def _writer(self) -> ChatWriter:
        return ChatWriter(self._tokenizer, self._markup, is_own=self._is_own)

    def prompt(
        self, messages: Sequence[Message], use: ToolUse = NO_TOOLS, answer: ConstraintSpec | None = None
    ) -> ChatPrompt:
        """The prompt for the assistant's next turn.

        Args:
            messages: of OpenAI's form; see ``read_conversation``.
            use: see ``read_tools``.
            answer: what the answer has to keep where it is text.

        Raises:
            ChatTemplateError: the messages are none, or the chat format cannot write them.
            InvalidRequestError: tools where there are to be none.
        """
        if use.callable_tools and self.name == "none":
            raise InvalidRequestError(
                'tools: this model is served without tools; leave them out, or give "none" as choice'
            )
        conversation = read_conversation(messages)
        if conversation.begun and answer is not None:
            raise InvalidRequestError(
                "messages: the last one is the assistant's, whose text is gone on with; a format for the whole answer cannot "
                "be kept then: leave one of them out"
            )
        tokens = self._writer.ids(conversation, use.described_tools)
        if not use.tools or self.name == "none" or (use.mode == "none" and answer is not None):
            return ChatPrompt(tokens, answer, begun=conversation.begun)
        rules = self._markup.rules(use, None if answer is None else "answer")
        if answer is not None and use.mode != "required":
            rules += "\n" + answer_rule("answer", answer, reserved_key=self._markup.reserved_key)
        schemas = [tool.arguments for tool in use.callable_tools]
        if isinstance(answer, JsonSchema):
            schemas.append(answer)
        grammar = AnswerGrammar(rules, tuple(schemas))
        return ChatPrompt(tokens, grammar, conversation.begun, use, self._markup.delimiters)


def own_markup(tokenizer: Tokenizer) -> str | None:
    """The way in which a chat format writes calls, or its models do; None where they have none."""
    source = tokenizer.chat_source
    has_marker = tokenizer.special_id(MARKER) is not None
    if tokenizer.chat_format == "mistral-v3" or (MARKER in source and "[ARGS]" not in source):
        return "mistral" if has_marker else None
    is_chatml = tokenizer.chat_format == "chatml" or "<|im_start|>" in source
    return "hermes" if BEGIN in source or is_chatml else None
