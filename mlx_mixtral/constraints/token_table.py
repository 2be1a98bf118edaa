"""A tokenizer's vocabulary as a grammar sees it: the bytes of every token, in a table made once."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mlx_mixtral.constraints.base import mask_words
from mlx_mixtral.errors import MissingDependencyError
from mlx_mixtral.tokenizer import Tokenizer
from mlx_mixtral.tokenizer.streaming import SPACE

if TYPE_CHECKING:
    from llguidance import LLTokenizer

__all__ = ["TokenTable", "check_package", "grammar_bytes"]

MARKER = b"\xff"
"""Begins what llguidance takes for a token without text: no UTF-8 has this byte."""


def check_package() -> None:
    """Raise MissingDependencyError where llguidance is not installed."""
    try:
        importlib.import_module("llguidance")
    except ImportError as error:
        raise MissingDependencyError(
            "a constraint needs the llguidance package: `pip install 'mlx-mixtral[constraints]'`"
        ) from error


def grammar_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """What a token adds to a text; ``MARKER`` and the name of one that stands for no text, b"" where there is no token.

    The unknown token is such a one: what it shows is a sign for text that was lost, and no text.
    """
    if token >= tokenizer.vocab_size:
        return b""
    shown = tokenizer.surface(token)
    if shown is None or token == tokenizer.unk_token_id:
        name = tokenizer.id_to_piece(token)
        is_there = tokenizer.special_id(name) == token or token in (*tokenizer.eos_token_ids, tokenizer.unk_token_id)
        return MARKER + name.encode() if is_there else b""
    return shown if isinstance(shown, bytes) else shown.replace(SPACE, " ").encode()


class TokenTable:
    """The tokens a model draws from. Making one takes a tenth of a second for 32,000 tokens; keep it with the model.

    Args:
        tokenizer: the checkpoint's.
        vocab_size: tokens of the model's logits, the tokenizer's when left out. Beyond the tokenizer's own nothing is allowed.
        eos_token_ids: all that end a text, beside the tokenizer's own.

    Raises:
        MissingDependencyError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None, eos_token_ids: Iterable[int] = ()) -> None:
        check_package()
        from llguidance import LLTokenizer, TokenizerWrapper

        self.size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self.words = mask_words(self.size)
        self.tokens = [grammar_bytes(tokenizer, token) for token in range(self.size)]
        ends = {*tokenizer.eos_token_ids, *eos_token_ids}
        self.eos_token_ids = frozenset(token for token in ends if token < self.size)
        for token in self.eos_token_ids:  # never part of a text, whatever they show
            if not self.tokens[token].startswith(MARKER):
                self.tokens[token] = MARKER + b"<end of text %d>" % token
        # A text that may go on or end is ended by max_tokens where no token ends it; llguidance wants one all the same.
        table = [*self.tokens] if self.eos_token_ids else [*self.tokens, MARKER + b"<end of text>"]
        self.end_token = min(self.eos_token_ids, default=self.size)
        source = _Source(table, self.end_token, tokenizer.bos_token_id)
        self.table: LLTokenizer = LLTokenizer(
            TokenizerWrapper(source), n_vocab=len(table), eos_token=sorted(self.eos_token_ids) or [self.end_token]
        )
        self.table_words = mask_words(len(table))
        self.strips_first_space = _strips_first_space(tokenizer)

    @cached_property
    def goes_on(self) -> npt.NDArray[np.bool_]:
        """Which tokens are there and do not end a text, ``[V]``: control tokens that a grammar names are among them."""
        return np.array([bool(data) and token not in self.eos_token_ids for token, data in enumerate(self.tokens)])

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of every token, ``[V]``."""
        return np.array([len(data) for data in self.tokens], np.int64)

    @cached_property
    def first_bytes(self) -> npt.NDArray[np.int64]:
        """The first byte of every token, ``[V]``; 255 for one without text."""
        return np.array([data[0] if data else 255 for data in self.tokens], np.int64)


class _Source:
    """A vocabulary in the shape that llguidance's wrapper asks for."""

    def __init__(self, tokens: Sequence[bytes], end_token: int, bos_token_id: int | None) -> None:
        self.tokens, self.eos_token_id, self.bos_token_id = tokens, end_token, bos_token_id
        self.special_token_ids = [token for token, data in enumerate(tokens) if data.startswith(MARKER)]
        self._ids = {data: token for token, data in reversed(list(enumerate(tokens))) if not data.startswith(MARKER)}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of a text in the middle of another, by longest match: a tokenizer would put a space before a first word.

        Nothing is forced by them: which tokens spell a text is the model's choice wherever it has one.
        """
        data = text.encode() if isinstance(text, str) else text
        ids = []
        while data:
            sizes = range(min(self._longest, len(data)), 0, -1)
            size = next((size for size in sizes if data[:size] in self._ids), 0)
            if not size:
                break
            ids.append(self._ids[data[:size]])
            data = data[size:]
        return ids


def _strips_first_space(tokenizer: Tokenizer) -> bool:
    """Whether a text's first space is taken off where it is shown from its beginning, as SentencePiece does."""
    for token in range(tokenizer.vocab_size):
        shown = tokenizer.surface(token)
        if isinstance(shown, str) and shown.startswith(SPACE) and len(shown) > 1:
            return tokenizer.decode([token]) != tokenizer.decode([token], continues=True)
    return False
