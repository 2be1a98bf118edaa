"""The one reader of files that come from strangers: regular files only, and never more of one than its kind can need.

What has a name but is no file (a folder, a pipe, a device, a link that leads nowhere) cannot be read, which is not the same
as absent: ``is_there`` tells what is absent, and reading the rest is an error.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import stat
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from mlx_mixtral.errors import CheckpointError, MixtralError

__all__ = [
    "MAX_CONFIG_BYTES", "MAX_INDEX_BYTES", "MAX_TEXT_BYTES", "MAX_TOKENIZER_BYTES", "POINTER_FIX", "check_size",
    "companion_bytes", "is_pointer", "is_there", "names_like", "open_descriptor", "open_file", "parse_json", "read_file",
    "read_given", "read_json", "special_file",
]  # fmt: skip

# Bounds by kind, each a few times the largest that is known.
MAX_CONFIG_BYTES = 16 * 2**20
MAX_INDEX_BYTES = 32 * 2**20
MAX_TOKENIZER_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 4 * 2**20
"""Of a licence or a chat template."""
MAX_GIVEN_BYTES = 2**29
"""Of a text that a user names."""
# What JSON becomes in memory goes by its values, not its bytes: 22 million empty lists fit 64 MB, and take 1.4 GB.
MAX_JSON_VALUES = 4_000_000
MAX_JSON_DEPTH = 100
# What editors of Windows put in front of a text.
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
_POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_FIX = "is a git-lfs pointer, a few lines in place of the actual file; run git lfs pull in its folder"
"""What to say about a file that ``is_pointer`` finds, after its name."""

# How JSON spells half a character; what pairs up is fine.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a disk",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip


def is_there(path: Path) -> bool:
    """Whether anything has this name, be it a file or something that cannot be read as one."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
    except ValueError:  # a null byte
        return False
    return True


def names_like(folder: Path, *patterns: str) -> list[Path]:
    """What a folder has under names like those, in order of name; links that lead nowhere too, unlike ``Path.glob``.

    Raises:
        CheckpointError: the folder is there and cannot be read.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as failure:
        raise CheckpointError(f"{folder} cannot be read: {failure.strerror or failure}") from failure
    return [folder / name for name in sorted(names) if any(fnmatchcase(name, pattern) for pattern in patterns)]


def special_file(mode: int) -> str | None:
    """What a thing with this ``st_mode`` is, in words; None for a regular file."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "something else")


def open_descriptor(path: Path, error: type[MixtralError] = CheckpointError) -> int:
    """A descriptor to read a regular file by; links are followed. Never waits, as opening a pipe would.

    Raises:
        CheckpointError, or ``error``: it is not there, something else than a file, or cannot be read.
    """
    try:
        # Asked before, for opening a device may do something, and after, for another file may have taken its place.
        kind = special_file(path.stat().st_mode)
        if kind is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            if (kind := special_file(os.fstat(descriptor).st_mode)) is None:
                return descriptor
            os.close(descriptor)
    except (OSError, ValueError) as failure:
        raise error(f"{path} cannot be read: {_reason(path, failure)}") from failure
    raise error(f"{path} cannot be read: it is {kind}, not a file")


def open_file(path: Path, error: type[MixtralError] = CheckpointError) -> BinaryIO:
    """The same as a file object."""
    return os.fdopen(open_descriptor(path, error), "rb")


def _reason(path: Path, failure: OSError | ValueError) -> str:
    if isinstance(failure, ValueError):
        return str(failure)
    if failure.errno == errno.ELOOP:
        return "it is a link that points back to itself"
    if failure.errno == errno.ENOENT and path.is_symlink():
        return f"it is a link to {path.readlink()}, which does not exist"
    return failure.strerror or str(failure)


