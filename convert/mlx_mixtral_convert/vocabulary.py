"""Whether the tokenizer beside a model belongs to it, before hours of work on a pair that cannot run."""

from __future__ import annotations

import json
from collections.abc import Mapping

from mlx_mixtral.errors import TokenizerError
from mlx_mixtral.tokenizer.spm_tokenizer import SentencePieceModel

__all__ = ["check_vocabulary"]


def check_vocabulary(files: Mapping[str, bytes], vocab_size: int) -> None:
    """Raise TokenizerError if a tokenizer among ``files`` (by name) has more pieces than the model has embeddings.

    Fewer are fine: models pad their embeddings. A file that cannot be read is not judged here.
    """
    for name, data in files.items():
        if name.startswith("tokenizer.model"):
            pieces = _sentencepieces(name, data)
        elif name == "tokenizer.json":
            pieces = _json_pieces(data)
        else:
            continue
        if pieces > vocab_size:
            raise TokenizerError(
                f"{name} has {pieces} pieces, but the model's vocab_size is {vocab_size}: they do not belong together"
            )


def _sentencepieces(name: str, data: bytes) -> int:
    try:
        return SentencePieceModel(data, (), source=name).size
    except TokenizerError:
        return 0


def _json_pieces(data: bytes) -> int:
    """Pieces of the model proper: the runtime leaves added tokens out that have no embedding."""
    try:
        vocabulary = json.loads(data)["model"]["vocab"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return len(vocabulary) if isinstance(vocabulary, dict | list) else 0
