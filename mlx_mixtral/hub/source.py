"""What a user names as a model, and which files of a repository that takes.

Only the files that are read are downloaded: Mixtral repositories carry the same weights two or three times over
(``model-*.safetensors``, ``consolidated*``, ``*.pt``), 90 GB each.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mlx_mixtral.arguments import as_path, check_type
from mlx_mixtral.errors import CheckpointError, HubError, InvalidRequestError
from mlx_mixtral.hub.download import INDEX, BytesDone, download, gguf_part
from mlx_mixtral.model_names import hub_name, not_there

__all__ = ["Source", "adapter_files", "resolve", "wanted_files"]

_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([^\s@:]+))?(?::([^\s/:]+\.gguf))?")
_SMALL = (
    "config.json", "generation_config.json", "params.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "tokenizer.model*", "chat_template.*", "conversion.json", "LICENSE*",
    "hf_quant_config.json",
    "quantize_config.json", "quant_config.json", "adapter_config.json",
)  # fmt: skip
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors")
# Weights that the converter reads besides: of the first kind that a repository has, all files.
_CONVERTIBLE = (
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ("consolidated*.safetensors",),
    ("consolidated.*.pth",),
    ("consolidated.*.pt",),
    ("weights*.npz",),
)


@dataclass(frozen=True)
class Source:
    """What a user names as a model: a ``path`` of this machine, or a ``repository`` of the hub, never both.

    ``name`` is the text as it was given, for messages; ``revision`` a repository's branch, tag or commit; ``file`` the one
    GGUF that a repository's name ends in.
    """

    name: str
    path: Path | None = None
    repository: str | None = None
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, source: str | Path, revision: str | None = None) -> Source:
        """Read a folder, a file, ``owner/name``, ``owner/name@revision`` or either with ``:file.gguf`` after it, or the address
        of a page of the hub (``hub_name``).

        What exists on this machine wins over a repository of the same name, and a ``Path`` is never a repository.

        Raises:
            InvalidRequestError: an empty name, a wrong type, a revision for what is here, two different revisions, or the
                address of something else than a model.
        """
        if isinstance(source, str) and not source:
            raise InvalidRequestError("the source is an empty name; write . for the current folder")
        path = as_path("source", source)
        check_type("revision", revision, (str, type(None)), "a branch, tag or commit, or None")
        if path.exists():
            if revision is not None:
                kind = "folder" if path.is_dir() else "file"
                raise InvalidRequestError(
                    f"{source} is a {kind}; revision {revision!r} applies to hub repositories only"
                )
            return cls(str(source), path)
        match = _REPOSITORY.fullmatch(hub_name(source)) if isinstance(source, str) else None
        if match is None:
            return cls(str(source), path)
        if revision is not None and match[2] is not None and match[2] != revision:
            raise InvalidRequestError(
                f"{source} names revision {match[2]!r}, the argument {revision!r}; give one of them"
            )
        return cls(str(source), repository=match[1], revision=match[2] or revision, file=match[3])

    def resolve(self, *, weights: bool = True, convertible: bool = False, progress: BytesDone | None = None) -> Path:
        """The folder it lies in, downloaded to the Hub's cache first if it is a repository; the file, if it names one.

        Args:
            weights: False leaves the weights out and brings the configuration and the tokenizer only.
            convertible: take a file, and weights that only the converter reads where there are no others.
            progress: told (done bytes, total bytes) while downloading, from the downloading threads.

        Raises:
            CheckpointError: there is no such folder, or it is a file.
            HubError: the repository is gated, private or absent, has no such revision, cannot be reached, or the disk is full.
        """
        path = self.path
        if path is not None and (path.is_dir() or (convertible and path.is_file())):
            return path
        is_file = path is not None and path.exists()
        if not convertible and (self.file is not None or (path is not None and is_file and path.suffix == ".gguf")):
            raise CheckpointError(
                f"{self.name} is a GGUF file, which has to be converted first: mlx-mixtral convert {self.name} DEST"
            )
        if is_file:
            raise CheckpointError(f"{self.name} is a file, not a checkpoint folder; give the folder it lies in")
        if self.repository is None:
            raise CheckpointError(not_there(self.name))
        wanted = functools.partial(wanted_files, weights=weights, convertible=convertible, file=self.file)
        downloaded = download(self.repository, self.revision, wanted, progress)
        return downloaded if self.file is None else downloaded / self.file

    def resolve_adapter(self, *, progress: BytesDone | None = None) -> Path:
        """The folder of an adapter, downloaded to the Hub's cache first if it is a repository.

        Raises:
            CheckpointError: there is no such folder, or it is a file.
            HubError: as for ``resolve``, or the repository holds no adapter.
        """
        if self.path is not None and self.path.is_dir():
            return self.path
        if self.file is not None or (self.path is not None and self.path.suffix == ".gguf"):
            raise CheckpointError(
                f"{self.name} is a GGUF file; adapters are read as PEFT or mlx-lm wrote them: give the folder it was made from"
            )
        if self.path is not None and self.path.exists():
            raise CheckpointError(f"{self.name} is a file, not an adapter's folder; give the folder it lies in")
        if self.repository is None:
            raise CheckpointError(not_there(self.name))
        return download(self.repository, self.revision, adapter_files, progress)

    def origin(self, resolved: Path) -> tuple[str, str | None]:
        """Repository and commit, or the name of the folder or file: never a path of this machine."""
        if self.repository is None:
            return resolved.resolve().name, None
        # The hub's cache names a snapshot's folder by its commit.
        return self.repository, (resolved.parent if resolved.is_file() else resolved).name


def resolve(
    source: str | Path,
    *,
    revision: str | None = None,
    weights: bool = True,
    convertible: bool = False,
    progress: BytesDone | None = None,
) -> Path:
    """``Source.parse`` and ``Source.resolve`` in one."""
    return Source.parse(source, revision).resolve(weights=weights, convertible=convertible, progress=progress)


def wanted_files(
    names: Iterable[str], *, weights: bool = True, convertible: bool = False, file: str | None = None
) -> list[str]:
    """The files of a repository that are read, among ``names``; files in subfolders never are.

    Args:
        convertible: take ``.bin``, ``consolidated`` or one GGUF where there are no ``model*.safetensors``.
        file: the GGUF to take, with the other parts of a split one.

    Raises:
        HubError: there are no such weights, or several GGUFs to choose from.
    """
    top = sorted(name for name in names if "/" not in name)
    small = [name for name in top if any(fnmatchcase(name, pattern) for pattern in _SMALL)]
    if not weights:
        return small
    if file is not None:
        return small + _gguf_parts(top, file)
    tensors = [name for name in top if name.endswith(".safetensors") and not name.startswith("consolidated")]
    # With an index only the files it can name count; adapters and the like may lie beside them.
    chosen = [name for name in tensors if name.startswith("model")] or tensors
    if not chosen and convertible and (found := _convertible(top)):
        return small + found
    if not chosen:
        others = [name for name in top if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".npz", ".gguf"))]
        there = f"only {others[0]}" + (f" and {len(others) - 1} more" if len(others) > 1 else "") if others else "none"
        fix = "choose one that has"
        if others and not convertible:
            fix = f"mlx-mixtral convert reads those, downloaded whole; or {fix}"
        raise HubError(f"the repository has no model*.safetensors weights ({there}); {fix}")
    return small + [name for name in top if name == INDEX] + chosen


def adapter_files(names: Iterable[str]) -> list[str]:
    """The files of a repository that an adapter is read from, among ``names``; files in subfolders never are.

    Raises:
        HubError: there are none, or weights that are not read.
    """
    there = sorted(names)
    chosen = [name for name in _ADAPTER if name in there]
    if len(chosen) > 1 and _ADAPTER[0] in chosen:
        return chosen
    if "adapter_model.bin" in there:
        raise HubError(
            "the repository has its adapter as a pickle only (adapter_model.bin), which can run code when it is opened and is "
            "not read; choose one with adapter_model.safetensors, or download it and save it again as safetensors"
        )
    if below := next((name for name in there if name.endswith(f"/{_ADAPTER[0]}")), None):
        fix = f"there is one in {below.rpartition('/')[0]}: download that folder and give its path"
    elif chosen:
        fix = f"there is only {chosen[0]}"
    elif any(name.endswith(".gguf") for name in there):
        fix = "adapters as GGUF are not read; choose one that PEFT or mlx-lm wrote"
    elif "config.json" in there:
        fix = "it holds a model"
    else:
        fix = "choose another"
    raise HubError(
        f"the repository has no adapter, which is {_ADAPTER[0]} beside {_ADAPTER[1]} or {_ADAPTER[2]}; {fix}"
    )


def _convertible(top: list[str]) -> list[str]:
    for patterns in _CONVERTIBLE:
        found = [name for name in top if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if any(fnmatchcase(name, patterns[0]) for name in found):
            return found
    models = [name for name in top if name.endswith(".gguf") and not _is_later_part(name)]
    if len(models) > 1:
        shown = ", ".join(models[:8]) + (" …" if len(models) > 8 else "")
        raise HubError(f"the repository has {len(models)} GGUF files; name one as owner/name:FILE, of {shown}")
    return _gguf_parts(top, models[0]) if models else []


def _is_later_part(name: str) -> bool:
    return gguf_part(name) is not None and "-00001-of-" not in name


def _gguf_parts(top: list[str], file: str) -> list[str]:
    if file not in top:
        there = [name for name in top if name.endswith(".gguf")]
        raise HubError(
            f"the repository has no file {file}; " + (f"it has {', '.join(there[:8])}" if there else "nor any GGUF")
        )
    part = gguf_part(file)
    if part is None:
        return [file]
    return [name for name in top if (other := gguf_part(name)) and other.groups() == part.groups()]
