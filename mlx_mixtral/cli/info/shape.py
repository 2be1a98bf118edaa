"""``info 8x7b``: what a published Mixtral weighs at each bit width, which Macs it fits, how fast their memory lets it be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mlx_mixtral.cli.console import figures, out_console, print_table
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.info.estimate import (
    BUILT_IN,
    PARTS,
    WIDTHS,
    WORKING_BYTES,
    bytes_by_part,
    bytes_per_token,
    context_that_fits,
    expert_bytes,
    parameters,
)
from mlx_mixtral.info.macs import MAC_MEMORY_GIB, MEASURED_8X7B, USABLE_NOTE, Chip, usable_bytes
from mlx_mixtral.sizes import format_bytes

__all__ = [
    "facts_of",
    "kv_cache",
    "memory_table_markdown",
    "print_kv_cache",
    "print_limits",
    "print_shape",
    "shape_report",
    "tokens_short",
]

PART_NAMES = {
    "embedding": "embedding",
    "attention": "attention",
    "router": "router",
    "expert": "experts",
    "head": "head",
    "norms": "norms",
    "norm": "norms",
}


def shape_report(name: str, chips: Sequence[Chip]) -> dict[str, Any]:
    """All that ``info 8x7b`` shows, as ``--json`` prints it."""
    config = BUILT_IN[name]
    widths: list[dict[str, Any]] = []
    for width in WIDTHS:
        parts = bytes_by_part(config, width)
        widths.append(
            {
                "bits": width.bits or 16,
                "bytes": sum(parts.values()),
                "parts": parts,
                "expert_bytes": expert_bytes(config, width),
                "bytes_per_token": bytes_per_token(config, parts),
            }
        )
    return {
        "model": name,
        **facts_of(config),
        "widths": widths,
        "kv_cache": kv_cache(config),
        **limits(config, {f"{w['bits']}-bit": (w["bytes"], w["bytes_per_token"]) for w in widths}, chips),
        "measured": [asdict(entry) for entry in MEASURED_8X7B] if name == "8x7b" else [],
    }


def facts_of(config: MixtralConfig) -> dict[str, Any]:
    """The shape in the field's own names."""
    total, active = parameters(config)
    return {
        "architecture": config.architecture,
        "parameters": total,
        "active_parameters": active,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "experts": config.num_local_experts,
        "experts_per_token": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
        "context": config.max_position_embeddings,
        "sliding_window": config.sliding_window,
    }


def kv_cache(config: MixtralConfig) -> dict[str, Any]:
    """Bytes of the 16-bit KV cache, a token and at whole contexts."""
    each, longest = config.kv_bytes_per_token(), config.max_position_embeddings
    contexts = sorted({count for count in (4096, 8192, 16384, 32768, 65536) if count <= longest} or {longest})
    return {"bytes_per_token": each, "bytes_by_context": {str(count): count * each for count in contexts}}


def limits(
    config: MixtralConfig, variants: Mapping[str, tuple[int, int]], chips: Sequence[Chip]
) -> dict[str, list[dict[str, Any]]]:
    """What fits which Mac, and how fast its memory lets it be: ``variants`` name (bytes, bytes read per token)."""
    return {
        "fits": [
            {
                "memory_gib": memory,
                "usable_bytes": usable_bytes(memory),
                "context": {
                    name: context_that_fits(config, weights, usable_bytes(memory))
                    for name, (weights, _) in variants.items()
                },
            }
            for memory in MAC_MEMORY_GIB
        ],
        "speed_bounds": [
            {
                "chip": chip.name,
                "bandwidth_gb_s": chip.bandwidth_gb_s,
                "tok_s": {name: chip.bandwidth_gb_s * 1e9 / read for name, (_, read) in variants.items()},
            }
            for chip in chips
        ],
    }


