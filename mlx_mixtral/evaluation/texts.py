"""Texts to evaluate on: files, folders and JSONL, each text with the domain it counts for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_mixtral.arguments import as_path, check_type
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.reading import read_given

__all__ = ["SUFFIXES", "Text", "read_texts"]

SUFFIXES = (".jsonl", ".md", ".text", ".txt")
"""Files that are taken from a folder; a file named by itself may end in anything."""

SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class Text:
    """One text. ``name`` is its file, with the line for JSONL (``chats.jsonl:12``)."""

    domain: str
    name: str
    text: str

    @property
    def file(self) -> str:
        """The file alone."""
        file, _, line = self.name.rpartition(":")
        return file if line.isdecimal() and file.lower().endswith(".jsonl") else self.name

    @property
    def nbytes(self) -> int:
        """Bytes in UTF-8."""
        return len(self.text.encode("utf-8"))


def read_texts(paths: Sequence[str | Path], *, text_field: str = "text", domain_field: str = "domain") -> list[Text]:
    """Read texts in the order given, folders in order of name. Line ends are kept as they are; a byte order mark is not text.

    Args:
        paths: files, folders (their files ending in ``SUFFIXES``, at any depth, hidden ones left out), or ``NAME=PATH``, which
            puts all that is at PATH into the domain NAME. Else a text's domain is its file's stem: ``law/fr.txt`` counts
            for "fr".
        text_field: key of the text in a line of JSONL.
        domain_field: key of its domain; lines without it count for the file's stem.

    Raises:
        InvalidRequestError: a path that is missing, cannot be read, is given twice, holds no text, or is not UTF-8.
    """
    check_type("paths", paths, (list, tuple), "a list of paths")
    if not paths:
        raise InvalidRequestError("no text was given; name at least one file or folder")
    texts: list[Text] = []
    seen: set[Path] = set()
    for given in paths:
        domain, path = _named(given)
        for file in _files(path):
            if (real := file.resolve()) in seen:
                raise InvalidRequestError(f"text {file} is given twice; name each file once")
            seen.add(real)
            if file.suffix.lower() == ".jsonl":
                texts.extend(_records(file, domain, text_field, domain_field))
            else:
                texts.append(Text(domain or file.stem, str(file), _filled(_read(file), str(file))))
    return texts


def _named(given: str | Path) -> tuple[str | None, Path]:
    """``NAME=PATH`` in its parts, unless a file has just that name."""
    path = as_path("a text", given)
    if isinstance(given, str) and "=" in given and not _exists(path):
        name, _, rest = given.partition("=")
        if not name or not rest:
            raise InvalidRequestError(f"text {given!r} is not NAME=PATH; write news=articles.txt")
        if "/" not in name:
            return name, as_path("a text", rest)
    return None, path


def _files(path: Path) -> list[Path]:
    if not _exists(path):
        raise InvalidRequestError(f"text {path} does not exist; name a file or a folder")
    if not path.is_dir():
        return [path]
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not found:
        raise InvalidRequestError(f"folder {path} has no texts: no file in it ends in {', '.join(SUFFIXES)}")
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the file system, or with a null byte
        return False


def _read(file: Path) -> str:
    try:
        return read_given(file, InvalidRequestError).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"text {file} is not UTF-8: byte {error.start} is not text; convert it to UTF-8"
        ) from error


def _records(file: Path, domain: str | None, text_field: str, domain_field: str) -> Iterator[Text]:
    """A text for each line that is not blank."""
    found = False
    # Not splitlines: a JSON string may hold U+2028 and the like as they are.
    for number, line in enumerate(_read(file).split("\n"), 1):
        if not line.strip():
            continue
        name, found = f"{file}:{number}", True
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(
                f"text {name} is not JSON ({error}); a .jsonl file has one object per line"
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            keys = ", ".join(map(str, record))[:SHOWN_CHARACTERS] if isinstance(record, dict) else type(record).__name__
            raise InvalidRequestError(f"text {name} has no text under {text_field!r} (it has: {keys or 'nothing'})")
        own = record.get(domain_field)
        if own is not None and not (isinstance(own, str | int) and str(own)):
            raise InvalidRequestError(
                f"text {name} has a domain under {domain_field!r} that is not a name: {own!r:.40}"
            )
        yield Text(domain or (file.stem if own is None else str(own)), name, _filled(record[text_field], name))
    if not found:
        raise InvalidRequestError(f"text {file} is empty; give some text")


def _filled(text: str, name: str) -> str:
    if not text.strip():
        raise InvalidRequestError(f"text {name} is empty; give some text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"text {name} holds a lone surrogate U+{ord(text[error.start]):04X}, which is not text"
        ) from None
    return text
