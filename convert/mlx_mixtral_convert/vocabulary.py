"""Whether the tokenizer beside a model belongs to it, before hours of work on a pair that cannot run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mlx_mixtral.errors import MissingDependencyError, MixtralError, TokenizerError
from mlx_mixtral.tokenizer import load_tokenizer
from mlx_mixtral.tokenizer.spm_tokenizer import SentencePieceModel

__all__ = ["check_vocabulary", "tokenizer_notes"]


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


def tokenizer_notes(files: Mapping[str, bytes], vocab_size: int) -> tuple[str, ...]:
    """What to say about a tokenizer among ``files`` that is absent or cannot be used; nothing about one that can.

    The files are tried as the result will have them, in a folder of their own: a source need not have them as files.
    """
    names = [file for file in files if file.startswith(("tokenizer", "special_", "added_", "chat_template"))]
    if not any(file == "tokenizer.json" or file.startswith("tokenizer.model") for file in names):
        return ("there is no tokenizer; the result will take token ids only",)
    with tempfile.TemporaryDirectory(prefix="mlx-mixtral-tokenizer-") as name:
        folder = Path(name)
        try:
            for file in names:
                (folder / file).write_bytes(files[file])
            load_tokenizer(folder, vocab_size=vocab_size)
        except (MissingDependencyError, OSError):
            return ()  # this machine's fault, not the tokenizer's
        except MixtralError as error:
            reason = str(error).replace(f"{folder}/", "").replace(str(folder), "the source")
            return (f"the tokenizer cannot be used: {reason}; the result will take token ids only",)
    return ()


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
