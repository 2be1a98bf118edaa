"""What a conversion tells its caller: progress while it runs, figures when it is done."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from mlx_mixtral.config.layout import Matrix, matrices
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
    "Progress",
    "ProgressCounter",
    "downloading",
    "json_object",
    "part_sizes",
    "peak_memory_bytes",
]  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """One step. ``download`` counts bytes fetched, ``convert`` bytes of source weights converted, ``finish`` is the end.

    ``layer`` is the decoder layer at hand, None outside the layers; ``what`` names the matrix or file.
    """

    stage: Literal["download", "convert", "finish"]
    done_bytes: int
    total_bytes: int
    layer: int | None
    layers: int
    what: str


class ProgressCounter:
    """Counts the source bytes that are done, and tells ``progress`` of each step.

    Args:
        done_bytes: of ``total_bytes``, what an earlier run did.
        layers: how many the model has.
    """

    def __init__(
        self, progress: Callable[[Progress], None] | None, total_bytes: int, layers: int, done_bytes: int = 0
    ) -> None:
        self.total_bytes, self.done_bytes = total_bytes, done_bytes
        self._progress, self._layers = progress, layers

    def step(self, matrix: Matrix, nbytes: int) -> None:
        """An expert of a matrix is done."""
        self.done_bytes += nbytes
        if self._progress is not None:
            args = self.done_bytes, self.total_bytes, matrix.layer, self._layers, matrix.path
            self._progress(Progress("convert", *args))

    def finish(self, what: str) -> None:
        """Everything is."""
        if self._progress is not None:
            self._progress(Progress("finish", self.total_bytes, self.total_bytes, None, self._layers, what))


def downloading(progress: Callable[[Progress], None] | None) -> Callable[[int, int], None] | None:
    """Tells of a download in these terms."""
    if progress is None:
        return None
    return lambda done, total: progress(Progress("download", done, total, None, 0, "weights"))


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
