"""Published facts about Macs: memory bandwidth of the chips, what the GPU may use, speeds others measured for Mixtral 8x7B."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.info.estimate import BUILT_IN

if TYPE_CHECKING:
    from mlx_mixtral.machine.device import Device  # imports MLX, which listing chips is to be quick without

__all__ = [
    "BANDWIDTH_SOURCE",
    "CHIPS",
    "MAC_MEMORY_GIB",
    "MEASURED_8X7B",
    "USABLE_NOTE",
    "Chip",
    "Measurement",
    "chips_of",
    "find_chips",
    "measured_on_similar",
    "published_for",
    "usable_bytes",
]


@dataclass(frozen=True)
class Chip:
    """A chip, and its memory bandwidth in GB/s (10^9 bytes) as Apple publishes it."""

    name: str
    bandwidth_gb_s: float


BANDWIDTH_SOURCE = "Apple's technical specifications"
# Technical specifications at support.apple.com/specs; M5 Pro and Max: Apple's announcement of 3 March 2026.
CHIPS = (
    Chip("M1", 68.25),
    Chip("M1 Pro", 200),
    Chip("M1 Max", 400),
    Chip("M1 Ultra", 800),
    Chip("M2", 100),
    Chip("M2 Pro", 200),
    Chip("M2 Max", 400),
    Chip("M2 Ultra", 800),
    Chip("M3", 100),
    Chip("M3 Pro", 150),
    Chip("M3 Max 30-core", 300),
    Chip("M3 Max 40-core", 400),
    Chip("M3 Ultra", 819),
    Chip("M4", 120),
    Chip("M4 Pro", 273),
    Chip("M4 Max 32-core", 410),
    Chip("M4 Max 40-core", 546),
    Chip("M5", 153),
    Chip("M5 Pro", 307),
    Chip("M5 Max 40-core", 614),
)

MAC_MEMORY_GIB = (16, 24, 32, 36, 48, 64, 96, 128, 192)

# Metal's recommendedMaxWorkingSetSize as logged by users: 21845 MiB of 32 GiB (ollama #434), 49152 MiB of 64 GiB
# (llama.cpp #1870). Newer macOS allows more: 11.84 of 16 GiB (llmfit #754), 107.5 of 128 GiB (ds4 #893).
USABLE_NOTE = (
    "Assumes that the GPU may use 2/3 of a Mac's memory below 36 GB and 3/4 from 36 GB up (Metal's recommended working "
    "set; newer macOS allows up to 84%)"
)


def usable_bytes(memory_gib: int) -> int:
    """Bytes the GPU of a Mac with ``memory_gib`` GiB may use by default."""
    total = memory_gib * 2**30
    return total * 2 // 3 if memory_gib < 36 else total * 3 // 4


@dataclass(frozen=True)
class Measurement:
    """A decode speed somebody published for Mixtral 8x7B."""

    machine: str
    runtime: str
    decode_tok_s: float
    source: str


MEASURED_8X7B = (
    Measurement("M2 Max, 38-core GPU", "llama.cpp Q4_K_M (24.6 GiB)", 34.7, "llama.cpp #4406"),
    Measurement("M2 Max, 38-core GPU", "llama.cpp Q3_K_M (19.0 GiB)", 28.4, "llama.cpp #4406"),
    Measurement("M2 Max, 38-core GPU", "llama.cpp Q2_K (14.6 GiB)", 39.9, "llama.cpp #4406"),
    Measurement("M1 Max, 24-core GPU", "llama.cpp Q4", 14.5, "llama.cpp #4406"),
    Measurement("M1 Ultra", "mlx-lm 0.31 4-bit", 54.9, "mlxcel model tests"),
    Measurement("32 GB Mac", "Rapid-MLX 4-bit, all cached", 14.8, "Rapid-MLX #1183"),
    Measurement("32 GB Mac", "mlx-moe, 6 of 8 cached", 4.5, "mlx-moe"),
    Measurement("RTX 3060", "mixtral-offloading, 2-bit", 2.3, "arXiv 2312.17238"),
)


# Decoding is bound by memory: chips whose bandwidths differ by less than this make one class.
SAME_CLASS = 0.1


def published_for(device: Device, config: MixtralConfig) -> dict[str, Any]:
    """What others published of machines like ``device``: nothing where its kind is not known.

    Speeds are of Mixtral 8x7B and given for models of its shape only.
    """
    axes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts", "num_experts_per_tok")
    is_8x7b = all(getattr(config, axis) == getattr(BUILT_IN["8x7b"], axis) for axis in axes)
    return {
        "bandwidths": [asdict(chip) | {"source": BANDWIDTH_SOURCE} for chip in chips_of(device)],
        "decode_8x7b": [asdict(entry) for entry in measured_on_similar(device)] if is_8x7b else [],
    }


def chips_of(device: Device) -> tuple[Chip, ...]:
    """The chips a device may be by its name, "Apple M3 Max" meaning both kinds of it; none for other devices."""
    try:
        return find_chips(device.name) if device.kind == "metal" else ()
    except InvalidRequestError:
        return ()


def measured_on_similar(device: Device) -> tuple[Measurement, ...]:
    """What was published of machines of the same class: by bandwidth of the chip or memory of a Mac, by name otherwise."""
    here, found = chips_of(device), []
    for entry in MEASURED_8X7B:
        name = entry.machine.partition(",")[0]
        memory = re.fullmatch(r"(\d+) GB Mac", name)
        if memory is not None:
            is_similar = device.kind == "metal" and device.memory_bytes == int(memory[1]) * 2**30
        elif device.kind == "metal":
            there = [chip for chip in CHIPS if name in (chip.name, _family(chip))]
            is_similar = any(
                abs(a.bandwidth_gb_s - b.bandwidth_gb_s) <= SAME_CLASS * b.bandwidth_gb_s for a in here for b in there
            )
        else:
            is_similar = device.kind == "cuda" and device.name.endswith(name)
        if is_similar:
            found.append(entry)
    return tuple(found)


def find_chips(name: str | None) -> tuple[Chip, ...]:
    """Chips of that name, "M3 Max" meaning both kinds of it; all when no name is given.

    Raises:
        InvalidRequestError: there is none.
    """
    if name is None:
        return CHIPS
    wanted = " ".join(name.lower().removeprefix("apple").split())
    found = tuple(chip for chip in CHIPS if wanted in (chip.name.lower(), _family(chip).lower()))
    if not found:
        known = ", ".join(dict.fromkeys(_family(chip) for chip in CHIPS))
        raise InvalidRequestError(f"chip {name!r} is unknown; known chips are {known}")
    return found


def _family(chip: Chip) -> str:
    """The name without the number of GPU cores that tells two bandwidths apart."""
    return re.sub(r" \d+-core$", "", chip.name)
