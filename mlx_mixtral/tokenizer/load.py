"""Which tokenizer a folder holds, and which chat format goes with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mlx_mixtral.arguments import shown
from mlx_mixtral.errors import InvalidRequestError, TokenizerError
from mlx_mixtral.reading import MAX_TOKENIZER_BYTES, POINTER_FIX, is_pointer, is_there, names_like, read_file
from mlx_mixtral.tokenizer.agreement import disagreement, json_pieces
from mlx_mixtral.tokenizer.base import Tokenizer
from mlx_mixtral.tokenizer.chat.choice import ChatChoice, GivenTemplate, choose_chat_format
from mlx_mixtral.tokenizer.markers import NAMED_FORM, AddedToken, Markers
from mlx_mixtral.tokenizer.settings import Settings, read_settings

__all__ = ["TOKENIZER_KINDS", "check_kind", "load_tokenizer"]

TOKENIZER_KINDS = ("model", "json")
_KNOWN_NAMES = ("tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v3", "tokenizer.model.v2")


def load_tokenizer(
    folder: Path,
    *,
    vocab_size: int | None = None,
    eos_token_ids: Sequence[int] | None = None,
    kind: str | None = None,
    chat_template: GivenTemplate | None = None,
) -> Tokenizer:
    """Load the tokenizer of a checkpoint's folder.

    A SentencePiece model (`tokenizer.model`, `tokenizer.model.v1` and so on) is used where there is one, with the added
    tokens that the JSON files beside it declare; a `tokenizer.json` alone needs the extra `tokenizers`. Where both are
    there and differ, `notes` says so.

    Args:
        folder: Folder of the checkpoint.
        vocab_size: Rows of the model's embedding. Added tokens beyond it, which the model cannot read, are left out.
        eos_token_ids: Further ids at which generation stops, from the model's configuration.
        kind: "model" or "json", which of the two files to use; the model where there is one when None.
        chat_template: A chat format in place of the checkpoint's own.

    Raises:
        InvalidRequestError: Another `kind`, or a chat format that needs control tokens which are not there.
        TokenizerError: There is no tokenizer, it is broken, or it has more pieces than `vocab_size`.
        MissingDependencyError: A package is needed to read it.
    """
    check_kind(kind)
    folder = Path(folder)
    path = _find(folder, kind)
    settings = read_settings(folder, eos_token_ids or ())
    if chat_template is not None:
        settings = replace(settings, templates=chat_template.templates, template_file=chat_template.origin)
    if vocab_size is not None:
        settings = _within(settings, vocab_size, folder)
    if path.name == "tokenizer.json":
        tokenizer, chat, notes = _load_json(path, settings, chat_template)
    else:
        tokenizer, chat, notes = _load_spm(path, settings, chat_template, alone=kind is not None)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{path} has {tokenizer.vocab_size} pieces, but the model's vocab_size is {vocab_size}: "
            "it belongs to another model; put the tokenizer of this one into the folder"
        )
    tokenizer.chat_origin, tokenizer.chat_note = chat.origin, chat.note
    if tokenizer.end_of_turn is not None:
        tokenizer.eos_token_ids |= {tokenizer.end_of_turn}
    tokenizer.notes = (*notes, *_end_notes(tokenizer, settings))
    return tokenizer


def check_kind(kind: str | None) -> None:
    """Raise InvalidRequestError unless ``kind`` is one of `TOKENIZER_KINDS` or None."""
    if kind is not None and (not isinstance(kind, str) or kind not in TOKENIZER_KINDS):
        raise InvalidRequestError(
            f"tokenizer is {shown(kind)}; it must be {' or '.join(map(repr, TOKENIZER_KINDS))}, or None"
        )


def _find(folder: Path, kind: str | None) -> Path:
    others = [path.name for path in names_like(folder, "tokenizer.model*")]
    models, fast = (*_KNOWN_NAMES, *others), ("tokenizer.json",)
    for name in {None: (*models, *fast), "model": models, "json": fast}[kind]:
        if is_there(folder / name):
            return folder / name
    if kind is not None:
        raise TokenizerError(f"{folder} has no tokenizer.{kind}; leave out --tokenizer to use the other one")
    raise TokenizerError(
        f"{folder} has no tokenizer (looked for tokenizer.model, tokenizer.model.v1, .v3, .v2, tokenizer.model* and "
        "tokenizer.json); `logits` and calls with token ids still work, text needs one of these files"
    )


_Loaded = tuple[Tokenizer, ChatChoice, tuple[str, ...]]


def _load_spm(path: Path, settings: Settings, given: GivenTemplate | None, *, alone: bool) -> _Loaded:
    """The model; `alone`: where tokenizer.json contradicts it, the model is right."""
    from mlx_mixtral.tokenizer.sentencepiece import SentencePieceModel, SentencePieceTokenizer

    data = read_file(path, MAX_TOKENIZER_BYTES, TokenizerError)
    if is_pointer(data):
        raise TokenizerError(f"{path} {POINTER_FIX}")
    model = SentencePieceModel(data, settings, source=str(path))
    pieces = model.pieces() if settings.fast else []
    problem = None if alone else disagreement(pieces, settings)
    if alone and settings.fast:
        kept = {i: t for i, t in settings.added.items() if i >= model.size or t.content == pieces[i]}
        settings = replace(settings, added=kept | {i: t for i, t in settings.beside.items() if i in settings.added})
        model = SentencePieceModel(data, settings, source=str(path))
    tokens = {token.token_id: token for token in model.control_tokens(settings.named)} | dict(settings.added)
    markers = Markers(tokens.values())
    chat = choose_chat_format(markers, settings, native="mistral-v1", given=given)
    notes = () if problem is None else (problem,)
    return SentencePieceTokenizer(model, markers, settings, chat.format), chat, notes


def _load_json(path: Path, settings: Settings, given: GivenTemplate | None) -> _Loaded:
    from mlx_mixtral.tokenizer.tokenizer_json import JsonTokenizer

    markers = Markers((*_named_pieces(settings), *settings.added.values()))
    chat = choose_chat_format(markers, settings, native="none", given=given)
    return JsonTokenizer(path, markers, settings, chat.format), chat, ()


def _named_pieces(settings: Settings) -> Iterator[AddedToken]:
    """Pieces of a tokenizer.json that a file names as special tokens and none declares as added ones."""
    for token_id, piece in json_pieces(settings.fast).items():
        if piece in settings.named and NAMED_FORM.fullmatch(piece):
            yield replace(settings.named[piece], token_id=token_id)


def _end_notes(tokenizer: Tokenizer, settings: Settings) -> Iterator[str]:
    """What keeps a generation from ending where it should."""
    spelled = ", ".join(
        map(tokenizer.id_to_piece, sorted(i for i in tokenizer.eos_token_ids if i < tokenizer.vocab_size))
    )
    if not tokenizer.eos_token_ids:
        yield "no file says which token ends a text, so generation continues up to --max-tokens; give --stop or --stop-token-id"
    elif settings.eos is not None and settings.eos != (
        None if tokenizer.eos_token_id is None else tokenizer.id_to_piece(tokenizer.eos_token_id)
    ):
        yield (
            f"eos_token is {settings.eos!r}, which is not in the vocabulary; generation stops at {spelled}: correct "
            "eos_token in tokenizer_config.json or special_tokens_map.json, or give --stop-token-id"
        )


def _within(settings: Settings, vocab_size: int, folder: Path) -> Settings:
    beyond = [token for token in settings.added.values() if token.token_id >= vocab_size]
    for token in beyond:
        if any(token.content in source for source in settings.templates.values()):
            raise TokenizerError(
                f"{folder}: the chat template uses {token.content}, added token {token.token_id}, but the model's "
                f"vocab_size is {vocab_size}; use the weights that were trained with it"
            )
    return replace(settings, added={i: token for i, token in settings.added.items() if i < vocab_size})
