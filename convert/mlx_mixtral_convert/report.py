"""What a conversion tells its caller when it is done."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mlx_mixtral.config.layout import matrices
from mlx_mixtral.config.quantization import AFFINE_GROUP_SIZES
from mlx_mixtral_convert.output.plan import Plan
from mlx_mixtral_convert.packing.measure import MatrixError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "ConversionReport",
    "FusedAdapter",
    "PackedAs",
    "PartSize",
    "json_object",
    "part_sizes",
    "peak_memory_bytes",
]  # fmt: skip


@dataclass(frozen=True)
class PackedAs:
    """Matrices that an exact conversion found in one type: their packing now, and how they came to it.

    ``how`` is ``exact`` (not one value changed), ``rounded`` (the integers are the source's, scales were rounded) or
    ``requantised``; ``relative_rms`` the largest ``‖w-ŵ‖/‖w‖`` of these ``matrices``, None for a dry run.
    """

    type_name: str
    spec: str
    how: str
    matrices: int
    relative_rms: float | None


@dataclass(frozen=True)
class FusedAdapter:
    """An adapter that was fused in: its name, ``kind`` (PEFT or mlx-lm), the scale it was given, and the sha256 of what it
    holds. ``matrices`` counts the matrices and norms it changes, ``rank`` is the largest of its ranks, 0 without any.
    """

    name: str
    kind: str
    scale: float
    fingerprint: str
    matrices: int
    rank: int


@dataclass(frozen=True)
class PartSize:
    """Bytes of one part of the model on disk, scales included, and bits per weight."""

    bytes: int
    bits: float


@dataclass(frozen=True)
class ConversionReport:
    """Figures of a finished conversion, or with ``dry_run`` of a planned one.

    ``source_bytes`` and ``output_bytes`` are sizes of the weight files. ``worst`` lists the packed matrices with the largest
    relative error first (empty for a dry run); with ``rounding`` ``gptq`` or ``tuned``, some of these differ from the source to
    make up for others. ``peak_memory_bytes`` is the process's own peak, since it started.
    """

    source: str
    destination: str
    dtype: str
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    parameters: int
    seconds: float
    peak_memory_bytes: int
    layers: int
    resumed_layers: int
    sizes_by_part: Mapping[str, PartSize]
    worst: tuple[MatrixError, ...]
    disk_needed_bytes: int
    disk_free_bytes: int
    dry_run: bool = False
    rounding: str = "plain"
    predicted_kl: float | None = None
    """KL to the source in nats per token to be expected on text like the calibration's; without its sensitivities a guess from
    built-in figures of Mixtral. None for packings that neither knows."""
    predicted_kl_error: float | None = None
    """Its standard error, None for a guess."""
    packings: tuple[PackedAs, ...] = ()
    """What an exact conversion did with each type of its source."""
    expected_seconds: float | None = None
    """Of a dry run: what a conversion should take, from one matrix packed on trial; None where that says nothing."""
    expected_memory_bytes: int | None = None
    """Of a dry run: memory that a conversion should need at most."""

    adapters: tuple[FusedAdapter, ...] = ()
    """What was fused in, in this order."""
    notes: tuple[str, ...] = ()
    """Sentences about what the result lacks, such as a tokenizer that can be used."""

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return json_object(self)


def json_object(report: DataclassInstance) -> dict[str, Any]:
    """A report's fields, tuples as lists."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(report).items()}


def width_notes(plan: Plan) -> tuple[str, ...]:
    """What to say of matrices that stay unquantised because their rows divide into no groups."""
    smallest = min(AFFINE_GROUP_SIZES)
    whole = [
        matrix
        for matrix in matrices(plan.config)
        if matrix.part != "router" and plan.specs[matrix.path] is None and matrix.in_features % smallest
    ]
    if not whole:
        return ()
    widths = " and ".join(map(str, sorted({matrix.in_features for matrix in whole})))
    count = "1 matrix stays" if len(whole) == 1 else f"{len(whole)} matrices stay"
    return (f"{count} unquantised, as {whole[0].path}: no group size divides rows of {widths}",)


def part_sizes(plan: Plan) -> dict[str, PartSize]:
    """Bytes and bits of each part of the model, in the order they appear."""
    parameters: dict[str, int] = {}
    nbytes: dict[str, int] = {}
    for part, count, size in plan.parts():
        parameters[part] = parameters.get(part, 0) + count
        nbytes[part] = nbytes.get(part, 0) + size
    return {part: PartSize(nbytes[part], 8 * nbytes[part] / parameters[part]) for part in parameters}


def peak_memory_bytes() -> int:
    """Peak resident memory of this process; macOS counts in bytes, Linux in KiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
