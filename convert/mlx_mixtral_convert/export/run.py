"""``export``: any source the converter reads in, a folder or file of another program's layout out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from mlx_mixtral.arguments import check_callbacks, check_type, checked, shown
from mlx_mixtral.config.layout import matrices, norms
from mlx_mixtral.errors import InvalidRequestError
from mlx_mixtral.hub import Source
from mlx_mixtral_convert.calibration.file import Calibration
from mlx_mixtral_convert.export.gguf import write_gguf
from mlx_mixtral_convert.export.gguf_mixes import GGUF_TYPES
from mlx_mixtral_convert.export.hf import HF_TYPES, write_hf
from mlx_mixtral_convert.export.job import Job
from mlx_mixtral_convert.output.destination import as_destination
from mlx_mixtral_convert.progress import Progress, downloading
from mlx_mixtral_convert.report import json_object, peak_memory_bytes
from mlx_mixtral_convert.sources import open_source

__all__ = ["FORMATS", "TYPES", "ExportReport", "export"]

TYPES: dict[str, tuple[str, ...]] = {"hf": HF_TYPES, "gguf": GGUF_TYPES}
FORMATS = tuple(TYPES)


@dataclass(frozen=True)
class ExportReport:
    """Figures of a finished export, or with ``dry_run`` of a planned one.

    ``type`` is what most weights are stored in, ``output_bytes`` the size of the weight files. ``exact_matrices`` counts
    matrices (of ``packed_matrices`` that were quantised in the source) whose integers were carried over without loss. ``notes``
    are sentences about what the target cannot say.
    """

    source: str
    destination: str
    format: str
    type: str
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    parameters: int
    packed_matrices: int
    exact_matrices: int
    seconds: float
    peak_memory_bytes: int
    disk_needed_bytes: int
    disk_free_bytes: int
    notes: tuple[str, ...] = ()
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return json_object(self)


@checked()
def export(
    source: str | Path,
    dest: str | Path,
    *,
    to: str,
    type: str | None = None,
    kind: str = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    calibration: Calibration | str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> ExportReport:
    """Write a checkpoint in another program's layout: ``hf`` for transformers, ``gguf`` for llama.cpp.

    ``dest`` appears complete or not at all, and memory is bounded by a few experts' matrices whatever the model's size.
    Packed weights are unpacked expert by expert; where a GGUF type can hold their integers, scales and biases as they are
    (MLX's affine packing of up to 4 bits in Q4_1, what came from Q4_0 or Q8_0 in these), not one weight changes.

    Args:
        source: a folder, a file or a hub repository, as for ``convert``.
        dest: for ``hf`` the folder to make, for ``gguf`` the file, its name ending in ``.gguf``.
        to: ``hf`` or ``gguf``.
        type: what weights are stored in. hf: BF16, F16 or F32, the source's own when None. gguf: F16 (when None), BF16, Q8_0,
            Q4_0, Q4_1, or a mix of K-quants by llama.cpp's name: Q2_K, Q3_K_S, Q3_K_M, Q3_K_L, Q4_K_S, Q4_K_M, Q5_K_S, Q5_K_M,
            Q6_K; Q3_K, Q4_K and Q5_K are the medium ones. Norms and routers are always F32.
        kind: the source's layout, one of ``sources.KINDS``; auto finds it from the content.
        revision: branch, tag or commit of a hub repository.
        overwrite: replace a finished export at ``dest``, once the new one is complete.
        dry_run: check and plan everything, write nothing.
        calibration: of this checkpoint, or its file: weighs the errors of K-quants, Q4_0 and Q4_1 in GGUF.
        progress: told each step, from this thread.
        cancelled: asked before each matrix; True ends the export with ConversionError.

    Raises:
        CheckpointError: the source is damaged, incomplete, or holds NaN, infinity or values beyond ``type``.
        ConfigError: another architecture, or one the target cannot express.
        ConversionError: the source changed while it was read, or the export was cancelled.
        DestinationError: ``dest`` cannot be used.
        DiskSpaceError: the disk has too little room, before or while writing.
        HubError: the repository cannot be downloaded.
        InvalidRequestError: an empty ``source`` or ``dest``, an unknown ``to``, ``type`` or ``kind``, a type that
            the model's rows do not fit, or a calibration for a type that has no use for one.
        MissingDependencyError: GGUF needs the package ``gguf``.
        TokenizerError: GGUF needs a ``tokenizer.model``, and there is none that fits.
    """
    started = time.perf_counter()
    named, place = Source.parse(source, revision), as_destination(dest)
    check_callbacks(progress=progress, cancelled=cancelled)
    check_type("calibration", calibration, (Calibration, str, Path, NoneType), "a Calibration, its file, or None")
    # Arrays have an == of their own.
    if not isinstance(to, str) or to not in FORMATS:
        raise InvalidRequestError(f"export to {shown(to)} is unknown; use {' or '.join(FORMATS)}")
    if not isinstance(type, str | NoneType) or type not in (None, *TYPES[to]):
        raise InvalidRequestError(f"type {shown(type)} is unknown for {to}; use {', '.join(TYPES[to])}")
    if calibration is not None and to != "gguf":
        raise InvalidRequestError(f"a calibration does not affect {to}, which is not quantised; leave it out")
    calibrated = Calibration.load(calibration) if isinstance(calibration, (str, Path)) else calibration
    path = named.resolve(convertible=True, progress=downloading(progress))
    name, commit = named.origin(path)
    name = path.stem if named.repository is None and path.is_file() else name
    with open_source(path, kind) as tensors:
        job = Job(tensors, path, name, commit, place, overwrite, dry_run, progress, cancelled, calibrated)
        result = (write_hf if to == "hf" else write_gguf)(job, type)
        parameters = sum(m.parameters for m in matrices(tensors.config)) + sum(n.size for n in norms(tensors.config))
        return ExportReport(
            source=str(source),
            destination=str(result.path),
            format=to,
            type=result.type,
            source_bytes=tensors.files.nbytes,
            output_bytes=result.output_bytes,
            bits_per_weight=8 * result.data_bytes / parameters,
            parameters=parameters,
            packed_matrices=job.packed_matrices,
            exact_matrices=result.exact_matrices,
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory_bytes(),
            disk_needed_bytes=result.needed_bytes,
            disk_free_bytes=result.free_bytes,
            notes=(*tensors.notes, *result.notes),
            dry_run=dry_run,
        )
