"""Which tokenizer a folder holds, and which chat format goes with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlx_mixtral.errors import TokenizerError
from mlx_mixtral.reading import MAX_TOKENIZER_BYTES, is_there, names_like, read_file
from mlx_mixtral.tokenizer.base import ChatFormat, Tokenizer
from mlx_mixtral.tokenizer.chat.native import MistralV1, MistralV3, NoChat
from mlx_mixtral.tokenizer.chat.template import JinjaChat, is_mistral_template
from mlx_mixtral.tokenizer.markers import Markers
from mlx_mixtral.tokenizer.settings import Settings, read_settings

__all__ = ["choose_chat_format", "load_tokenizer"]

_KNOWN_NAMES = ("tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v3", "tokenizer.model.v2")


def load_tokenizer(
    folder: Path, *, vocab_size: int | None = None, eos_token_ids: Sequence[int] | None = None
) -> Tokenizer:
    """Load the tokenizer of a checkpoint's folder.

    A SentencePiece model (`tokenizer.model`, `tokenizer.model.v1` and so on) is used where there is one, with the added
    tokens that the JSON files beside it declare; a `tokenizer.json` alone needs the extra `tokenizers`.

    Args:
        folder: Folder of the checkpoint.
        vocab_size: Rows of the model's embedding. Added tokens beyond it, which the model cannot read, are left out.
        eos_token_ids: Further ids at which generation stops, from the model's configuration.

    Raises:
        TokenizerError: There is no tokenizer, it is broken, or it has more pieces than `vocab_size`.
        MissingDependencyError: A package is needed to read it.
    """
    folder = Path(folder)
    path = _find(folder)
    settings = read_settings(folder, eos_token_ids or ())
    if vocab_size is not None:
        settings = _within(settings, vocab_size, folder)
    tokenizer = _load_json(path, settings) if path.name == "tokenizer.json" else _load_spm(path, settings)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{path} has {tokenizer.vocab_size} pieces, but the model's vocab_size is {vocab_size}: "
            "it belongs to another model; put the tokenizer of this one into the folder"
        )
    return tokenizer


def _find(folder: Path) -> Path:
    others = [path.name for path in names_like(folder, "tokenizer.model*")]
    for name in (*_KNOWN_NAMES, *others, "tokenizer.json"):
        if is_there(folder / name):
            return folder / name
    raise TokenizerError(
        f"{folder} has no tokenizer (looked for tokenizer.model, tokenizer.model.v1, .v3, .v2, tokenizer.model* and "
        "tokenizer.json); `logits` and calls with token ids still work, text needs one of these files"
    )


def _load_spm(path: Path, settings: Settings) -> Tokenizer:
    from mlx_mixtral.tokenizer.sentencepiece import SentencePieceModel, SentencePieceTokenizer

    special = [token.content for token in settings.added.values() if token.special]
    data = read_file(path, MAX_TOKENIZER_BYTES, TokenizerError)
    model = SentencePieceModel(data, special, source=str(path))
    tokens = {token.token_id: token for token in model.control_tokens()} | dict(settings.added)
    markers = Markers(tokens.values())
    return SentencePieceTokenizer(model, markers, settings, choose_chat_format(markers, settings, native="mistral-v1"))


def _load_json(path: Path, settings: Settings) -> Tokenizer:
    from mlx_mixtral.tokenizer.tokenizer_json import JsonTokenizer

    markers = Markers(settings.added.values())
    return JsonTokenizer(path, markers, settings, choose_chat_format(markers, settings, native="none"))


def choose_chat_format(markers: Markers, settings: Settings, *, native: str) -> ChatFormat:
    """The checkpoint's own template unless it is Mistral's; else Mistral's native format.

    v3 when [INST] is a control or special token, else v1; `native` "none" is for a vocabulary that is not
    SentencePiece: it has v1 only where a Mistral template says so.
    """
    templates = settings.templates
    if any(not is_mistral_template(source) for source in templates.values()):
        return JinjaChat(templates)
    if "[INST]" in markers.by_content:
        return MistralV3()
    return MistralV1() if templates or native == "mistral-v1" else NoChat()


def _within(settings: Settings, vocab_size: int, folder: Path) -> Settings:
    beyond = [token for token in settings.added.values() if token.token_id >= vocab_size]
    for token in beyond:
        if any(token.content in source for source in settings.templates.values()):
            raise TokenizerError(
                f"{folder}: the chat template uses {token.content}, added token {token.token_id}, but the model's "
                f"vocab_size is {vocab_size}; use the weights that were trained with it"
            )
    return replace(settings, added={i: token for i, token in settings.added.items() if i < vocab_size})
