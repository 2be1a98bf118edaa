"""Texts as token ids, and the windows in which a model reads them: every token but BOS is predicted exactly once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from mlx_mixtral.arguments import check_integer, check_type
from mlx_mixtral.errors import ContextLengthError, InvalidRequestError
from mlx_mixtral.evaluation.texts import Text
from mlx_mixtral.tokenizer import Tokenizer

__all__ = [
    "DEFAULT_WINDOW",
    "Corpus",
    "Passage",
    "TextWindow",
    "TokenProgress",
    "check_window",
    "encode_texts",
    "vocabulary_sha256",
]

DEFAULT_WINDOW = 2048
MIN_TOKENS = 2

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Passage:
    """One text in tokens.

    Args:
        ids: int32 ``[n + 1]``: BOS where the tokenizer has one, and the text's tokens; all but the first are predicted.
        nbytes: UTF-8 bytes of what is predicted; without a BOS those of the first token are left out.
    """

    text: Text
    ids: Ids
    nbytes: int

    @property
    def tokens(self) -> int:
        """How many are predicted."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class TextWindow:
    """A stretch of a passage that the model reads at once.

    It reads ``ids[start:stop]`` and predicts ``ids[first]`` to ``ids[stop]``; what comes before ``first`` is context only.
    """

    passage: int
    start: int
    stop: int
    first: int

    @property
    def length(self) -> int:
        """Tokens read."""
        return self.stop - self.start

    @property
    def tokens(self) -> int:
        """Tokens predicted."""
        return self.stop - self.first + 1


@dataclass(frozen=True)
class TokenProgress:
    """How far a run over texts is, in tokens."""

    done_tokens: int
    total_tokens: int


@dataclass(frozen=True, eq=False)
class Corpus:
    """Passages one after the other. Token j of a passage, j from 1, has place ``offsets[passage] + j - 1`` among all.

    Args:
        vocabulary: sha256 of the tokenizer's pieces.
        sha256: of the token ids of every passage.
    """

    passages: tuple[Passage, ...]
    vocabulary: str
    sha256: str

    @property
    def offsets(self) -> tuple[int, ...]:
        """Place of each passage's first predicted token, and last the number of all."""
        return tuple(accumulate((passage.tokens for passage in self.passages), initial=0))

    @property
    def tokens(self) -> int:
        """How many are predicted."""
        return sum(passage.tokens for passage in self.passages)

    @property
    def domains(self) -> dict[str, list[int]]:
        """Numbers of the passages of each domain, in the order domains first come."""
        return _grouped(passage.text.domain for passage in self.passages)

    @property
    def files(self) -> dict[str, list[int]]:
        """The same of each file: a JSONL file has many passages."""
        return _grouped(passage.text.file for passage in self.passages)

    def windows(self, window: int, stride: int) -> list[TextWindow]:
        """Windows of ``window`` tokens that begin ``stride`` apart, those of one passage in order.

        With stride = window, window i predicts tokens iW + 1 to iW + W from token iW on. With less, each window predicts only
        what the one before it has not: every token but the first W sees at least window - stride tokens.
        """
        found = []
        for index, passage in enumerate(self.passages):
            done = 0
            for start in range(0, passage.tokens, stride):
                stop = min(start + window, passage.tokens)
                found.append(TextWindow(index, start, stop, done + 1))
                if (done := stop) == passage.tokens:
                    break
        return found

    def contexts(self, windows: Sequence[TextWindow]) -> npt.NDArray[np.int64]:
        """``[tokens]``: how many tokens each is predicted from."""
        found, offsets = np.zeros(self.tokens, np.int64), self.offsets
        for window in windows:
            places = slice(offsets[window.passage] + window.first - 1, offsets[window.passage] + window.stop)
            found[places] = np.arange(window.first, window.stop + 1) - window.start
        return found


def _grouped(names: Iterable[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        found.setdefault(name, []).append(index)
    return found


def encode_texts(tokenizer: Tokenizer, texts: Sequence[Text]) -> Corpus:
    """Encode every text once, with BOS where the tokenizer has one.

    Raises:
        InvalidRequestError: no texts, or one of fewer than two tokens.
        TokenizerError: a text that cannot be encoded.
    """
    check_type("texts", texts, (list, tuple), "a list of texts, as read_texts gives them")
    if not texts:
        raise InvalidRequestError("no text was given; name at least one file or folder")
    passages, digest = [], hashlib.sha256()
    has_bos = bool(tokenizer.encode(""))
    for text in texts:
        check_type("a text", text, Text, "a Text, as read_texts gives them")
        ids = np.array(tokenizer.encode(text.text), np.int32)
        if (own := len(ids) - has_bos) < MIN_TOKENS:
            raise InvalidRequestError(
                f"text {text.name} of domain {text.domain!r} has {own or 'no'} token{'s' * (own != 1)}; "
                f"at least {MIN_TOKENS} are needed"
            )
        nbytes = text.nbytes if has_bos else text.nbytes - len(tokenizer.decode([int(ids[0])]).encode("utf-8"))
        passages.append(Passage(text, ids, nbytes))
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.astype("<i4").tobytes())
    return Corpus(tuple(passages), vocabulary_sha256(tokenizer), digest.hexdigest())


def vocabulary_sha256(tokenizer: Tokenizer) -> str:
    """sha256 of all pieces in order: two models whose distributions can be compared have the same."""
    digest = hashlib.sha256()
    for token_id in range(tokenizer.vocab_size):
        piece = tokenizer.id_to_piece(token_id).encode("utf-8", "surrogatepass")
        digest.update(len(piece).to_bytes(4, "little") + piece)
    return digest.hexdigest()


def check_window(window: int | None, stride: int | None, limit: int, reserved: int | None = None) -> tuple[int, int]:
    """Window and stride in tokens, with their defaults: ``limit`` or 2048, whichever is less, and no overlap.

    Args:
        limit: tokens of context the model has.
        reserved: tokens a memory budget holds KV cache for; all of them when None.

    Raises:
        InvalidRequestError, ContextLengthError: out of range.
    """
    for name, value in (("window", window), ("stride", stride)):
        if value is not None:
            check_integer(name, value, 1, wanted="a number of tokens, at least 1")
    room = limit if reserved is None else min(limit, reserved)
    size = min(room, DEFAULT_WINDOW) if window is None else window
    if size > limit:
        raise ContextLengthError(f"window is {size} tokens; the model's context holds {limit}")
    if size > room:
        raise ContextLengthError(
            f"window is {size} tokens; the memory budget holds a KV cache for {room}: reserve more with --context or context="
        )
    if stride is not None and stride > size:
        raise InvalidRequestError(f"stride is {stride} tokens, more than the window's {size}: tokens would be left out")
    return size, stride or size
