"""From texts to the token sequences that complete them, wherever tokens are cut."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_mixtral.tokenizer.base import Tokenizer

__all__ = ["completing_sequences"]

MAX_TAIL_TOKENS = 20
# What stands before a text so that it is encoded as in the middle of one: SentencePiece begins texts with a space.
ANCHORS = ("\n", "a", "1", ".")


def completing_sequences(tokenizer: Tokenizer, texts: Sequence[str]) -> frozenset[tuple[int, ...]]:
    """Every sequence of token ids with which one of ``texts`` is complete.

    A token that holds a text is one by itself. A token that ends with the beginning of a text is one together with the tokens
    of the rest of it, ``MAX_TAIL_TOKENS`` at most.
    """
    found: set[tuple[int, ...]] = set()
    wanted = [text.encode() for text in dict.fromkeys(texts)]
    tails: dict[str, tuple[int, ...]] = {}
    for token in range(tokenizer.vocab_size):
        shown = tokenizer.token_bytes(token) or tokenizer.id_to_piece(token).encode()
        for data in wanted:
            if data in shown:
                found.add((token,))
                continue
            for length in range(1, min(len(data) - 1, len(shown)) + 1):
                if shown.endswith(data[:length]):
                    rest = data[length:].decode(errors="ignore")
                    if rest.encode() != data[length:]:
                        continue  # cut within a character
                    if rest not in tails:
                        tails[rest] = tuple(_within_text(tokenizer, rest)[:MAX_TAIL_TOKENS])
                    found.add((token, *tails[rest]))
    return frozenset(found)


def _within_text(tokenizer: Tokenizer, text: str) -> list[int]:
    for anchor in ANCHORS:
        before, whole = tokenizer.encode_plain(anchor), tokenizer.encode_plain(anchor + text)
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return tokenizer.encode_plain(text, first=False)