def print_shape(report: Mapping[str, Any]) -> None:
    """The report as tables of at most 80 columns."""
    console, widths = out_console(), report["widths"]
    console.print(f"Mixtral {report['model']}", style="bold")
    console.print(
        f"{report['parameters']:,} parameters, {report['active_parameters']:,} of them active per token\n"
        f"{report['layers']} layers, {report['experts']} experts, {report['experts_per_token']} per token, hidden "
        f"{report['hidden_size']}, context {report['context']:,} tokens\n"
    )
    names = [f"{width['bits']}-bit" for width in widths]
    rows = [[PART_NAMES[part], *[format_bytes(width["parts"][part]) for width in widths]] for part in PARTS]
    rows.append(["all", *[format_bytes(width["bytes"]) for width in widths]])
    rows.append(["one expert", *[format_bytes(width["expert_bytes"]) for width in widths]])
    rows.append(["read/token", *[format_bytes(width["bytes_per_token"]) for width in widths]])
    print_table("Weights in groups of 64, with scales and biases; router and norms in 16 bits", ["", *names], rows)
    print_kv_cache(report["kv_cache"])
    print_limits(report, names)
    if report["measured"]:
        print_table(
            "Measured by others (decode tok/s)",
            ["machine", "runtime", "source", "tok/s"],
            [[m["machine"], m["runtime"], m["source"], f"{m['decode_tok_s']:.1f}"] for m in report["measured"]],
            left=3,
        )
    console.print(
        f"Next: mlx-mixtral convert mistralai/Mixtral-{report['model']}-Instruct-v0.1 mixtral-4bit --bits 4".replace(
            "8x7b", "8x7B"
        ).replace("8x22b", "8x22B"),
        soft_wrap=True,
    )


def print_kv_cache(cache: Mapping[str, Any]) -> None:
    contexts = cache["bytes_by_context"]
    each = cache["bytes_per_token"] / 1024
    print_table(
        f"KV cache in 16 bits: {each:g} KiB a token",
        ["context", *[tokens_short(int(count)) for count in contexts]],
        [["bytes", *[format_bytes(count) for count in contexts.values()]]],
    )


def print_limits(report: Mapping[str, Any], names: Sequence[str]) -> None:
    """Which Macs it fits and the bound their bandwidth sets."""
    print_table(
        "Longest context that fits a Mac, in tokens (- : the weights do not fit)",
        ["memory", "for the GPU", *names],
        [
            [
                f"{row['memory_gib']} GB",
                format_bytes(row["usable_bytes"]),
                *[tokens_short(count) if count else "-" for count in row["context"].values()],
            ]
            for row in report["fits"]
        ],
    )
    out_console().print(
        f"{USABLE_NOTE}, less {format_bytes(WORKING_BYTES)} to work in. --memory sets a budget of your own.\n",
        style="dim",
    )
    print_table(
        "Upper bound of decode speed, tok/s: bandwidth over bytes read per token",
        ["chip", "GB/s", *names],
        [
            [row["chip"], f"{row['bandwidth_gb_s']:g}", *[figures(bound) for bound in row["tok_s"].values()]]
            for row in report["speed_bounds"]
        ],
    )


def tokens_short(count: int) -> str:
    """``32k`` for 32768, ``1.5k`` for 1536; rounded down."""
    if count < 1024:
        return str(count)
    return f"{count // 1024}k" if count >= 10240 or count % 1024 == 0 else f"{count // 102.4 / 10:g}k"


def memory_table_markdown() -> str:
    """Sizes of both models by bits, as the README shows them."""
    lines = [f"| | {' | '.join(width.name for width in WIDTHS)} |", f"|---|{'---:|' * len(WIDTHS)}"]
    for name, config in BUILT_IN.items():
        sizes = [format_bytes(sum(bytes_by_part(config, width).values())) for width in WIDTHS]
        lines.append(f"| Mixtral {name.replace('b', 'B')} | {' | '.join(sizes)} |")
    return "\n".join(lines)
