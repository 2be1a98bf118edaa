"""The parts of a report about the checkpoint itself: where it comes from, its packing, its errors, the memory it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_mixtral.arguments import is_number
from mlx_mixtral.evaluation.report.contents import Contents
from mlx_mixtral.evaluation.report.markdown import escaped, table
from mlx_mixtral.sizes import format_bytes

__all__ = ["checkpoint_part", "memory_part"]

WORST_SHOWN = 5
OVERRIDES_SHOWN = 6


def checkpoint_part(contents: Contents) -> Iterator[str]:
    """Shape, source and recipe; bits and bytes by part; the largest quantisation errors."""
    facts = contents.facts
    conversion = facts["conversion"] if isinstance(facts["conversion"], Mapping) else None
    lines = [_shape(facts), f"{format_bytes(facts['bytes'])}, {facts['bits_per_weight']:.2f} bits per weight"]
    if conversion is None:
        lines.append("There is no conversion.json, so its source is unknown")
    else:
        lines += _provenance(conversion)
    if (adapter := contents.adapter) is not None:
        lines.append(
            f"Measured with the adapter {adapter['name']} ({adapter['kind']}, scale {adapter['scale']:g}, sha256 "
            f"{adapter['fingerprint'][:12]}…), which is no part of the sizes here"
        )
    yield "### Checkpoint"
    yield "\n".join(f"- {escaped(line)}" for line in lines)
    rows = [
        [
            part["part"],
            ", ".join(part["formats"]),
            f"{part['parameters']:,}",
            f"{part['bits_per_weight']:.2f}",
            format_bytes(part["bytes"]),
        ]
        for part in facts["parts"]
    ]
    total = f"{facts['parameters']:,}", f"{facts['bits_per_weight']:.2f}", format_bytes(facts["bytes"])
    yield table(["part", "format", "parameters", "bits per weight", "bytes"], [*rows, ["all", "", *total]], left=2)
    if conversion is not None:
        yield from _errors(conversion)


def memory_part(contents: Contents) -> Iterator[str]:
    """Bytes of weights and KV cache, and the longest context on each size of Mac."""
    facts, cache = contents.facts, contents.facts["kv_cache"]
    yield "### Memory"
    contexts = ", ".join(f"{format_bytes(n)} for {int(c):,} tokens" for c, n in cache["bytes_by_context"].items())
    yield (
        f"Weights {format_bytes(facts['bytes'])}, of which {format_bytes(facts['bytes_per_token'])} are read for one token. "
        f"KV cache in 16 bits {cache['bytes_per_token'] / 1024:g} KiB per token: {contexts}."
    )
    rows = []
    for row in facts["fits"]:
        (longest,) = row["context"].values()
        # Larger Macs would repeat this row.
        is_all = longest >= facts["context"]
        memory = f"{row['memory_gib']} GB{' and more' * is_all}"
        rows.append([memory, format_bytes(row["usable_bytes"]), _context(longest)])
        if is_all:
            break
    yield table(["Mac's memory", "for the GPU", "longest context, tokens"], rows)
    if contents.fits_note:
        yield escaped(contents.fits_note)


def _context(tokens: int) -> str:
    return f"{tokens:,}" if tokens else "experts streamed from disk"


def _shape(facts: Mapping[str, Any]) -> str:
    text = f"{facts['parameters']:,} parameters, {facts['layers']} layers, hidden size {facts['hidden_size']:,}, "
    if facts["architecture"] == "mixtral":
        text += f"{facts['experts_per_token']} of {facts['experts']} experts per token "
        text += f"({facts['active_parameters']:,} parameters active), "
    return f"{text}vocabulary {facts['vocab_size']:,}, context {facts['context']:,} tokens"


def _provenance(conversion: Mapping[str, Any]) -> list[str]:
    """What a ``conversion.json`` says; it may come from anyone, so nothing in it is trusted."""
    lines = []
    source = _mapping(conversion.get("source"))
    if isinstance(name := source.get("name"), str) and name:
        revision = source.get("revision")
        lines.append(f"Source: {name}" + (f", revision {revision}" if isinstance(revision, str) and revision else ""))
    if recipe := _mapping(conversion.get("recipe")):
        lines.append(f"Recipe: {_recipe(recipe)}; scales, norms and unquantised weights in {conversion.get('dtype')}")
    converter = _mapping(conversion.get("converter"))
    if isinstance(converter.get("name"), str):
        lines.append(f"Converted by {converter['name']} {converter.get('version', '')}".rstrip())
    return lines


def _recipe(recipe: Mapping[str, Any]) -> str:
    if recipe.get("exact") is True:
        text = "the packing of the source, wherever MLX has it"
    elif recipe.get("bits") is None:
        text = "not quantised"
    else:
        text = _packing(recipe)
    if isinstance(rounding := recipe.get("rounding"), str):
        text += f", rounded by {rounding}"
    if isinstance(calibration := recipe.get("calibration"), str):
        text += f", with a calibration (sha256 {calibration[:12]}…)"
    overrides = _mapping(recipe.get("overrides"))
    shown = [f"{pattern}: {_packing(spec)}" for pattern, spec in list(overrides.items())[:OVERRIDES_SHOWN]]
    if more := len(overrides) - len(shown):
        shown.append(f"{more} more modules")
    return f"{text}; otherwise {', '.join(shown)}" if shown else text


def _packing(spec: object) -> str:
    found = _mapping(spec)
    if not found or found.get("bits") is None:
        return "not quantised"
    mode = found.get("mode", "affine")
    text = f"{found['bits']} bits in groups of {found.get('group_size')}"
    return text if mode == "affine" else f"{text} ({mode})"


def _errors(conversion: Mapping[str, Any]) -> Iterator[str]:
    entries = []
    for path, entry in _mapping(conversion.get("errors")).items():
        error = _mapping(entry).get("relative_rms")
        if is_number(error):
            entries.append((float(error), str(path), str(entry.get("spec", ""))))
    if not entries:
        return
    entries.sort(key=lambda entry: (-entry[0], entry[1]))
    yield f"Largest relative errors ‖w − ŵ‖ / ‖w‖ of {len(entries)} quantised tensors:"
    rows = [[path.removeprefix("model."), spec, f"{error:.2%}"] for error, path, spec in entries[:WORST_SHOWN]]
    yield table(["tensor", "packed as", "relative error"], rows, left=2)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
