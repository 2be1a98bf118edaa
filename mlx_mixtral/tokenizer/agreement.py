"""Whether a folder's `tokenizer.model` and `tokenizer.json` are one tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_mixtral.tokenizer.settings import Settings

__all__ = ["disagreement", "json_pieces"]


def disagreement(pieces: Sequence[str], settings: Settings) -> str | None:
    """How `tokenizer.json` contradicts a SentencePiece model, in a sentence that names the first id; None if it does not.

    Both are read with what the other files beside them declare. Added tokens that only one of them has are no
    contradiction: they are used with either.

    Args:
        pieces: The model's pieces.
        settings: What the files beside it say, `tokenizer.json` among them.
    """
    theirs = json_pieces(settings.fast)
    if not theirs:
        return None
    beside = {token_id: token.content for token_id, token in settings.beside.items()}
    added = dict(_added(settings.fast))
    ours = added | dict(enumerate(pieces)) | beside
    theirs |= beside | added
    different = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    if not different:
        return None
    first, more = different[0], len(different) - 1
    said = [f"{spelling!r}" if spelling is not None else "nothing" for spelling in (ours.get(first), theirs.get(first))]
    used = settings.added[first].content if first in settings.added else ours.get(first)
    return (
        f"tokenizer.model and tokenizer.json disagree: id {first} is {said[0]} in the first and {said[1]} in the second"
        f"{f' ({more} more differ)' if more else ''}; the {'first' if used == ours.get(first) else 'second'} is used: "
        "use --tokenizer model or --tokenizer json to choose"
    )


def json_pieces(fast: Mapping[str, Any]) -> dict[int, str]:
    """Pieces by id of the model in a `tokenizer.json`: an object of ids (BPE), or a list of pieces and scores (Unigram)."""
    model = fast.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        return {token_id: piece for piece, token_id in vocabulary.items() if isinstance(token_id, int)}
    entries = enumerate(vocabulary) if isinstance(vocabulary, list) else ()
    return {i: entry[0] for i, entry in entries if isinstance(entry, list) and entry and isinstance(entry[0], str)}


def _added(fast: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Added tokens, which `read_settings` has checked."""
    listed = fast.get("added_tokens")
    return [(token["id"], token["content"]) for token in listed] if isinstance(listed, list) else []