def check_size(path: Path, max_bytes: int, error: type[MixtralError] = CheckpointError) -> None:
    """Before another library reads a file by its name.

    Raises:
        CheckpointError, or ``error``: it is no regular file, cannot be read, or has more than ``max_bytes``.
    """
    with open_file(path, error) as file:
        if (size := os.fstat(file.fileno()).st_size) > max_bytes:
            raise error(f"{path} has {size} bytes; no file of its kind has more than {max_bytes}")


def read_file(path: Path, max_bytes: int, error: type[MixtralError] = CheckpointError) -> bytes:
    """All of a regular file.

    Raises:
        CheckpointError, or ``error``: it cannot be read, or has more than ``max_bytes``, of which none is kept.
    """
    with open_file(path, error) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > max_bytes else file.read(size + 1)
        except OSError as failure:
            raise error(f"{path} cannot be read: {failure.strerror or failure}") from failure
    if max(size, len(data)) > max_bytes:
        raise error(f"{path} has {max(size, len(data))} bytes; no file of its kind has more than {max_bytes}")
    return data


def read_given(path: Path, error: type[MixtralError]) -> bytes:
    """All of what a user names as a text, which may be a pipe too, as the shell makes of ``<(command)``.

    Raises:
        ``error``: it cannot be read, or has more than ``MAX_GIVEN_BYTES``.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > MAX_GIVEN_BYTES else file.read(MAX_GIVEN_BYTES + 1 if size == 0 else size + 1)
    except (OSError, ValueError) as failure:
        raise error(f"{path} cannot be read: {_reason(path, failure)}") from failure
    if max(size, len(data)) > MAX_GIVEN_BYTES:
        raise error(f"{path} has more than {MAX_GIVEN_BYTES} bytes, which is the limit; split it")
    return data


def companion_bytes(name: str) -> int:
    """The bound of a file beside the weights, by its name."""
    if name == "tokenizer.json" or name.startswith("tokenizer.model"):
        return MAX_TOKENIZER_BYTES
    return MAX_CONFIG_BYTES if name.endswith(".json") else MAX_TEXT_BYTES


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Parse a JSON object of a checkpoint folder.

    Raises:
        CheckpointError: unreadable, larger than ``max_bytes``, or not what ``parse_json`` takes.
    """
    return parse_json(path, read_file(path, max_bytes))


def parse_json(where: Path | str, data: bytes | str) -> dict[str, Any]:
    """A JSON object; ``where`` names it in errors. Text is UTF-8, or what a byte-order mark says.

    Raises:
        CheckpointError: a git-lfs pointer, not text, not JSON, not an object, a key that an object has twice, or more
            values or levels than any file of ours or a model's has.
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if is_pointer(raw):
        raise CheckpointError(f"{where} {POINTER_FIX}")
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8")
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > MAX_JSON_VALUES:
        raise CheckpointError(f"{where} holds more than {MAX_JSON_VALUES} values; no file of its kind does")
    try:
        text = raw.decode(encoding)
        parsed = json.loads(text, object_pairs_hook=_unique)
        if _SURROGATE.search(text):
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"U+{ord(error.object[error.start]):04X}"
        raise CheckpointError(
            f"{where} is not valid JSON: a string holds a lone surrogate {found}, which is not text"
        ) from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} holds a JSON {type(parsed).__name__}, not an object")
    _check_depth(where, parsed)
    return parsed


def is_pointer(head: bytes) -> bool:
    """Whether a file that begins with ``head`` (8 bytes at least) is git-lfs's stand-in for another one."""
    start = head[: len(_POINTER)]
    return len(start) >= 8 and _POINTER.startswith(start)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, unless readers would differ about it: which of two values wins is not defined."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return found


def _check_depth(where: Path | str, parsed: dict[str, Any]) -> None:
    level: list[Any] = [parsed]
    for _ in range(MAX_JSON_DEPTH):
        if not level:
            return
        values = (value for item in level for value in (item.values() if isinstance(item, dict) else item))
        level = [value for value in values if isinstance(value, dict | list)]
    raise CheckpointError(f"{where} is nested more than {MAX_JSON_DEPTH} levels deep; no file of its kind is")
