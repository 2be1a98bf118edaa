"""Token ids to text, one id at a time, never half a character."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable

__all__ = ["SPACE", "ByteLevelDecoder", "PieceDecoder", "StreamingDecoder", "Surface"]

Surface = str | bytes | None
"""What a token shows: text (its spaces as SPACE), raw bytes that mean something only together, or nothing (control)."""

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's visible space."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class StreamingDecoder(ABC):
    """Turns a stream of token ids into text.

    All that `add` returned, then `finish`, joined, is exactly what `Tokenizer.decode` gives for the same ids. A
    character spread over several byte tokens is held back until it is whole or known to be broken. The work per token
    does not grow with the length of the stream.
    """

    @abstractmethod
    def add(self, token_id: int) -> str:
        """Take one id; return the text that became certain with it (often "", sometimes several characters).

        Raises:
            InvalidRequestError: The id is outside the vocabulary.
        """

    @abstractmethod
    def finish(self) -> str:
        """Return what was held back, with U+FFFD for bytes that never became a character. Call it once, at the end."""


class PieceDecoder(StreamingDecoder):
    """SentencePiece's rules, as its `DecodeIds` has them.

    Byte pieces next to each other are read as UTF-8, each byte that fits no character giving one U+FFFD; any other
    piece, a control piece too, ends such a run. The space that the dummy prefix put in front is taken off.
    Source: `SentencePieceProcessor::Decode`, github.com/google/sentencepiece.

    Args:
        surface: What an id shows; raises for an id outside the vocabulary.
        strip_first_space: Whether encoding puts a dummy prefix there to take off.
        strip_all_spaces: Whether every leading space piece goes (`remove_extra_whitespaces`), not the first only.
    """

    def __init__(
        self, surface: Callable[[int], Surface], *, strip_first_space: bool, strip_all_spaces: bool = False
    ) -> None:
        self._surface = surface
        self._at_start = strip_first_space
        self._strip_all = strip_all_spaces
        self._held = b""

    def add(self, token_id: int) -> str:
        shown = self._surface(token_id)
        if isinstance(shown, bytes):
            text = self._take_bytes(shown)
            # Held bytes count as text already: they will give at least one character before any later piece.
            self._at_start = False
            return text
        text = self.finish()
        if shown is None:
            return text
        if self._at_start and shown.startswith(SPACE):
            shown = shown[1:]
            self._at_start = self._strip_all and not shown
        elif shown:
            self._at_start = False
        return text + shown.replace(SPACE, " ")

    def finish(self) -> str:
        # What is held is the start of one character, and no byte of it can begin another.
        text = _REPLACEMENT * len(self._held)
        self._held = b""
        return text

    def _take_bytes(self, data: bytes) -> str:
        held = self._held + data
        text = ""
        while held:
            try:
                text += held.decode("utf-8")
                held = b""
            except UnicodeDecodeError as error:
                text += held[: error.start].decode("utf-8")
                held = held[error.start :]
                if error.reason == "unexpected end of data":
                    break
                text += _REPLACEMENT
                held = held[1:]
        self._held = held
        return text


class ByteLevelDecoder(StreamingDecoder):
    """Byte-level BPE: every token is bytes, and the bytes of all visible tokens together are the text's UTF-8.

    A broken sequence gives one U+FFFD per maximal part, as Unicode recommends and `tokenizers` does.
    """

    def __init__(self, surface: Callable[[int], Surface]) -> None:
        self._surface = surface
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        shown = self._surface(token_id)
        if shown is None:
            return ""
        return self._utf8.decode(shown.encode("utf-8") if isinstance(shown, str) else shown)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)
