"""The files beside the weights: config.json, the copied tokenizer, and conversion.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_mixtral import __version__
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.files import replace_file
from mlx_mixtral_convert.output.plan import Plan
from mlx_mixtral_convert.packing.measure import MatrixError

__all__ = [
    "DTYPE_NAMES",
    "Origin",
    "conversion_text",
    "copied_files",
    "model_config_text",
    "read_file",
    "write_small_files",
]

DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Origin = Mapping[str, Any]

_COPIED = (
    "tokenizer.model*", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.*", "generation_config.json", "LICENSE*",
)  # fmt: skip
# What described the source's packing, or the machine it lay on.
_DROPPED = ("quantization", "quantization_config", "compression_config", "_name_or_path")


def copied_files(folder: Path) -> list[Path]:
    """Tokenizer, generation settings and licence of a source, in order of name. Links count as the files they lead to."""
    found = {path for pattern in _COPIED for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def read_file(path: Path) -> bytes:
    """A small file's bytes.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def write_small_files(folder: Path, files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Write files by name; what ``conversion.json`` says of each."""
    for name, data in files.items():
        replace_file(folder / name, data)
    return {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}


def model_config_text(entries: Mapping[str, Any], plan: Plan, default: QuantizationSpec | None) -> bytes:
    """The output's config.json: the source's entries with this float type, and the packing by ``default`` and what differs."""
    config = {key: value for key, value in entries.items() if key not in _DROPPED}
    spelled = [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]
    config |= dict.fromkeys(spelled, DTYPE_NAMES[plan.dtype])
    # mlx-lm's Mixtral reads only the older spelling and assumes 1e6 without it.
    config.setdefault("rope_theta", plan.config.rope.theta)
    if (quantization := plan.quantization(default)) is not None:
        # Twice, as mlx-lm writes it: the hub's pages read the second.
        config |= dict.fromkeys(("quantization", "quantization_config"), quantization.to_dict())
    return _json(config)


def conversion_text(
    origin: Origin,
    plan: Plan,
    recipe: Mapping[str, Any],
    errors: Iterable[MatrixError],
    files: Mapping[str, Mapping[str, Any]],
) -> bytes:
    """The output's conversion.json: where it came from, how, and what it is. No times: two runs give the same bytes."""
    return _json(
        {
            "converter": {"name": "mlx-mixtral", "version": __version__},
            "source": origin,
            "recipe": recipe,
            "dtype": DTYPE_NAMES[plan.dtype],
            "parameters": plan.parameters,
            "bits_per_weight": round(8 * plan.data_bytes / plan.parameters, 6),
            "files": {name: files[name] for name in sorted(files)},
            "errors": {
                error.path: {"spec": error.spec, "relative_rms": error.relative_rms, "worst": error.worst}
                | _kept(plan, error.path)
                for error in errors
            },
        }
    )


def _kept(plan: Plan, path: str) -> dict[str, str]:
    """Of an exact conversion: the type a matrix had, and whether its values are the same."""
    how = plan.exactness(path)
    return {} if how is None else {"source_type": plan.native[path].type_name, "packing": how}


def _json(entries: Mapping[str, Any]) -> bytes:
    # Half a surrogate pair has no UTF-8; JSON's escape for it is the one Python writes.
    return (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
