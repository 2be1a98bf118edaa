"""Which conversion of a published Mixtral to take for a Mac of each memory: its size, bits, expected loss and speed.

    fits       ``convert --fit`` with the largest size that leaves room for 4k tokens of KV cache, as ``--fit mac`` takes it
    streamed   the smallest conversion that is advised, with the experts that do not fit read from disk
    whole      unquantised

Sizes are arithmetic. Losses are measured, but on a small model; speeds are bounds of published bandwidths where all fits, and
otherwise what the planner of streamed experts predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np

from mlx_mixtral.budget.slots import Speeds
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.config.quantization import QuantizationSpec
from mlx_mixtral.info.estimate import WORKING_BYTES, bytes_packed, bytes_per_token, parameters
from mlx_mixtral.info.macs import CHIPS, MAC_MEMORY_GIB, Chip, usable_bytes
from mlx_mixtral.info.plans import DEFAULT_DISK, READBACK_S, plan_of
from mlx_mixtral.sizes import parse_size

__all__ = [
    "CONTEXT_TOKENS",
    "MEASURED_KL",
    "RECIPE_CHIPS",
    "RECIPE_NOTE",
    "expected_kl",
    "recipes_for",
    "room",
    "smallest",
]

CONTEXT_TOKENS = 4096
"""Tokens of KV cache that a recipe leaves room for, as ``--fit mac`` does."""

MEASURED_KL = (
    (2.100, 0.17268),
    (2.200, 0.12696),
    (2.300, 0.11975),
    (2.400, 0.08322),
    (2.500, 0.07267),
    (2.750, 0.06185),
    (3.000, 0.04564),
    (3.249, 0.02818),
    (3.500, 0.02074),
    (3.749, 0.01535),
    (3.999, 0.01143),
    (4.248, 0.00782),
    (4.499, 0.00536),
)
"""Bits a weight, and KL to the unquantised model in nats per token on held-out text: ``ours fit to N bits, gptq`` of the
bundled checkpoint, 8.4 million parameters, in tests/benchmarks/quality.md."""

RECIPE_NOTE = (
    f"Leaves room for {CONTEXT_TOKENS // 1024}k tokens of KV cache, as --fit mac does on that Mac. Loss: KL to the "
    "unquantised model in nats per token, measured on the bundled checkpoint of 8.4 million parameters, with --rounding gptq "
    "and a calibration with --sensitivities. Other models differ, and large ones usually lose less at the same bits: calibrate "
    "yours, and convert --fit prints what it should lose. More bits than the loss needs only cost speed. tok/s: upper bound of "
    "the chip's bandwidth; * is a prediction for experts that do not fit, read from a disk of "
    f"{DEFAULT_DISK[:-2]} GB/s, with --memory set to what the GPU may use."
)

# Advised throughout a model at least. `--fit` goes lower, with one bit in some matrices: no large model was measured there.
FEWEST = QuantizationSpec(2, 128)
# More than the headers of a conversion's files take, which --fit counts.
HEADER_BYTES = 2_000_000
GB = 10**9

RECIPE_CHIPS = {
    16: ("M4",),
    24: ("M4", "M4 Pro"),
    32: ("M4", "M2 Max"),
    36: ("M3 Pro", "M4 Max 32-core"),
    48: ("M4 Pro", "M4 Max 40-core"),
    64: ("M4 Pro", "M4 Max 40-core"),
    96: ("M2 Max", "M3 Ultra"),
    128: ("M4 Max 40-core", "M2 Ultra"),
    192: ("M2 Ultra",),
}
"""Chips that were sold with so many GiB of memory, slowest first; not all of them."""


def recipes_for(config: MixtralConfig, chips: Sequence[Chip] = CHIPS) -> list[dict[str, Any]]:
    """A recipe for each of ``MAC_MEMORY_GIB``, as ``info 8x7b --json`` prints it.

    Speeds are those of ``chips``, in tokens per second; of some that were sold with that memory where all are given.
    """
    return [_recipe(config, memory, _chips(memory, chips)) for memory in MAC_MEMORY_GIB]


def room(config: MixtralConfig, usable: int) -> int:
    """Bytes for weights of ``usable`` ones, less ``CONTEXT_TOKENS`` of KV cache and working memory; may be negative."""
    tokens = min(CONTEXT_TOKENS, config.max_context_tokens)
    return usable - tokens * config.kv_bytes_per_token() - WORKING_BYTES


def smallest(config: MixtralConfig) -> int:
    """The least size that is advised, that of ``FEWEST`` throughout, in bytes, rounded up to a tenth of a GB."""
    return ceil((sum(bytes_packed(config, FEWEST).values()) + HEADER_BYTES) / (GB // 10)) * (GB // 10)


def expected_kl(bits: float) -> tuple[float, str]:
    """Nats per token at ``bits`` a weight: between the measured points the logarithm is taken as linear.

    Beyond them it is the outermost one, and the second value says so: ``about``, ``more than`` or ``less than``.
    """
    points = np.array(MEASURED_KL)
    kl = float(np.exp(np.interp(bits, points[:, 0], np.log(points[:, 1]))))
    if bits < points[0, 0]:
        return kl, "more than"
    return kl, "less than" if bits > points[-1, 0] else "about"


def _chips(memory_gib: int, chips: Sequence[Chip]) -> Sequence[Chip]:
    if tuple(chips) != CHIPS:
        return chips
    return [next(chip for chip in CHIPS if chip.name == name) for name in RECIPE_CHIPS[memory_gib]]


def _recipe(config: MixtralConfig, memory_gib: int, chips: Sequence[Chip]) -> dict[str, Any]:
    usable, unquantised, least = usable_bytes(memory_gib), bytes_packed(config, None), smallest(config)
    found: dict[str, Any] = {"memory_gib": memory_gib, "usable_bytes": usable, "memory": None}
    if (space := room(config, usable)) >= sum(unquantised.values()):
        read = bytes_per_token(config, unquantised)
        found |= {
            "kind": "whole",
            "convert": "--bits none",
            "bytes": sum(unquantised.values()),
            "bits_per_weight": 16.0,
        }
        return found | {"expected_kl": 0.0, "kl_is": "exactly", "tok_s": _bounds(read, chips)}
    fits = space >= least
    size = max(space // GB * GB, least) if fits else least
    bits = 8 * size / parameters(config)[0]
    kl, kl_is = expected_kl(bits)
    found |= {"kind": "fits" if fits else "streamed", "convert": f"--fit {size / GB:g}GB", "bytes": size}
    found |= {"bits_per_weight": bits, "expected_kl": kl, "kl_is": kl_is}
    if fits:
        # As if all matrices had the same bits: attention, read whole, gets more of them, which a bound may leave out.
        read = bytes_per_token(config, unquantised) * size // sum(unquantised.values())
        return found | {"tok_s": _bounds(read, chips)}
    memory = f"{usable // GB}GB"
    return found | {"memory": memory, "tok_s": _streamed(config, memory, chips)}


def _bounds(read: int, chips: Sequence[Chip]) -> dict[str, float | None]:
    """Bandwidth over bytes read per token: nothing can be faster."""
    return {chip.name: chip.bandwidth_gb_s * 1e9 / read for chip in chips}


def _streamed(config: MixtralConfig, memory: str, chips: Sequence[Chip]) -> dict[str, float | None]:
    """Predictions for the smallest conversion under a budget; None where it cannot run in it."""
    parts, tokens = bytes_packed(config, FEWEST), min(CONTEXT_TOKENS, config.max_context_tokens)
    found: dict[str, float | None] = {}
    for chip in chips:
        speeds = Speeds(float(parse_size(DEFAULT_DISK)), chip.bandwidth_gb_s * 1e9, READBACK_S)
        found[chip.name] = plan_of(chip.name, config, parts, memory, tokens, speeds).get("predicted_tok_s")
    return found
