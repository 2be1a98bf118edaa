"""The calibration file: what was measured on a text, tied to the checkpoint it was measured on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mlx_mixtral.arguments import as_path, is_number
from mlx_mixtral.config.layout import Matrix, matrices, norms
from mlx_mixtral.errors import CheckpointError, ConversionError
from mlx_mixtral.files import replace_file
from mlx_mixtral.reading import check_size, parse_json
from mlx_mixtral.weights.dtypes import convert
from mlx_mixtral_convert.calibration.place import FORMAT, check_place
from mlx_mixtral_convert.calibration.statistics import input_name
from mlx_mixtral_convert.calibration.uniform import Anchors
from mlx_mixtral_convert.sources.base import TensorSource

__all__ = ["Calibration", "Losses", "identity"]

# Those of 8x22B have 50 MB.
MAX_FILE_BYTES = 2**29

# group of matrices -> packing ("4-bit g64") -> predicted mean KL in nats per token
Losses = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Calibration:
    """Statistics of one checkpoint on one text.

    ``mean_squares`` has an array ``[experts, in]`` for the input of every matrix (by ``input_name``), an expert's tokens
    weighted by the square of their routing weight; ``routed`` the tokens behind each row. ``tokens [B, L]`` is the text itself,
    from which roundings gather second moments again: those of 8x7B would fill 20 GB. ``losses`` and ``anchors``, which say how
    far their sums are off (``uniform.correction``), are empty without sensitivities.
    """

    identity: str
    tokens: npt.NDArray[np.int32]
    mean_squares: Mapping[str, npt.NDArray[np.float32]]
    routed: Mapping[str, npt.NDArray[np.int64]]
    losses: Losses
    anchors: Anchors = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 over everything, for the record of a conversion."""
        whole = hashlib.sha256(self._header().encode())
        for name, array in self._arrays().items():
            whole.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return whole.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; the same calibration gives the same bytes. It appears whole or not at all.

        Raises:
            DestinationError: it cannot be written, or something that is no calibration file lies there.
            DiskSpaceError: the disk is full.
        """
        # One key: safetensors writes several in an order of its own, another one each time.
        replace_file(check_place(path), save(self._arrays(), {FORMAT: self._header()}))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: it cannot be read, or is something else.
        """
        place = as_path("calibration", path)
        check_size(place, MAX_FILE_BYTES)
        try:
            with safe_open(str(place), "numpy") as file:
                header_text = (file.metadata() or {}).get(FORMAT)
                if header_text is None:
                    raise CheckpointError(f"{path} is not a calibration file; make one with mlx-mixtral calibrate")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = parse_json(f"the header of {place}", header_text)
            found = cls(
                header["identity"],
                arrays.pop("tokens"),
                {name.removeprefix("squares."): array for name, array in arrays.items() if name.startswith("squares.")},
                {name.removeprefix("routed."): array for name, array in arrays.items() if name.startswith("routed.")},
                header["losses"],
                header.get("anchors", {}),
            )
            found._check(path)
            return found
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"calibration file {path} cannot be read: {reason}") from error

    def check_fits(self, source: TensorSource) -> None:
        """Raise ConversionError unless it was measured on this very checkpoint."""
        if identity(source) != self.identity:
            raise ConversionError(
                "the calibration file was measured on another model; make one for this checkpoint with mlx-mixtral calibrate"
            )
        if self.tokens.max() >= source.config.vocab_size:
            raise ConversionError(
                "the calibration file has tokens that this model does not have; make one for this model"
            )
        missing = [
            m.path
            for m in matrices(source.config)
            if _needed(m.part) and getattr(self.mean_squares.get(input_name(m)), "shape", None) != _squares_shape(m)
        ]
        if missing and not source.config.tie_word_embeddings:
            raise ConversionError(f"the calibration file has no statistics for {missing[0]}")

    def _check(self, path: str | Path) -> None:
        """Raise CheckpointError for what ``save`` cannot have written."""
        tokens, losses = self.tokens, self.losses
        if tokens.dtype != np.int32 or tokens.ndim != 2 or not tokens.size or tokens.min() < 0:
            raise CheckpointError(f"calibration file {path} is damaged: its tokens are not token ids")
        if self.mean_squares.keys() != self.routed.keys():
            raise CheckpointError(
                f"calibration file {path} is damaged: counts and mean squares belong to other matrices"
            )
        for name, squares in self.mean_squares.items():
            routed = self.routed[name]
            shapes = squares.dtype == np.float32 and squares.ndim == 2 and routed.dtype == np.int64
            if not shapes or routed.shape != squares.shape[:1]:
                raise CheckpointError(f"calibration file {path} is damaged: {name[:200]} has another shape or type")
            if not (np.isfinite(squares) & (squares >= 0)).all() or (routed < 0).any():
                raise CheckpointError(
                    f"calibration file {path} is damaged: {name[:200]} has values that no input can have"
                )
        if not isinstance(self.identity, str) or not isinstance(losses, dict):
            raise CheckpointError(f"calibration file {path} is damaged: its header does not describe a model")
        for group in losses.values():
            if not isinstance(group, dict) or not all(is_number(loss) and np.isfinite(loss) for loss in group.values()):
                raise CheckpointError(f"calibration file {path} is damaged: its losses are not numbers")

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        named: dict[str, npt.NDArray[Any]] = {"tokens": self.tokens}
        named |= {f"squares.{name}": array for name, array in self.mean_squares.items()}
        named |= {f"routed.{name}": array for name, array in self.routed.items()}
        return dict(sorted(named.items()))

    def _header(self) -> str:
        header = {"identity": self.identity, "losses": self.losses}
        return json.dumps(header | ({"anchors": self.anchors} if self.anchors else {}), sort_keys=True)


def _squares_shape(matrix: Matrix) -> tuple[int, int]:
    return matrix.num_experts or 1, matrix.in_features


def _needed(part: str) -> bool:
    return part not in ("router", "embedding")


def identity(source: TensorSource) -> str:
    """What tells checkpoints apart, fine-tunes of one model too: shapes, and all norms and routers."""
    whole = hashlib.sha256()
    for matrix in matrices(source.config):
        whole.update(f"{matrix.path} {matrix.shape} ".encode())
        if matrix.part == "router":
            scratch = np.empty(matrix.parameters * 4, np.uint8)
            values = source.read(matrix, 0, scratch)
            whole.update(convert(values.array, values.dtype, "F32").tobytes())
    for norm in norms(source.config):
        values = source.read_norm(norm)
        whole.update(convert(values.array, values.dtype, "F32").tobytes())
    return whole.hexdigest()
