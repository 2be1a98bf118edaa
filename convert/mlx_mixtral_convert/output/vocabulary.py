"""Whether the tokenizer beside a model belongs to it, before hours of work on a pair that cannot run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlx_mixtral.config.mixtral import MixtralConfig, stop_ids
from mlx_mixtral.errors import CheckpointError, MissingDependencyError, TokenizerError
from mlx_mixtral.reading import parse_json
from mlx_mixtral.tokenizer.agreement import disagreement
from mlx_mixtral.tokenizer.sentencepiece import SentencePieceModel
from mlx_mixtral.tokenizer.settings import Settings, read_settings

__all__ = ["check_stop_ids", "check_vocabulary", "tokenizer_notes"]

_OBJECTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def check_vocabulary(files: Mapping[str, bytes], vocab_size: int) -> None:
    """Raise TokenizerError if a tokenizer among ``files`` (by name) has pieces that the model has no embeddings for.

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
                f"{name} has {pieces} pieces, but the model's vocab_size is {vocab_size}: it belongs to another model; "
                "put the tokenizer of this one into the folder"
            )


def check_stop_ids(files: Mapping[str, bytes], config: MixtralConfig) -> None:
    """Raise ConfigError or CheckpointError for a ``generation_config.json`` among ``files`` that would keep the result from
    loading."""
    name = "generation_config.json"
    if name in files:
        stop_ids(parse_json(name, files[name]), name, config.vocab_size)


def tokenizer_notes(files: Mapping[str, bytes]) -> tuple[str, ...]:
    """What to say about a tokenizer among ``files`` that is absent or cannot be used; nothing about one that can."""
    models = [name for name in files if name.startswith("tokenizer.model")]
    if not models and "tokenizer.json" not in files:
        return ("there is no tokenizer; the result will accept only token ids",)
    objects = [name for name in _OBJECTS if name in files]
    try:
        for name in objects:
            _check_object(name, files[name], needs_model=name == "tokenizer.json" and not models)
        for name in models[:1]:
            settings = read_settings(Path(), held={name: files[name] for name in objects})
            model = SentencePieceModel(files[name], settings, source=name)
            problem = disagreement(model.pieces(), settings)
            return () if problem is None else (problem,)
    except MissingDependencyError:
        return ()  # this machine's fault, not the tokenizer's
    except TokenizerError as error:
        return (f"the tokenizer cannot be used: {error}; the result will accept only token ids",)
    return ()


def _check_object(name: str, data: bytes, *, needs_model: bool) -> None:
    try:
        entries = parse_json(name, data)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
    if needs_model and not isinstance(entries.get("model"), dict):
        raise TokenizerError(f"{name} does not have the expected contents")


def _sentencepieces(name: str, data: bytes) -> int:
    try:
        return SentencePieceModel(data, Settings(), source=name).size
    except TokenizerError:
        return 0


def _json_pieces(data: bytes) -> int:
    """Pieces of the model proper up to the highest id: the runtime leaves added tokens out that have no embedding."""
    try:
        vocabulary = parse_json("tokenizer.json", data)["model"]["vocab"]
    except (CheckpointError, KeyError, TypeError):
        return 0
    if isinstance(vocabulary, dict):
        return max((i + 1 for i in vocabulary.values() if isinstance(i, int)), default=0)
    return len(vocabulary) if isinstance(vocabulary, list) else 0
