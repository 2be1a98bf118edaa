"""From messages and tools to a request: the same for Python and for a server."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Unpack

from mlx_mixtral.arguments import check_type
from mlx_mixtral.calls.chat import ToolChat
from mlx_mixtral.calls.definitions import NO_TOOLS, ToolUse
from mlx_mixtral.errors import ChatTemplateError, ConstraintError, MissingDependencyError
from mlx_mixtral.generation.sampling import SamplingParams
from mlx_mixtral.runtime.requests import GenerationOptions, Prompt, Requests, TextRequest
from mlx_mixtral.tokenizer.base import Message

__all__ = ["CHAT_SAMPLING", "ChatRequests"]

CHAT_SAMPLING = SamplingParams(temperature=0.7, top_p=0.95)


class ChatRequests:
    """Makes requests for the assistant's next turn.

    Args:
        requests: of the model.
        tools: the way of writing calls, see ``ToolChat``.
    """

    def __init__(self, requests: Requests, tools: str = "auto") -> None:
        self._requests, self._tools = requests, tools

    @cached_property
    def format(self) -> ToolChat:
        """Raises TokenizerError when there is no tokenizer."""
        return ToolChat(self._requests.tokenizer, self._tools)

    def request(
        self, messages: Sequence[Message], use: ToolUse = NO_TOOLS, **options: Unpack[GenerationOptions]
    ) -> TextRequest:
        """A request for the turn after ``messages``. Its ``constraint`` is for the answer's text, beside calls.

        A grammar holds calls to the schemas of the tools. Where llguidance, which follows it, is not installed, there is none
        unless a call has to come.

        Raises:
            ChatTemplateError, InvalidRequestError: see ``ToolChat.prompt``; a tool is named whose schema is refused.
            MissingDependencyError: a call has to come, or text that keeps a constraint, and llguidance is not installed.
            ContextLengthError, TokenizerError: as for ``Mixtral.generate``.
        """
        tokenizer = self._requests.tokenizer
        answer = options.pop("constraint", None)
        prompt = self.format.prompt(messages, use, answer)
        if not prompt.tokens:
            raise ChatTemplateError(
                "the checkpoint's chat template makes nothing of these messages; use generate instead"
            )
        options.setdefault("sampling", CHAT_SAMPLING)
        if (end := tokenizer.end_of_turn_text) is not None:
            given = options.get("stop", ())
            check_type("stop", given, (str, list, tuple), "text, or a list of texts")
            options["stop"] = [end, *([given] if isinstance(given, str) else given)]
        if prompt.constraint is not None:
            options["constraint"] = prompt.constraint
        parser = prompt.parser() if use.callable_tools else None
        try:
            return self._requests.request(Prompt(prompt.tokens), **options, is_answer=not prompt.begun, parser=parser)
        except MissingDependencyError:
            if answer is not None or use.mode == "required":
                raise
            options.pop("constraint", None)
            return self._requests.request(Prompt(prompt.tokens), **options, is_answer=not prompt.begun, parser=parser)
        except ConstraintError as error:
            raise prompt.explained(error) from None
