"""An adapter whose numbers lie in one safetensors file."""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from functools import cached_property
from pathlib import Path

import numpy as np

from mlx_mixtral.adapters.adapter import Adapter, Floats, LowRank, TokenRows
from mlx_mixtral.adapters.parts import AdapterContents, Factors, MatrixPlace, TensorPart
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import CheckpointError, ClosedError, NonFiniteWeightsError
from mlx_mixtral.reading import open_descriptor
from mlx_mixtral.weights.dtypes import as_numpy, convert, is_finite
from mlx_mixtral.weights.safetensors import TensorInfo, read_into

__all__ = ["FileAdapter"]

HASHED_BYTES = 8 * 2**20


class FileAdapter(Adapter):
    """What a reader found, read when it is asked for. Any number of threads may read.

    Args:
        file: the weights.
        scale: multiplies all changes, beside the adapter's own.

    Raises:
        CheckpointError: the file cannot be opened.
    """

    def __init__(
        self, name: str, kind: str, file: Path, contents: AdapterContents, config: MixtralConfig, scale: float = 1.0
    ) -> None:
        self.name, self.kind, self.folder, self.scale = name, kind, file.parent, scale
        self.notes = contents.notes
        self._contents, self._file = contents, file
        self.ranks = _ranks(contents)
        self.dora = frozenset(path for (path, _), change in contents.changes.items() if change.magnitude is not None)
        self.replaced = frozenset(contents.replaced)
        self.token_rows = frozenset(contents.token_rows)
        # Only one network a layer: nobody has to say that it is expert 0.
        self._single = config.is_dense
        self._lock = threading.Lock()
        self._last: tuple[TensorInfo, Floats] | None = None
        self._descriptors = {file: open_descriptor(file)}
        self._close = weakref.finalize(self, _close, self._descriptors)

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Hashes the whole file when it is first asked for; the scale that the adapter was opened with is no part of it."""
        digest = hashlib.sha256(f"{self.kind}\n".encode())
        for (path, expert), change in sorted(self._contents.changes.items(), key=_order):
            digest.update(f"{path} {expert} {change.scale!r} {change.a.info.name} {change.b.info.name}\n".encode())
        for path, info in sorted(self._contents.replaced.items()):
            digest.update(f"{path} {info.name}\n".encode())
        for path, (tokens, info) in sorted(self._contents.token_rows.items()):
            digest.update(f"{path} {tokens} {info.name}\n".encode())
        descriptor, offset = self._descriptor(), 0
        try:
            while data := os.pread(descriptor, HASHED_BYTES, offset):
                digest.update(data)
                offset += len(data)
        except OSError as error:
            raise CheckpointError(f"{self._file} cannot be read: {error.strerror or error}") from error
        return digest.hexdigest()

    def low_rank(self, path: str, expert: int | None = None) -> LowRank | None:
        if expert is None and self._single and (path, None) not in self._contents.changes:
            expert = 0
        change = self._contents.changes.get((path, expert))
        if change is None:
            return None
        scale = change.scale * self.scale
        return LowRank(
            self._part(change.a),
            self._scaled(self._part(change.b), change.b.info, scale),
            None if change.magnitude is None else self._tensor(change.magnitude),
            None if change.bias is None else self._scaled(self._tensor(change.bias), change.bias, scale),
        )

    def replacement(self, path: str) -> Floats:
        return self._tensor(self._contents.replaced[path])

    def rows(self, path: str) -> TokenRows:
        tokens, info = self._contents.token_rows[path]
        return TokenRows(tokens, self._tensor(info))

    def close(self) -> None:
        self._last = None
        self._close()

    def _descriptor(self) -> int:
        try:
            return self._descriptors[self._file]
        except KeyError:
            raise ClosedError(f"the adapter {self.name} was closed; open it again") from None

    def _tensor(self, info: TensorInfo) -> Floats:
        return self._read(info, range(info.rows)).reshape(info.shape)

    def _part(self, part: TensorPart) -> Floats:
        if part.columns.step == 1:
            values = self._read(part.info, part.rows)
        else:
            # The experts' columns lie between one another: the whole tensor is read once for all of them.
            values = self._kept(part.info)[part.rows.start : part.rows.stop]
        values = values[:, part.columns.start : part.columns.stop : part.columns.step]
        return np.ascontiguousarray(values.T if part.transposed else values)

    def _kept(self, info: TensorInfo) -> Floats:
        with self._lock:
            if self._last is None or self._last[0] is not info:
                self._last = None
                self._last = info, self._read(info, range(info.rows))
            return self._last[1]

    def _read(self, info: TensorInfo, rows: range) -> Floats:
        """Rows of a tensor, float32 ``[rows, columns]``."""
        raw = np.empty((len(rows), info.row_bytes), np.uint8)
        what = f"{info.file}: tensor {info.name!r}"
        read_into(self._descriptor(), raw.reshape(-1).data, info.offset + rows.start * info.row_bytes, what)
        values = as_numpy(raw, info.dtype)
        if not is_finite(values, info.dtype):
            raise NonFiniteWeightsError(
                f"{what} holds NaN or infinity; the adapter was trained to nothing, or is damaged"
            )
        return convert(values, info.dtype, "F32")

    def _scaled(self, values: Floats, info: TensorInfo, scale: float) -> Floats:
        with np.errstate(over="ignore"):
            scaled = values * np.float32(scale)
        if not np.isfinite(scaled).all():
            raise NonFiniteWeightsError(
                f"{info.file}: tensor {info.name!r} is beyond float32 when multiplied by {scale:g}"
            )
        return scaled


def _ranks(contents: AdapterContents) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for (path, _), change in contents.changes.items():
        ranks[path] = max(ranks.get(path, 0), change.a.shape[0])
    return ranks


def _order(item: tuple[MatrixPlace, Factors]) -> tuple[str, int]:
    (path, expert), _ = item
    return path, -1 if expert is None else expert


def _close(descriptors: dict[Path, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
