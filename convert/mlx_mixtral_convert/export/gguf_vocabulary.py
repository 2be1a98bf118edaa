"""The tokenizer as GGUF has it: every piece with its score and type, the ids that start and end a text, the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_mixtral.config.mixtral import MixtralConfig, stop_ids
from mlx_mixtral.errors import MissingDependencyError, TokenizerError
from mlx_mixtral.reading import MAX_TOKENIZER_BYTES, names_like, read_file
from mlx_mixtral.tokenizer import load_tokenizer
from mlx_mixtral.tokenizer.markers import AddedToken
from mlx_mixtral.tokenizer.sentencepiece import SentencePieceModel
from mlx_mixtral.tokenizer.sentencepiece_proto import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from mlx_mixtral.tokenizer.settings import read_settings, read_settings_file

__all__ = ["Vocabulary", "read_vocabulary"]


@dataclass(frozen=True)
class Vocabulary:
    """Lists have one entry a token id; ``templates`` are jinja sources by name ("default", "tool_use").

    ``eot`` and ``eom`` are the ends of a turn and of a message in GGUF, where generation stops as at ``eos``; ``lost_ends`` are
    further ids at which it should, and for which there are no keys.
    """

    tokens: list[str]
    scores: list[float]
    types: list[int]
    bos: int | None
    eos: int | None
    eot: int | None
    eom: int | None
    lost_ends: tuple[int, ...]
    pad: int | None
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
            f"{folder} has no tokenizer.model, which a GGUF file needs; put the SentencePiece model of this checkpoint there"
        )
    settings = read_settings(folder)
    data = read_file(found[0], MAX_TOKENIZER_BYTES, TokenizerError)
    model = SentencePieceModel(data, settings, source=str(found[0]))
    pieces, size = model.processor, config.vocab_size
    if model.size > size:
        raise TokenizerError(
            f"{found[0]} has {model.size} pieces, but the model's vocab_size is {size}: it belongs to another model; "
            "put the tokenizer of this one into the folder"
        )
    tokens = [pieces.id_to_piece(i) for i in range(model.size)] + [f"[PAD{i}]" for i in range(model.size, size)]
    scores = [pieces.get_score(i) for i in range(model.size)] + [-10000.0] * (size - model.size)
    types = [_type(model, i) for i in range(model.size)] + [UNUSED] * (size - model.size)
    for token_id, token in settings.added.items():
        if token_id < size:
            types[token_id] = _declared_type(model, token_id, token)
            scores[token_id] = scores[token_id] if token_id < model.size else -1000.0
            tokens[token_id] = token.content
    _make_unique(tokens, types, settings.added)
    by_content = {content: token_id for token_id, content in reversed(list(enumerate(tokens)))}
    name = "generation_config.json"
    stops = (*config.eos_token_ids, *stop_ids(read_settings_file(folder / name), name, size))
    eos = _first(by_content.get(settings.eos or ""), *stops, pieces.eos_id())
    eot, eom, lost = _other_ends(eos, _end_of_turn(folder, config), [*stops, pieces.eos_id()])
    return Vocabulary(
        tokens,
        scores,
        types,
        bos=_first(by_content.get(settings.bos or ""), pieces.bos_id(), config.bos_token_id),
        eos=eos,
        eot=eot,
        eom=eom,
        lost_ends=lost,
        pad=by_content.get(settings.pad or ""),
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


def _declared_type(model: SentencePieceModel, token_id: int, token: AddedToken) -> int:
    """A token that a file declares is CONTROL or USER_DEFINED; a piece that it only repeats keeps a kind of its own."""
    declared = CONTROL if token.special else USER_DEFINED
    if token_id >= model.size:
        return declared
    own = _type(model, token_id)
    if own == UNKNOWN:
        return own
    repeated = model.processor.id_to_piece(token_id) == token.content
    return own if repeated and (own == BYTE or (own == CONTROL and token_id not in model.retyped)) else declared


def _make_unique(tokens: list[str], types: list[int], added: Mapping[int, AddedToken]) -> None:
    """Of pieces with one spelling the declared one stays: readers of GGUF take no two."""
    kept = {token.content: token_id for token_id, token in added.items()}
    for token_id, content in enumerate(tokens):
        if kept.setdefault(content, token_id) != token_id:
            tokens[token_id], types[token_id] = f"[PAD{token_id}]", UNUSED


def _other_ends(
    eos: int | None, end_of_turn: int | None, stops: Sequence[int]
) -> tuple[int | None, int | None, tuple[int, ...]]:
    """What stops beside EOS, in the two keys there are: a turn's end in its own, others where there is room."""
    eot = None if end_of_turn == eos else end_of_turn
    others = [token for token in dict.fromkeys(stops) if token >= 0 and token not in (eos, eot)]
    eom = others.pop(0) if others else None
    eot = others.pop(0) if others and eot is None else eot
    return eot, eom, tuple(others)


def _end_of_turn(folder: Path, config: MixtralConfig) -> int | None:
    """The marker that ends an answer in the checkpoint's chat format."""
    try:
        return load_tokenizer(folder, vocab_size=config.vocab_size).end_of_turn
    except (MissingDependencyError, TokenizerError):
        return None  # a template of another vocabulary


def _first(*candidates: int | None) -> int | None:
    return next((i for i in candidates if i is not None and i >= 0), None)
