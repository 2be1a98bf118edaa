"""``verify``: is a folder still what the conversion wrote, and a model that can be run?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mixtral.arguments import as_path, check_callbacks, checked
from mlx_mixtral.config.layout import Matrix, locate
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import CheckpointError, MixtralError
from mlx_mixtral.model.build import Builder
from mlx_mixtral.weights.checkpoint import Checkpoint, CheckpointReader
from mlx_mixtral.weights.dtypes import FLOATS, as_numpy, is_finite
from mlx_mixtral.weights.manifest import EDITED, MANIFEST, file_problem, read_manifest, unlisted
from mlx_mixtral.weights.safetensors import TensorInfo
from mlx_mixtral_convert.report import json_object

__all__ = ["Problem", "VerifyReport", "verify"]

CHUNK_BYTES = 8 * 2**20
# Codes that mean NaN: e8m0 has one, e4m3 one of each sign.
_NAN_SCALES = {"mxfp4": (0xFF,), "mxfp8": (0xFF,), "nvfp4": (0x7F, 0xFF)}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, with a file or with a tensor named ``what``."""

    what: str
    problem: str


@dataclass(frozen=True)
class VerifyReport:
    """``files`` were hashed, ``tensors`` looked through for NaN and infinity, ``hashed_bytes`` read; ``problems`` is what was
    found. Those of ``edited`` are small files that are not as they were written, which a person may have done on purpose.
    """

    folder: str
    files: int
    tensors: int
    hashed_bytes: int
    seconds: float
    problems: tuple[Problem, ...]
    edited: tuple[str, ...] = ()

    @property
    def weights_ok(self) -> bool:
        """Whether nothing is wrong but that small files were edited."""
        return all(problem.what in self.edited for problem in self.problems)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {"ok": self.ok, **json_object(self)}


@checked()
def verify(folder: str | Path, *, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Check a converted folder: every file's size and sha256, files too many or too few, headers, index and shapes against
    the configuration, and that no scale, norm or other float is NaN or infinite.

    Problems are collected, not raised. A checkpoint of other origin has no hashes, which is a problem too; the rest is
    checked all the same.

    Example:
        report = verify("mixtral-4bit")
        print("sound" if report.ok else report.problems)

    Args:
        progress: told (bytes hashed, bytes to hash).

    Raises:
        CheckpointError: ``folder`` is not a folder.
        InvalidRequestError: it is not even a path.
    """
    started = time.perf_counter()
    folder = as_path("folder", folder)
    check_callbacks(progress=progress)
    if folder.is_file():
        is_gguf = folder.suffix == ".gguf"
        fix = f"convert it first: mlx-mixtral convert {folder} DEST" if is_gguf else "give the folder"
        raise CheckpointError(f"{folder} is a file, but only whole converted folders can be verified; {fix}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    problems: list[Problem] = []
    files, hashed = _check_files(folder, problems, progress)
    edited = tuple(problem.what for problem in problems if problem.problem.startswith(EDITED))
    tensors = 0
    try:
        for problem in _tensor_problems(folder):
            tensors += 1
            problems += [problem] if problem is not None else []
    except MixtralError as error:
        problems.append(Problem("model", str(error)))
    return VerifyReport(str(folder), files, tensors, hashed, time.perf_counter() - started, tuple(problems), edited)


def _check_files(folder: Path, problems: list[Problem], progress: Callable[[int, int], None] | None) -> tuple[int, int]:
    """Add what is wrong with files to ``problems``; how many files and bytes were hashed."""
    try:
        entries = read_manifest(folder)
    except MixtralError as error:
        problems.append(Problem(MANIFEST, str(error)))
        return 0, 0
    if entries is None:
        problems.append(Problem(MANIFEST, "missing; hashes cannot be checked"))
        return 0, 0
    hashed, total = 0, sum(entry.nbytes for entry in entries.values())

    def read(count: int) -> None:
        nonlocal hashed
        hashed += count
        if progress is not None:
            progress(hashed, total)

    for name, entry in entries.items():
        if (problem := file_problem(folder, name, entry, read)) is not None:
            problems.append(Problem(name, problem))
    problems += [Problem(name, f"{MANIFEST} does not list it") for name in unlisted(folder, entries)]
    return len(entries), hashed


def _tensor_problems(folder: Path) -> Iterator[Problem | None]:
    """For each tensor: what is wrong with it. Raises MixtralError for a model that cannot be run."""
    checkpoint = Checkpoint(folder)
    builder = Builder(MixtralConfig.from_folder(folder), checkpoint, "F32")
    nan_codes = dict(_nan_codes(builder))
    with CheckpointReader(checkpoint) as reader:
        for name, info in checkpoint.items():
            is_sound = _is_sound(reader, info, nan_codes.get(name, ()))
            yield None if is_sound else Problem(info.name, f"holds NaN or infinity, in {info.file.name}")


def _nan_codes(builder: Builder) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The scales that are held as bytes, and which bytes are NaN."""
    for path, matrix in builder.matrices.items():
        spec = builder.specs[path]
        if spec is not None and spec.mode in _NAN_SCALES:
            for name in _scale_names(builder, matrix):
                yield name, _NAN_SCALES[spec.mode]


def _scale_names(builder: Builder, matrix: Matrix) -> set[str]:
    return {rows.name for rows in locate(matrix, "scales", builder.checkpoint) or ()}


def _is_sound(reader: CheckpointReader, info: TensorInfo, nan_codes: tuple[int, ...]) -> bool:
    if info.dtype not in FLOATS and not nan_codes:
        return True
    step = max(1, CHUNK_BYTES // max(info.row_bytes, 1))
    for start in range(0, info.rows, step):
        raw = reader.rows(info, start, min(start + step, info.rows))
        if any((raw == code).any() for code in nan_codes):
            return False
        if info.dtype in FLOATS and not is_finite(as_numpy(raw, info.dtype), info.dtype):
            return False
    return True
