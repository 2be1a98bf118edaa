"""The files beside the weights: config.json, the copied tokenizer, and conversion.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_mixtral import __version__
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.files import replace_file
from mlx_mixtral.machine.device import DTYPE_NAMES
from mlx_mixtral_convert.output.plan import Plan
from mlx_mixtral_convert.packing.measure import MatrixError

__all__ = [
    "Origin",
    "conversion_text",
    "export_text",
    "model_config_text",
    "write_small_files",
]

Origin = Mapping[str, Any]

_CONVERTER = {"converter": {"name": "mlx-mixtral", "version": __version__}}
# What described the source's packing, or the machine it lay on.
_DROPPED = ("quantization", "quantization_config", "compression_config", "_name_or_path")
# Where these are true, the source had biases of zeros, which are left out.
_BIASES = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias")


def write_small_files(folder: Path, files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Write files by name; what ``conversion.json`` says of each."""
    for name, data in files.items():
        replace_file(folder / name, data)
    return {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}


def model_config_text(entries: Mapping[str, Any], plan: Plan, default: QuantizationSpec | None = None) -> bytes:
    """The output's config.json: the source's entries with this float type, and the packing by ``default`` and what differs."""
    config = {key: False if key in _BIASES else value for key, value in entries.items() if key not in _DROPPED}
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
    adapters: Sequence[Mapping[str, Any]] = (),
) -> bytes:
    """The output's conversion.json: where it came from, how, and what it is. No times: two runs give the same bytes."""
    bits = {"bits_per_weight": round(8 * plan.data_bytes / plan.parameters, 6)}
    measured = {
        error.path: {"spec": error.spec, "relative_rms": error.relative_rms, "worst": error.worst}
        | _kept(plan, error.path)
        for error in errors
    }
    return _json(
        _CONVERTER
        | {"source": origin}
        | ({"adapters": list(adapters)} if adapters else {})
        | {"recipe": recipe}
        | _described(plan)
        | bits
        | _listed(files)
        | {"errors": measured}
    )


def export_text(kind: str, origin: Origin, plan: Plan, files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The same of an export, by which a later one knows the folder as one it may replace."""
    return _json(_CONVERTER | {"export": kind, "source": origin} | _described(plan) | _listed(files))


def _described(plan: Plan) -> dict[str, Any]:
    return {"dtype": DTYPE_NAMES[plan.dtype], "parameters": plan.parameters}


def _listed(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {"files": dict(sorted(files.items()))}


def _kept(plan: Plan, path: str) -> dict[str, str]:
    """Of an exact conversion: the type a matrix had, and whether its values are the same."""
    how = plan.exactness(path)
    return {} if how is None else {"source_type": plan.native[path].type_name, "packing": how}


def _json(entries: Mapping[str, Any]) -> bytes:
    # Half a surrogate pair has no UTF-8; JSON's escape for it is the one Python writes.
    return (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
