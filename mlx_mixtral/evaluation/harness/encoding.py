"""Requests of lm_eval as token ids, split where its Hugging Face backend splits them; BOS stands once, at the start.

Contexts and continuations are plain text, in which nothing is a control token. A context that ``render_chat`` made is
recognised by its text, and stands for the ids of the chat format: lm_eval hands prompts around as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mlx_mixtral.errors import ChatTemplateError, InvalidRequestError, TokenizerError
from mlx_mixtral.tokenizer import Tokenizer
from mlx_mixtral.tokenizer.base import Message

__all__ = ["Encoder", "Pair"]

SHOWN_CHARACTERS = 40


class Pair(NamedTuple):
    """A context, at least a token of it, and the continuation whose log-probability is asked for."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class _Chat(NamedTuple):
    """A rendered conversation and the start of the assistant's answer that was given with it."""

    text: str
    ids: tuple[int, ...]
    answer: str


class Encoder:
    """Encodes requests for one tokenizer.

    Raises:
        TokenizerError: it has neither BOS nor EOS, so nothing can stand before a text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if prefix is None:
            raise TokenizerError(
                "the tokenizer has neither BOS nor EOS, but a text needs a token before its first one; set "
                "bos_token in its configuration"
            )
        self.prefix_id = prefix
        self._bos = None if tokenizer.bos_token_id is None else tokenizer.id_to_piece(tokenizer.bos_token_id)
        self._chats: dict[str, _Chat] = {}

    def text(self, text: str) -> list[int]:
        """Ids of a text by itself, with no BOS."""
        return self.tokenizer.encode(text, bos=False)

    def prompt(self, context: str) -> list[int]:
        """Ids that a generation starts from; never none."""
        if (chat := self._chats.get(context)) is not None:
            return [*chat.ids, *self._answer(chat, chat.answer)]
        return self._whole(context) or [self.prefix_id]

    def pair(self, context: str, continuation: str) -> Pair:
        """Context and continuation, encoded together: blanks between them belong to the continuation.

        Raises:
            InvalidRequestError: a continuation without tokens.
        """
        before: list[int]
        if (chat := self._chats.get(context)) is not None:
            before, after = self._turn(chat, continuation)
        elif context:
            start, moved = _without_end_blanks(context, continuation)
            before = self._whole(start)
            after = self._whole(start + moved)[len(before) :]
        else:
            before, after = [], self.text(continuation)
        if not after:
            raise InvalidRequestError(
                f"the continuation {continuation[:SHOWN_CHARACTERS]!r} adds no token to its context "
                f"{context[-SHOWN_CHARACTERS:]!r}; a log-probability needs one"
            )
        return Pair(tuple(before) or (self.prefix_id,), tuple(after))

    def windows(self, text: str, size: int) -> list[Pair]:
        """A text cut so that every token is predicted once, the first from BOS, none from more than ``size`` tokens."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        rolling = get_rolling_token_windows(self.text(text), self.prefix_id, size, context_len=1)
        return [Pair(tuple(before), tuple(after)) for before, after in map(make_disjoint_window, rolling)]

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """A conversation as text, remembered with its ids. Without generation prompt the last message is left unfinished.

        A format that refuses a system prompt gets the conversation without it, as lm_eval's own backends do.

        Raises:
            ChatTemplateError: messages the format has no place for.
        """
        given, answer = list(messages), ""
        if not add_generation_prompt and given and given[-1].get("role") == "assistant":
            answer = str(given.pop().get("content") or "")
        try:
            text, ids = self.tokenizer.render_chat(given), self.tokenizer.encode_chat(given)
        except ChatTemplateError:
            kept = [message for message in given if message.get("role") != "system"]
            if len(kept) == len(given):
                raise
            text, ids = self.tokenizer.render_chat(kept), self.tokenizer.encode_chat(kept)
        shown = f"{text} {answer}" if answer and self._is_native else text + answer
        self._chats[shown] = _Chat(text, tuple(ids), answer)
        return shown

    @property
    def _is_native(self) -> bool:
        return self.tokenizer.chat_is_native

    def _whole(self, text: str) -> list[int]:
        if self._bos and text.startswith(self._bos):
            # A rendered conversation of an earlier run, which a cache of requests kept.
            return self._marked(text)
        return self.tokenizer.encode(text)

    def _turn(self, chat: _Chat, continuation: str) -> tuple[list[int], list[int]]:
        """A conversation and how its answer goes on."""
        if self._is_native:
            start, continuation = _without_end_blanks(chat.answer, continuation)
            begun = self._answer(chat, start)
            return [*chat.ids, *begun], self._answer(chat, start + continuation)[len(begun) :]
        text = chat.text + chat.answer
        start, continuation = _without_end_blanks(text, continuation)
        before, whole = self._marked(start), self._marked(start + continuation)
        after = whole[len(before) :]
        if self._marked(chat.text) != list(chat.ids):
            # Messages hold what looks like a marker, and is text: their ids are the safe ones, less the blanks that moved.
            ids = [*chat.ids, *self._answer(chat, chat.answer)]
            before = ids[: len(ids) - (len(self._marked(text)) - len(before))]
        return before, after

    def _answer(self, chat: _Chat, answer: str) -> list[int]:
        """Ids of the assistant's ``answer``, or of the start of it."""
        if not answer:
            return []
        if self._is_native:
            # A segment of its own, whose space in front SentencePiece brings.
            return self.text(answer.removeprefix(" "))
        return self._marked(chat.text + answer)[len(self._marked(chat.text)) :]

    def _marked(self, text: str) -> list[int]:
        """Ids of a text whose markers are control tokens."""
        return self.tokenizer.encode(text, bos=False, special=True)


def _without_end_blanks(context: str, continuation: str) -> tuple[str, str]:
    """Blanks at the end of a context go to the continuation: "Paris" is one token with the blank before it."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation
