"""The tokenizer as GGUF has it: every piece with its score and type, the ids that start and end a text, the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import TokenizerError
from mlx_mixtral.reading import MAX_TOKENIZER_BYTES, names_like, read_file
from mlx_mixtral.tokenizer.sentencepiece import SentencePieceModel
from mlx_mixtral.tokenizer.sentencepiece_proto import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from mlx_mixtral.tokenizer.settings import read_settings, read_settings_file

__all__ = ["Vocabulary", "read_vocabulary"]


@dataclass(frozen=True)
class Vocabulary:
    """Lists have one entry a token id; ``templates`` are jinja sources by name ("default", "tool_use")."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    bos: int | None
    eos: int | None
    unknown: int | None
    add_bos: bool
    add_eos: bool
    templates: Mapping[str, str]


def read_vocabulary(folder: Path, config: MixtralConfig) -> Vocabulary:
    """Read ``tokenizer.model`` and the JSON files beside it.

    Raises:
        TokenizerError: there is no SentencePiece model, it is broken, or it has more pieces than the model's vocabulary.
    """
    found = names_like(folder, "tokenizer.model*")
    if not found:
        raise TokenizerError(
            f"{folder} has no tokenizer.model, and a GGUF file needs one; put the SentencePiece model of this checkpoint there"
        )
    settings = read_settings(folder)
    special = [token.content for token in settings.added.values() if token.special]
    data = read_file(found[0], MAX_TOKENIZER_BYTES, TokenizerError)
    model = SentencePieceModel(data, special, source=str(found[0]))
    pieces, size = model.processor, config.vocab_size
    if model.size > size:
        raise TokenizerError(
            f"{found[0]} has {model.size} pieces, but the model's vocab_size is {size}: it belongs to another model"
        )
    tokens = [pieces.id_to_piece(i) for i in range(model.size)] + [f"[PAD{i}]" for i in range(model.size, size)]
    scores = [pieces.get_score(i) for i in range(model.size)] + [-10000.0] * (size - model.size)
    types = [_type(model, i) for i in range(model.size)] + [UNUSED] * (size - model.size)
    for token_id, token in settings.added.items():
        # The model's own pieces keep their kind; what the files add lies beyond them.
        if model.size <= token_id < size:
            tokens[token_id], scores[token_id] = token.content, -1000.0
            types[token_id] = CONTROL if token.special else USER_DEFINED
    by_content = {content: token_id for token_id, content in reversed(list(enumerate(tokens)))}
    stop = config.eos_token_ids[0] if config.eos_token_ids else None
    return Vocabulary(
        tokens,
        scores,
        types,
        bos=_first(by_content.get(settings.bos or ""), pieces.bos_id(), config.bos_token_id),
        eos=_first(by_content.get(settings.eos or ""), stop, pieces.eos_id()),
        unknown=_first(pieces.unk_id()),
        add_bos=settings.add_bos is not False,
        add_eos=read_settings_file(folder / "tokenizer_config.json").get("add_eos_token") is True,
        templates=settings.templates,
    )


def _type(model: SentencePieceModel, token_id: int) -> int:
    pieces = model.processor
    if pieces.is_unknown(token_id):
        return UNKNOWN
    if pieces.is_control(token_id):
        return CONTROL
    if pieces.is_byte(token_id):
        return BYTE
    return UNUSED if pieces.is_unused(token_id) else NORMAL


def _first(*candidates: int | None) -> int | None:
    return next((i for i in candidates if i is not None and i >= 0), None)
