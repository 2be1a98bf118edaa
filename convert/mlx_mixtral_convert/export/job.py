"""One export: where it reads and writes, and a walk over all experts that reads the next one while this one is written."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Matrix, matrices
from mlx_mixtral.errors import ConversionError
from mlx_mixtral_convert.calibration.file import Calibration
from mlx_mixtral_convert.packing.values import Values
from mlx_mixtral_convert.progress import Progress, ProgressCounter
from mlx_mixtral_convert.sources import PackedSource, TensorSource, main_dtype, matrix_bytes

__all__ = ["Job", "Result"]

Scratch = npt.NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What a layout's writer did. ``output_bytes`` counts headers too, ``data_bytes`` tensors alone."""

    path: Path
    type: str
    output_bytes: int
    data_bytes: int
    needed_bytes: int
    free_bytes: int
    exact_matrices: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """``folder`` is what the source was opened on, a folder or a file; ``name`` and ``commit`` are what it is called elsewhere:
    no path of this machine.
    """

    source: TensorSource
    folder: Path
    name: str
    commit: str | None
    dest: Path
    overwrite: bool
    dry_run: bool
    progress: Callable[[Progress], None] | None
    cancelled: Callable[[], bool] | None
    calibration: Calibration | None = None

    @property
    def packed_matrices(self) -> int:
        """Matrices that are quantised in the source."""
        source = self.source
        if not isinstance(source, PackedSource):
            return 0
        return sum(source.native(matrix) is not None for matrix in matrices(source.config))

    def own_type(self) -> str:
        """The float type of most weights; for quantised ones, which unpack to float32, the one the configuration names."""
        own = main_dtype(self.source)
        if own == "F32" and self.packed_matrices:
            entries = self.source.entries
            return "F16" if "float16" in (entries.get("torch_dtype"), entries.get("dtype")) else "BF16"
        return own

    def walk(
        self, wanted: Sequence[Matrix], read: Callable[[Matrix, int, Scratch], T]
    ) -> Generator[tuple[Matrix, int, T]]:
        """Every expert of ``wanted`` in order, as ``read`` gives it. ``read`` runs on one other thread, one expert ahead, and
        its result may lie in the scratch memory it is given: it is good until the next one is asked for. Closing the
        generator ends the thread.

        Raises:
            ConversionError: cancelled.
        """
        pieces = [(matrix, expert) for matrix in wanted for expert in range(matrix.num_experts or 1)]
        sizes = [matrix_bytes(self.source, matrix) for matrix in wanted]
        buffers = [np.empty(max(sizes, default=0), np.uint8) for _ in range(2)]
        total = sum(size * (matrix.num_experts or 1) for size, matrix in zip(sizes, wanted, strict=True))
        counter = ProgressCounter(self.progress, total, self.source.config.num_hidden_layers)
        with ThreadPoolExecutor(1, thread_name_prefix="mlx-mixtral-read") as reader:
            ahead = reader.submit(read, *pieces[0], buffers[0])
            for number, (matrix, expert) in enumerate(pieces):
                if self.cancelled is not None and self.cancelled():
                    raise ConversionError("export cancelled")
                value = ahead.result()
                if number + 1 < len(pieces):
                    ahead = reader.submit(read, *pieces[number + 1], buffers[(number + 1) % 2])
                yield matrix, expert, value
                counter.step(matrix, matrix_bytes(self.source, matrix))

    def values(self, wanted: Sequence[Matrix]) -> Generator[tuple[Matrix, int, Values]]:
        """The floats of every expert of ``wanted``."""
        return self.walk(wanted, self.source.read)

    def finish(self, total_bytes: int) -> None:
        """Everything has been read: check that it was one and the same source, and tell the caller."""
        self.source.files.check_unchanged()
        ProgressCounter(self.progress, total_bytes, self.source.config.num_hidden_layers).finish(self.dest.name)
