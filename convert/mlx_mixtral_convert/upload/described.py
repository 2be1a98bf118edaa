"""What a card says of a conversion, read from what was written: a folder's manifest and headers, or a GGUF file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mixtral.arguments import is_number
from mlx_mixtral.config.layout import matrices, norms
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.reading import read_json
from mlx_mixtral.weights.dtypes import FLOATS
from mlx_mixtral.weights.manifest import MANIFEST, read_manifest
from mlx_mixtral_convert.packing.measure import digits
from mlx_mixtral_convert.sources import open_source
from mlx_mixtral_convert.sources.gguf.source import GgufSource
from mlx_mixtral_convert.verification import verify

__all__ = ["Uploadable", "describe", "stated_licence"]

WORST_SHOWN = 5
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# How licences that people copy beside weights begin, and the hub's names of them.
_LICENCES = {"apache license version 2.0": "apache-2.0", "mit license": "mit"}


@dataclass(frozen=True)
class Uploadable:
    """One conversion: ``kind`` is mlx, hf or gguf, ``files`` by their names in the repository.

    ``types`` counts weights by how they are stored; ``worst`` has path, packing and relative error of the matrices that lost
    most; ``quantised`` is whether any weight is. ``template`` is whether there is a chat format.
    """

    kind: str
    files: Mapping[str, Path]
    source: str
    revision: str | None
    parameters: int
    nbytes: int
    types: Mapping[str, int]
    quantised: bool
    worst: tuple[tuple[str, str, float], ...]
    template: bool
    adapters: tuple[tuple[str, str, float], ...] = ()
    """Name, kind and scale of what was fused in."""

    @property
    def repository(self) -> str | None:
        """The hub repository it was made from, if it was."""
        return self.source if self.revision is not None and _REPOSITORY.fullmatch(self.source) else None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters


def describe(path: Path) -> Uploadable:
    """Verify a conversion and say what it is. Everything that will be uploaded is listed; hidden files never are.

    Raises:
        CheckpointError: not as it was written, damaged, or no conversion at all.
        ConfigError: another architecture.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such folder or file")
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path} is neither a converted folder nor a GGUF file; give one of the two")
    return _gguf(path)


def _folder(path: Path) -> Uploadable:
    entries = read_manifest(path)
    if entries is None:
        raise CheckpointError(
            f"{path} has no {MANIFEST}, so it cannot be verified; convert it first: mlx-mixtral convert {path} DEST"
        )
    found = verify(path)
    if not found.ok:
        first = found.problems[0]
        more = f" and {len(found.problems) - 1} more" if len(found.problems) > 1 else ""
        raise CheckpointError(
            f"{path} has changed since the conversion: {first.what}: {first.problem}{more}; see mlx-mixtral verify {path}, "
            "or convert again"
        )
    manifest = read_json(path / MANIFEST)
    source = manifest.get("source")
    source = source if isinstance(source, Mapping) else {}
    revision = source.get("revision")
    files = {name: path / name for name in (*entries, MANIFEST)}
    kind = "hf" if manifest.get("export") == "hf" else "mlx"
    with open_source(path, "auto") as opened:
        config = opened.config
        types: Counter[str] = Counter()
        for matrix in matrices(config):
            native = opened.native(matrix) if hasattr(opened, "native") else None
            types[opened.dtype(matrix) if native is None else str(native.spec)] += matrix.parameters
    return Uploadable(
        kind,
        files,
        str(source.get("name") or path.resolve().name),
        revision if isinstance(revision, str) else None,
        sum(types.values()) + sum(norm.size for norm in norms(config)),
        sum(entry.nbytes for name, entry in entries.items() if name.endswith(".safetensors")),
        types,
        bool(set(types) - set(FLOATS)),
        tuple(_worst(manifest)),
        any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
        or bool(_settings(path).get("chat_template")),
        tuple(_adapters(manifest)),
    )


def _settings(path: Path) -> Mapping[str, Any]:
    return read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}


def _worst(manifest: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    errors = manifest.get("errors")
    found = [
        (str(name), str(entry.get("spec", "")), digits(float(entry["relative_rms"])))
        for name, entry in (errors.items() if isinstance(errors, Mapping) else ())
        if isinstance(entry, Mapping) and is_number(entry.get("relative_rms"))
    ]
    return sorted(found, key=lambda entry: (-entry[2], entry[0]))[:WORST_SHOWN]


def _adapters(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    found = manifest.get("adapters")
    for entry in found if isinstance(found, list) else ():
        if isinstance(entry, Mapping) and is_number(entry.get("scale")):
            yield str(entry.get("name", "")), str(entry.get("kind", "")), float(entry["scale"])


def _gguf(path: Path) -> Uploadable:
    with open_source(path, "gguf") as opened:
        assert isinstance(opened, GgufSource)
        config, types = opened.config, Counter[str]()
        for matrix in matrices(config):
            types[opened.type_name(matrix)] += matrix.parameters
        return Uploadable(
            "gguf",
            {path.name: path},
            path.stem,
            None,
            sum(types.values()) + sum(norm.size for norm in norms(config)),
            path.stat().st_size,
            types,
            bool(set(types) - set(FLOATS)),
            (),
            any(name.startswith("chat_template") for name in opened.small_files())
            or b"chat_template" in opened.small_files().get("tokenizer_config.json", b""),
        )


def stated_licence(folder: Path) -> str | None:
    """The hub's name of a licence: from the card of a checkpoint's folder, or known by the text beside it; None otherwise."""
    card = folder / "README.md"
    if card.is_file():
        from huggingface_hub import ModelCard

        try:
            found = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
        except (ValueError, UnicodeDecodeError):
            found = None
        if isinstance(found, str):
            return found
    for path in sorted(folder.glob("LICENSE*")):
        head = " ".join(path.read_bytes()[:2000].decode(errors="replace").split()).lower().replace(", ", " ")
        for beginning, name in _LICENCES.items():
            if beginning in head:
                return name
    return None
