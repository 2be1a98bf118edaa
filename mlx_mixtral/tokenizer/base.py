"""What every tokenizer does, over what its kind can do: encode plain text, name a piece, show a token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from mlx_mixtral.arguments import check_type
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.tokenizer.markers import AddedToken, Markers
from mlx_mixtral.tokenizer.streaming import SPACE, StreamingDecoder, Surface

__all__ = ["ChatFormat", "Message", "Tokenizer"]

Message = Mapping[str, Any]
"""One chat message as OpenAI and Hugging Face write it: `{"role": …, "content": …}`, a few keys more for tools."""


class ChatFormat(Protocol):
    """Writes a conversation as the token ids the model was trained on.

    A native one writes ids, segment by segment; the others render a text and read its markers.
    """

    name: str
    is_native: bool

    @property
    def source(self) -> str:
        """What tells this format apart: a template's text, or the name of a native one."""

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Message] | None
    ) -> list[int]: ...

    def render(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Message] | None = None
    ) -> str: ...

    def end_of_turn(self, tokenizer: Tokenizer) -> int | str | None:
        """The token after an answer; text that looks like one and is none; None where there is neither."""


class Tokenizer(ABC):
    """A model's tokenizer. `load_tokenizer` makes one.

    Attributes:
        vocab_size: Number of ids: all valid ids are below it.
        bos_token_id: Id that begins a sequence, or None.
        eos_token_id: Id that ends an assistant's turn, or None.
        eos_token_ids: Every id at which generation stops: those the files declare, and the chat format's end of a turn.
        unk_token_id: Id that stands for text the vocabulary cannot spell, or None.
        adds_bos: Whether `encode` puts BOS in front of a text.
        chat_format: "mistral-v1", "mistral-v3", "template" (the checkpoint's own jinja), a family such as "chatml", or "none".
        chat_origin: Where the format is from: a file's name, "control tokens", "a guess", or what was given.
        chat_note: What to tell who chats when the checkpoint does not say its format; else "".
        notes: What is wrong with the files without keeping anything from working, a sentence each.
    """

    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    eos_token_ids: frozenset[int]
    unk_token_id: int | None = None
    chat_origin: str = ""
    chat_note: str = ""
    notes: tuple[str, ...] = ()

    def __init__(self, markers: Markers, chat: ChatFormat, *, adds_bos: bool) -> None:
        self.markers = markers
        self._chat = chat
        self.adds_bos = adds_bos
        self._surfaces: dict[int, Surface] = {}
        self._by_id: dict[int, AddedToken] = {token.token_id: token for token in markers.by_content.values()}

    @property
    def chat_format(self) -> str:
        return self._chat.name

    @property
    def chat_is_native(self) -> bool:
        """Whether the chat format writes ids, and not a text with markers."""
        return self._chat.is_native

    @property
    def end_of_turn(self) -> int | None:
        """Id of the marker that ends an answer in the chat format, None where text does."""
        return self._end if isinstance(self._end, int) else None

    @property
    def end_of_turn_text(self) -> str | None:
        """The marker that ends an answer where the vocabulary has no token for it."""
        return self._end if isinstance(self._end, str) else None

    @cached_property
    def _end(self) -> int | str | None:
        return self._chat.end_of_turn(self)

    def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: Plain text. What looks like a marker in it (`</s>`, `[INST]`, `<|im_end|>`) stays text.
            bos: Put the BOS id first (where the model has one and its tokenizer uses it).
            special: Read markers in the text as the control and added tokens they name, and a BOS it begins with as the
                one that stands first. For trusted text only.

        Raises:
            InvalidRequestError: `text` is not a string, or holds a lone surrogate, which no UTF-8 text can.
        """
        check_text(text)
        ids = [self.bos_token_id] if bos and self.adds_bos and self.bos_token_id is not None else []
        if not special:
            return ids + self.encode_plain(text)
        parts = list(self.markers.split(text))
        begun = bool(parts) and isinstance(parts[0], AddedToken) and [parts[0].token_id] == ids
        return self.encode_parts(parts) if begun else ids + self.encode_parts(parts)

    def encode_parts(self, parts: Sequence[str | AddedToken]) -> list[int]:
        """Ids of plain texts and markers one after the other, as `Markers.split` gives them; no BOS."""
        ids: list[int] = []
        for index, part in enumerate(parts):
            if isinstance(part, AddedToken):
                ids.append(part.token_id)
            else:
                ids.extend(self.encode_plain(part, first=index == 0))
        return ids

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Message] | None = None) -> list[int]:
        """Token ids from which the assistant's next turn is generated.

        Args:
            messages: The conversation so far: dicts with `role` (system, user, assistant, tool) and `content`.
            tools: Functions the model may call, in OpenAI's format.

        Raises:
            ChatTemplateError: The messages are no conversation this format can write, or the checkpoint has none.
            InvalidRequestError: A text holds a lone surrogate.
        """
        return self._chat.encode(self, messages, tools)

    def render_chat(self, messages: Sequence[Message], tools: Sequence[Message] | None = None) -> str:
        """What `encode_chat` gives, as text with its markers spelled out: for showing, and for naming a prompt.

        Raises:
            ChatTemplateError, InvalidRequestError: As for `encode_chat`.
        """
        return self._chat.render(self, messages, tools)

    @property
    def chat_source(self) -> str:
        """What tells the chat format apart: the text of the checkpoint's template, or the name of a native format."""
        return self._chat.source

    def decode(self, ids: Sequence[int], *, continues: bool = False) -> str:
        """Text of token ids; control tokens show nothing, bytes that are no UTF-8 show U+FFFD.

        Args:
            ids: Token ids.
            continues: The text goes on from earlier text, so a space at its start is kept.

        Raises:
            InvalidRequestError: An id is outside the vocabulary.
        """
        check_type("ids", ids, Iterable, "a list of token ids")
        decoder = self.streaming_decoder(continues=continues)
        return "".join([decoder.add(token_id) for token_id in ids]) + decoder.finish()

    @abstractmethod
    def streaming_decoder(self, *, continues: bool = False) -> StreamingDecoder:
        """A fresh decoder for one stream of ids; `continues` as in `decode`."""

    @abstractmethod
    def encode_plain(self, text: str, *, first: bool = True) -> list[int]:
        """Ids of a text in which nothing is a marker; `first` is False after a marker of the same rendered text."""

    @abstractmethod
    def _model_piece(self, token_id: int) -> str:
        """The piece the tokenizer's model has at an id."""

    @abstractmethod
    def _model_surface(self, token_id: int) -> Surface:
        """What the model's piece at an id shows."""

    def id_to_piece(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token: "▁the", "<0x0A>", "[INST]".

        Raises:
            InvalidRequestError: The id is outside the vocabulary.
        """
        self._check_id(token_id)
        added = self._by_id.get(token_id)
        return added.content if added else self._model_piece(token_id)

    def special_id(self, content: str) -> int | None:
        """Id of a control or added token by its spelling, or None when the vocabulary has none."""
        token = self.markers.by_content.get(content)
        return token.token_id if token else None

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 a token stands for in the middle of a text, b"" for a control token.

        Raises:
            InvalidRequestError: The id is outside the vocabulary.
        """
        shown = self.surface(token_id)
        return shown if isinstance(shown, bytes) else self.decode([token_id], continues=True).encode("utf-8")

    def surface(self, token_id: int) -> Surface:
        """What an id shows: text, raw bytes, or None for a token that is never shown.

        Raises:
            InvalidRequestError: The id is outside the vocabulary.
        """
        try:
            return self._surfaces[token_id]
        except (KeyError, TypeError):
            self._check_id(token_id)
        added = self._by_id.get(token_id)
        if added is None:
            shown = self._model_surface(token_id)
        elif added.special or token_id in self.eos_token_ids:
            shown = None
        else:
            shown = added.content.replace(SPACE, " ")
        self._surfaces[token_id] = shown
        return shown

    def _check_id(self, token_id: int) -> None:
        if not hasattr(token_id, "__index__"):
            check_type("a token id", token_id, int, "an integer")
        if not 0 <= token_id < self.vocab_size:
            raise InvalidRequestError(
                f"token id {token_id} is outside the vocabulary of {self.vocab_size}; "
                f"valid ids are 0 to {self.vocab_size - 1}"
            )


def check_text(text: object) -> None:
    """Raise InvalidRequestError unless `text` is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise InvalidRequestError(f"text must be a str, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"text holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which is no text; "
            "decode the bytes it came from with errors='replace'"
        ) from None
