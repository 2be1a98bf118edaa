"""A `tokenizer.json` through the `tokenizers` package: for checkpoints that have no SentencePiece model.

Added tokens are taken out of the file before the package sees it, so that nothing in a plain text matches them; finding
them in trusted text is `Markers`' work, as everywhere.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_mixtral.errors import MissingDependencyError, TokenizerError
from mlx_mixtral.tokenizer.base import ChatFormat, Tokenizer
from mlx_mixtral.tokenizer.markers import Markers
from mlx_mixtral.tokenizer.sentencepiece_proto import MAX_PIECES
from mlx_mixtral.tokenizer.settings import Settings
from mlx_mixtral.tokenizer.streaming import ByteLevelDecoder, PieceDecoder, StreamingDecoder, Surface

if TYPE_CHECKING:
    import tokenizers

__all__ = ["JsonTokenizer"]


class JsonTokenizer(Tokenizer):
    """See `Tokenizer`. Byte-level BPE and Llama-like files (byte fallback or Metaspace) are understood.

    Bytes that are no UTF-8 decode as SentencePiece has it with Llama-like files, one U+FFFD per broken byte; the
    package itself gives up the whole run.

    Raises:
        TokenizerError: The file is broken or of another kind; by `encode`, a text its regular expression fails on.
        MissingDependencyError: The `tokenizers` package is not installed.
    """

    def __init__(self, path: Path, markers: Markers, settings: Settings, chat: ChatFormat) -> None:
        spec = settings.fast
        super().__init__(markers, chat, adds_bos=_adds_bos(spec, settings))
        self._path, self._spec = path, spec
        self._added_ids = set(self._by_id)
        self._plain = self._build(spec)
        self._after_marker: tokenizers.Tokenizer | None = None
        self._prefix_after_marker = settings.prefix_after_marker
        self._byte_level, self._strip_first = self._decoding(spec.get("decoder"))
        with _package_errors(path):
            vocabulary = self._plain.get_vocab(with_added_tokens=False)
        self._pieces: dict[int, str] = {i: piece for piece, i in vocabulary.items()}
        self.vocab_size = max([0, *(i + 1 for i in self._pieces), *(i + 1 for i in self._added_ids)])
        model = spec.get("model")
        self.unk_token_id = self._named(model.get("unk_token")) if isinstance(model, Mapping) else None
        self.bos_token_id = self._named(settings.bos)
        self.eos_token_id = self._named(settings.eos)
        own = () if self.eos_token_id is None else (self.eos_token_id,)
        self.eos_token_ids = frozenset((*own, *settings.eos_token_ids))

    def encode_plain(self, text: str, *, first: bool = True) -> list[int]:
        encoder = self._plain
        if not first and not self._prefix_after_marker:
            if self._after_marker is None:
                self._after_marker = self._build(_without_prefix(self._spec))
            encoder = self._after_marker
        with _package_errors(self._path):
            encoding = encoder.encode(text, add_special_tokens=False)
        ids: list[int] = list(encoding.ids)
        if self._added_ids.isdisjoint(ids):
            return ids
        # The vocabulary itself can spell a marker as one piece: take the text apart inside it.
        at = next(i for i, token_id in enumerate(ids) if token_id in self._added_ids)
        cut = min(encoding.offsets[at][0] + 1, len(text) - 1)
        if cut < 1:
            return ids[:at] + ids[at + 1 :]
        return self.encode_plain(text[:cut], first=first) + self.encode_plain(text[cut:], first=False)

    def streaming_decoder(self, *, continues: bool = False) -> StreamingDecoder:
        if self._byte_level:
            return ByteLevelDecoder(self.surface)
        return PieceDecoder(self.surface, strip_first_space=self._strip_first and not continues)

    def _model_piece(self, token_id: int) -> str:
        return self._pieces.get(token_id, f"<unused {token_id}>")

    def _model_surface(self, token_id: int) -> Surface:
        piece = self._pieces.get(token_id)
        if piece is None:
            return None
        if self._byte_level:
            known = all(char in _BYTE_OF for char in piece)
            return bytes(_BYTE_OF[char] for char in piece) if known else piece.encode("utf-8")
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece

    def _named(self, content: str | None) -> int | None:
        if content is None:
            return None
        token_id = self.special_id(content)
        return token_id if token_id is not None else self._plain.token_to_id(content)

    def _build(self, spec: Mapping[str, Any]) -> tokenizers.Tokenizer:
        try:
            import tokenizers
        except ImportError as error:
            raise MissingDependencyError(
                f"{self._path} needs the tokenizers package: `pip install 'mlx-mixtral[tokenizers]'`"
            ) from error
        model = spec.get("model")
        pieces = model.get("vocab") if isinstance(model, Mapping) else None
        if isinstance(pieces, dict | list) and len(pieces) > MAX_PIECES:
            raise TokenizerError(
                f"{self._path} has {len(pieces)} pieces; no model has more than {MAX_PIECES}: use its own tokenizer"
            )
        bare = {**spec, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        with _package_errors(self._path):
            try:
                return tokenizers.Tokenizer.from_str(json.dumps(bare))
            except Exception as error:  # the package raises bare Exception
                raise TokenizerError(
                    f"{self._path} is not a tokenizer the tokenizers package can read ({error})"
                ) from error

    def _decoding(self, decoder: Any) -> tuple[bool, bool]:
        """Whether the pieces are byte-level, and whether a leading space is the encoder's."""
        steps = decoder.get("decoders") or [decoder] if isinstance(decoder, dict) else []
        kinds = {step.get("type"): step for step in steps if isinstance(step, dict)}
        if "ByteLevel" in kinds:
            return True, False
        if "Metaspace" in kinds:
            return False, kinds["Metaspace"].get("prepend_scheme", "always") != "never"
        if "Replace" in kinds and kinds.keys() <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
            return False, "Strip" in kinds
        raise TokenizerError(
            f"{self._path} decodes with {', '.join(map(str, kinds)) or 'nothing'}; only byte-level BPE and Llama-like "
            "files are understood: put the model's tokenizer.model beside it"
        )


@contextlib.contextmanager
def _package_errors(path: Path) -> Iterator[None]:
    """What the package raises on a text becomes a line of ours: bare Exceptions, and panics of its Rust code, which are none.

    A regular expression of the file that backtracks without end panics, on the text that makes it do so.
    """
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"{path} cannot be used on this text: the tokenizers package gave up ({error}); "
            "put the model's own tokenizer there"
        ) from None


def _adds_bos(spec: Mapping[str, Any], settings: Settings) -> bool:
    """`add_bos_token` where it is said, else whether the file's post-processor writes BOS."""
    if settings.add_bos is not None:
        return settings.add_bos
    return settings.bos is not None and json.dumps(settings.bos) in json.dumps(spec.get("post_processor"))


def _without_prefix(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The same file for text after a marker, where `prepend_scheme` "first" puts no space."""
    changed = copy.deepcopy(dict(spec))
    part = changed.get("pre_tokenizer") or {}
    for step in part.get("pretokenizers") or [part]:
        if step.get("type") == "Metaspace":
            step["prepend_scheme"] = "never"
    return changed


def _byte_alphabet() -> dict[str, int]:
    """The printable characters byte-level BPE writes bytes as: `bytes_to_unicode` in openai/gpt-2's encoder.py."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF = _byte_alphabet()
