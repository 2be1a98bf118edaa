"""Changing a serialised SentencePiece model: piece types and the dummy prefix, nothing else.

SentencePiece matches USER_DEFINED pieces inside any text, and merges may build NORMAL ones; CONTROL pieces never come
out of a text. So markers are made CONTROL before the model is loaded. The wire format is protocol buffers', the fields
are those of `sentencepiece_model.proto`: ModelProto.pieces = 1, .normalizer_spec = 3; SentencePiece.piece = 1,
.type = 3; NormalizerSpec.add_dummy_prefix = 3.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

__all__ = [
    "BYTE", "CONTROL", "MARKER_FORM", "MAX_PIECES", "NORMAL", "UNKNOWN", "UNUSED", "USER_DEFINED", "retype_markers", "varint",
    "without_dummy_prefix",
]  # fmt: skip

# SentencePiece.Type, which GGUF has too.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

MAX_PIECES = 2**19
"""Twice the largest vocabulary known."""

MARKER_FORM = re.compile(r"<[^\s<>]+>|\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT)\]")
"""A USER_DEFINED piece of this form is a marker; Mistral's `[REFERENCE_DOC_3]`, say, is part of the text.

A file beside the model that declares such a piece special makes it a marker too.
"""


def without_dummy_prefix(model: bytes) -> bytes:
    """The same model, encoding with no space put in front.

    A second normalizer_spec is merged into the first, as protocol buffers do with a message that comes twice.
    """
    return model + b"\x1a\x02\x18\x00"


def retype_markers(
    model: bytes, special: Collection[str], declared: Mapping[int, str] | None = None
) -> tuple[bytes, dict[int, str]]:
    """Make markers CONTROL: pieces spelled as one of `special`, those whose id a file declares as something else
    (`declared`, spellings by id), and USER_DEFINED pieces of `MARKER_FORM`.

    Returns the changed model and the ids changed, with their spelling.

    Raises:
        ValueError: The bytes are not a protocol buffer, or hold more than `MAX_PIECES`.
    """
    spellings = {content.encode("utf-8") for content in special}
    contents = {token_id: content.encode("utf-8") for token_id, content in (declared or {}).items()}
    changed: dict[int, str] = {}
    chunks: list[bytes] = []
    copied = token_id = 0
    for count, (field, start, body, end) in enumerate(_fields(model)):
        if count > MAX_PIECES:
            raise ValueError(f"more than {MAX_PIECES} pieces")
        if field != 1:
            continue
        # Cheap tests first: nearly none of 32000 pieces is read any closer.
        piece = model[body:end]
        length = piece[1] if len(piece) > 1 else 0
        if b"\x18\x04" in piece or piece[2 : 2 + length] in spellings or token_id in contents:
            spelling, kind = _piece(piece)
            is_declared = spelling in spellings or contents.get(token_id, spelling) != spelling
            text = spelling.decode("utf-8")
            is_marker = kind == USER_DEFINED and MARKER_FORM.fullmatch(text)
            if is_marker or (is_declared and kind in (NORMAL, USER_DEFINED)):
                new = piece + b"\x18\x03"  # the last value of a scalar field wins
                chunks += [model[copied:start], b"\x0a", varint(len(new)), new]
                copied = end
                changed[token_id] = text
        token_id += 1
    return (b"".join([*chunks, model[copied:]]) if changed else model), changed


def _piece(message: bytes) -> tuple[bytes, int]:
    spelling, kind = b"", NORMAL
    for field, _, body, end in _fields(message):
        if field == 1:
            spelling = message[body:end]
        elif field == 3:
            kind = _read_varint(message, body)[0]
    return spelling, kind


def _fields(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Each field's number, start, start of its value and end."""
    at, size = 0, len(data)
    while at < size:
        start = at
        key, at = _read_varint(data, at)
        wire = key & 7
        if wire == 0:
            body, (_, end) = at, _read_varint(data, at)
        elif wire == 1:
            body, end = at, at + 8
        elif wire == 2:
            length, body = _read_varint(data, at)
            end = body + length
        elif wire == 5:
            body, end = at, at + 4
        else:
            raise ValueError(f"wire type {wire} at byte {start}")
        if end > size:
            raise ValueError(f"field at byte {start} reaches past the end of {size} bytes")
        yield key >> 3, start, body, end
        at = end


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"number truncated at byte {at}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def varint(value: int) -> bytes:
    """A whole number as protocol buffers write it: seven bits a byte, the lowest first."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
