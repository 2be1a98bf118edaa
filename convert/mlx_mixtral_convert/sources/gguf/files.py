"""Which files a GGUF model consists of: one, or a set split as ``NAME-00001-of-0000N.gguf``."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_mixtral.errors import CheckpointError
from mlx_mixtral_convert.sources.gguf.header import GgufHeader, is_gguf
from mlx_mixtral_convert.sources.storage.local import Storage

__all__ = ["check_split", "gguf_files", "model_files"]

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def gguf_files(storage: Storage) -> list[Path]:
    """The GGUF files there are, by content."""
    return [file for file in storage.glob("*.gguf") if is_gguf(storage, file)]


def model_files(storage: Storage) -> tuple[Path, ...]:
    """The files of the one model there is, or of the one named by any of them, in order.

    Raises:
        CheckpointError: none, several models, or a part of a set missing.
    """
    path = storage.named
    if path is None:
        found = gguf_files(storage)
        sets = {_SPLIT.sub(r"\1-of-\3", file.name) for file in found}
        if len(sets) != 1:
            listed = ", ".join(file.name for file in found[:3])
            raise CheckpointError(
                f"{storage.path} holds {len(sets)} GGUF models ({listed}); name the file to convert" if found
                else f"{storage.path} holds no GGUF file"
            )  # fmt: skip
        path = found[0]
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match[3])
    if not 1 <= count <= 1024:
        raise CheckpointError(f"{path}: a set of {count} files; the limit is 1024")
    names = [f"{match[1]}-{number:05}-of-{match[3]}.gguf" for number in range(1, count + 1)]
    if missing := [name for name in names if not storage.has(name)]:
        raise CheckpointError(f"{path.parent}: {missing[0]} is missing; it is one of the {count} files of the model")
    return tuple(map(storage.at, names))


def check_split(headers: list[GgufHeader]) -> None:
    """Raise CheckpointError unless what the files say of the set they belong to is what was found."""
    for header in headers:
        for key in ("split.no", "split.count"):
            if not isinstance(said := header.keys.get(key, 0), int):
                raise CheckpointError(f"{header.path}: the key {key} is {said!r:.60}, not a number")
    count = headers[0].keys.get("split.count", 0) or 1
    if count != len(headers):
        raise CheckpointError(
            f"{headers[0].path} is one of {count} files of a model, but there are {len(headers)}; "
            "keep their original names (…-00001-of-0000N.gguf)"
        )
    for number, header in enumerate(headers):
        said = header.keys.get("split.no", 0)
        if said != number or (header.keys.get("split.count", 0) or 1) != count:
            raise CheckpointError(
                f"{header.path} says it is part {said + 1}, but its name says {number + 1}; it was renamed"
            )
    expected, found = headers[0].keys.get("split.tensors.count"), sum(len(header.tensors) for header in headers)
    if expected is not None and expected != found:
        raise CheckpointError(f"{headers[0].path} says its files have {expected} tensors; there are {found}")
