"""``info FOLDER``: what a checkpoint is, from its configuration and the headers of its files; no weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_mixtral.config.layout import FIELDS, locate, matrices, norms
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.overrides import ConfigOverrides
from mlx_mixtral.errors import CheckpointError, MissingDependencyError, MixtralError, TokenizerError
from mlx_mixtral.info.estimate import PARTS, bytes_per_token
from mlx_mixtral.info.macs import Chip
from mlx_mixtral.info.shape import facts_of, kv_cache, limits
from mlx_mixtral.machine.device import DTYPE_NAMES
from mlx_mixtral.model.build import Builder
from mlx_mixtral.reading import is_there, read_json
from mlx_mixtral.tokenizer import load_tokenizer
from mlx_mixtral.weights.checkpoint import Checkpoint
from mlx_mixtral.weights.manifest import MANIFEST, MAX_MANIFEST_BYTES

__all__ = ["checkpoint_report"]

KINDS = {"SentencePieceTokenizer": "SentencePiece", "JsonTokenizer": "tokenizer.json"}


def checkpoint_report(
    folder: Path, chips: Sequence[Chip], *, downloaded: bool = False, overrides: ConfigOverrides | None = None
) -> dict[str, Any]:
    """All that ``info FOLDER`` shows, as ``--json`` prints it.

    Of a repository (``downloaded``) only the small files are fetched: unless its weights are in the hub's cache already,
    sizes are those the configuration promises. ``problem`` says why the folder will not load as it is, where that is so; the
    configuration is shown all the same.

    Raises:
        CheckpointError, ConfigError: the folder has no configuration, or one of another architecture.
    """
    config = (overrides or ConfigOverrides()).apply(MixtralConfig.from_folder(folder))
    report: dict[str, Any] = {
        **facts_of(config),
        "kv_cache": kv_cache(config),
        "problem": None,
        "tokenizer": _tokenizer(folder, config),
        "conversion": _conversion(folder),
    }
    if downloaded and not any(folder.glob("*.safetensors")):
        return report | _promised(config, chips)
    try:
        return report | _weights(config, Checkpoint(folder), chips)
    except MixtralError as error:
        return report | {"problem": str(error)}


def _conversion(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    return read_json(path, MAX_MANIFEST_BYTES) if is_there(path) else None


def _weights(config: MixtralConfig, checkpoint: Checkpoint, chips: Sequence[Chip]) -> dict[str, Any]:
    """Bytes as the headers have them."""
    builder = Builder(config, checkpoint, "BF16")
    parts = {part: _Part() for part in PARTS}
    used: set[str] = set()
    for matrix in matrices(config):
        spec, part = builder.specs[matrix.path], parts[matrix.part]
        part.parameters += matrix.parameters
        for name in FIELDS:
            for rows in locate(matrix, name, checkpoint) or []:
                info = checkpoint[rows.name]
                used.add(rows.name)
                part.bytes += (rows.stop - rows.start) * info.row_bytes
                if name == "weight":
                    part.formats[str(spec) if spec else DTYPE_NAMES[info.dtype]] = None
    for norm in norms(config):
        info = checkpoint[f"{norm.path}.weight"]
        used.add(f"{norm.path}.weight")
        parts["norms"].add(norm.size, info.nbytes, DTYPE_NAMES[info.dtype])
    named = {file.name for file in checkpoint.files}
    return {
        **_sizes(config, parts, chips),
        "files": len(named),
        "unused_tensors": sorted(set(checkpoint) - used),
        "unused_files": sorted(f.name for f in checkpoint.folder.glob("*.safetensors") if f.name not in named),
    }


def _promised(config: MixtralConfig, chips: Sequence[Chip]) -> dict[str, Any]:
    """Bytes as the configuration promises them, for a repository whose weights are not here."""
    parts = {part: _Part() for part in PARTS}
    for matrix in matrices(config):
        spec = config.quantization.for_module(matrix.path) if config.quantization else None
        rows = matrix.parameters // matrix.in_features
        nbytes = 2 * matrix.parameters if spec is None else spec.nbytes(rows, matrix.in_features)
        parts[matrix.part].add(matrix.parameters, nbytes, str(spec) if spec else "16-bit")
    for norm in norms(config):
        parts["norms"].add(norm.size, 2 * norm.size, "16-bit")
    return {**_sizes(config, parts, chips), "files": 0, "unused_tensors": [], "unused_files": []}


@dataclass
class _Part:
    parameters: int = 0
    bytes: int = 0
    formats: dict[str, None] = field(default_factory=dict)

    def add(self, parameters: int, nbytes: int, name: str) -> None:
        self.parameters += parameters
        self.bytes += nbytes
        self.formats[name] = None


def _sizes(config: MixtralConfig, parts: Mapping[str, _Part], chips: Sequence[Chip]) -> dict[str, Any]:
    total = sum(part.bytes for part in parts.values())
    read = bytes_per_token(config, {name: part.bytes for name, part in parts.items()})
    return {
        "bytes": total,
        "bits_per_weight": 8 * total / sum(part.parameters for part in parts.values()),
        "bytes_per_token": read,
        "parts": [
            {
                "part": name,
                "parameters": part.parameters,
                "bytes": part.bytes,
                "bits_per_weight": 8 * part.bytes / part.parameters,
                "formats": list(part.formats),
            }
            for name, part in parts.items()
            if part.parameters
        ],
        **limits(config, {"this model": (total, read)}, chips),
    }


def _tokenizer(folder: Path, config: MixtralConfig) -> dict[str, Any]:
    try:
        found = load_tokenizer(folder, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
    except (TokenizerError, MissingDependencyError, CheckpointError) as error:
        return {"kind": None, "problem": str(error)}
    return {
        "kind": KINDS.get(type(found).__name__, type(found).__name__),
        "vocab_size": found.vocab_size,
        "chat_format": found.chat_format,
        "chat_origin": found.chat_origin,
        "notes": list(found.notes),
        "eos_token_ids": sorted(found.eos_token_ids),
    }
