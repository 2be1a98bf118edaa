"""A SentencePiece model with the added tokens of the checkpoint beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from mlx_mixtral.errors import MissingDependencyError, TokenizerError
from mlx_mixtral.tokenizer.base import ChatFormat, Tokenizer
from mlx_mixtral.tokenizer.markers import NAMED_FORM, AddedToken, Markers
from mlx_mixtral.tokenizer.sentencepiece_proto import retype_markers, without_dummy_prefix
from mlx_mixtral.tokenizer.settings import Settings
from mlx_mixtral.tokenizer.streaming import SPACE, PieceDecoder, Surface

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

__all__ = ["SentencePieceModel", "SentencePieceTokenizer"]


class SentencePieceModel:
    """The SentencePiece processor of a file, with its markers made CONTROL (see `sentencepiece_proto`).

    Args:
        settings: What the files beside it declare.

    Raises:
        TokenizerError: The bytes are no SentencePiece model.
    """

    def __init__(self, data: bytes, settings: Settings, *, source: str) -> None:
        if data.startswith(b"version https://git-lfs"):
            raise TokenizerError(
                f"{source} is a git-lfs pointer, not the tokenizer itself; fetch it with `git lfs pull`"
            )
        try:
            special = [token.content for token in settings.added.values() if token.special]
            special += [content for content in settings.named if NAMED_FORM.fullmatch(content)]
            declared = {token_id: token.content for token_id, token in settings.added.items()}
            self.data, self.retyped = retype_markers(data, special, declared)
        except (ValueError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{source} is broken or cut off ({error}); download it again") from error
        self.processor = self._load(self.data, source)
        self.size: int = self.processor.vocab_size()
        if self.size == 0:
            raise TokenizerError(f"{source} holds no pieces; download it again")
        try:
            self.processor.id_to_piece(list(range(self.size)))
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{source} holds a piece that is not UTF-8 ({error}); download it again") from error

    @staticmethod
    def _load(data: bytes, source: str) -> SentencePieceProcessor:
        try:
            import sentencepiece
        except ImportError as error:
            raise MissingDependencyError("tokenizer.model needs sentencepiece: `pip install sentencepiece`") from error
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(data)
        except (RuntimeError, ValueError, OSError) as error:
            raise TokenizerError(f"{source} is not a SentencePiece model ({error}); download it again") from error
        return processor

    def pieces(self) -> list[str]:
        """Every piece, by id."""
        return [self.processor.id_to_piece(i) for i in range(self.size)]

    def without_prefix(self) -> SentencePieceProcessor:
        """A second processor that puts no space in front of a text."""
        return self._load(without_dummy_prefix(self.data), "tokenizer.model without its dummy prefix")

    def control_tokens(self, named: Mapping[str, AddedToken]) -> list[AddedToken]:
        """Every piece that no text becomes, the unknown one too; a retyped one is shown unless a file says special, or
        names it."""
        processor, found = self.processor, []
        for token_id in range(self.size):
            if processor.is_control(token_id) or processor.is_unknown(token_id):
                piece = processor.id_to_piece(token_id)
                token = AddedToken(piece, token_id, special=token_id not in self.retyped)
                found.append(replace(named[piece], token_id=token_id) if piece in named else token)
        return found


class SentencePieceTokenizer(Tokenizer):
    """See `Tokenizer`; ids of plain text are SentencePiece's own."""

    def __init__(self, model: SentencePieceModel, markers: Markers, settings: Settings, chat: ChatFormat) -> None:
        super().__init__(markers, chat, adds_bos=settings.add_bos is not False)
        self._model = model
        self._processor = model.processor
        if self._processor.unk_id() not in settings.added:
            self._by_id.pop(self._processor.unk_id(), None)  # shown as SentencePiece shows it, unless declared special
        self._rest: SentencePieceProcessor | None = None  # processor for text after a marker, when it differs
        self._prefix_after_marker = settings.prefix_after_marker
        self.vocab_size = max([model.size, *(token_id + 1 for token_id in self._by_id)])
        self.unk_token_id = self._processor.unk_id()
        self.bos_token_id = self._named(settings.bos, self._processor.bos_id())
        model_eos = self._processor.eos_id()
        self.eos_token_id = self._named(settings.eos, model_eos)
        ends = {self.eos_token_id, model_eos if model_eos >= 0 else None, *settings.eos_token_ids}
        self.eos_token_ids = frozenset(i for i in ends if i is not None)
        self._unknown_surface = cast(str, self._processor.decode([self._processor.unk_id()]))
        self._strip_first, self._strip_all = self._leading_space_rule()

    def _named(self, content: str | None, otherwise: int) -> int | None:
        named = self.special_id(content) if content else None
        return named if named is not None else (otherwise if otherwise >= 0 else None)

    def encode_plain(self, text: str, *, first: bool = True) -> list[int]:
        processor = self._processor
        if not first and not self._prefix_after_marker:
            if self._rest is None:
                self._rest = self._model.without_prefix()
            processor = self._rest
        return cast("list[int]", processor.encode(text))

    def streaming_decoder(self, *, continues: bool = False) -> PieceDecoder:
        strip = self._strip_first and not continues
        return PieceDecoder(self.surface, strip_first_space=strip, strip_all_spaces=self._strip_all)

    def _model_piece(self, token_id: int) -> str:
        if token_id >= self._model.size:
            return f"<unused {token_id}>"  # a hole between the model's pieces and an added token
        return self._processor.id_to_piece(token_id)

    def _model_surface(self, token_id: int) -> Surface:
        processor = self._processor
        if token_id >= self._model.size or processor.is_control(token_id):
            return None
        piece = processor.id_to_piece(token_id)
        if processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return self._unknown_surface if processor.is_unknown(token_id) else piece

    def _leading_space_rule(self) -> tuple[bool, bool]:
        """Whether decoding takes the first space off, and whether every leading one, seen from what it does."""
        space = self._processor.piece_to_id(SPACE)
        if space != self._processor.unk_id():
            return self._processor.decode([space]) == "", self._processor.decode([space, space]) == ""
        for token_id in range(self._model.size):
            piece = self._processor.id_to_piece(token_id)
            if len(piece) > 1 and piece.startswith(SPACE):
                return not self._processor.decode([token_id]).startswith(" "), False
        return False, False
