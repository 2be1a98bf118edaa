"""The matrices and norms that an adapter may change, and what to say of a tensor that fits none of them."""

from __future__ import annotations

import re

from mlx_mixtral.adapters.parts import Factors, TensorPart
from mlx_mixtral.config.layout import Matrix, Norm, matrices, norms
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.weights.dtypes import FLOATS
from mlx_mixtral.weights.safetensors import TensorInfo

__all__ = ["Places", "check_float"]

_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")


class Places:
    """A model's matrices and norms by path."""

    def __init__(self, config: MixtralConfig) -> None:
        self.config = config
        self._matrices = {matrix.path: matrix for matrix in matrices(config)}
        self._norms = {norm.path: norm for norm in norms(config)}

    def __contains__(self, path: object) -> bool:
        return path in self._matrices or path in self._norms

    def matrix(self, path: str, info: TensorInfo) -> Matrix:
        """The matrix that the tensor ``info`` changes.

        Raises:
            CheckpointError: the model has none of this path.
        """
        if (found := self._matrices.get(path)) is None:
            raise self.foreign(path, info)
        return found

    def check_expert(self, matrix: Matrix, expert: int, info: TensorInfo) -> None:
        """Raise CheckpointError unless the matrix has this expert."""
        count = matrix.num_experts or 1
        if not 0 <= expert < count:
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} is of expert {expert}, but the model's layers have {count}; the adapter is "
                "of another model"
            )

    def foreign(self, path: str, info: TensorInfo) -> CheckpointError:
        """The error for a tensor of a matrix that is not there."""
        layer, count = _LAYER.match(path), self.config.num_hidden_layers
        if layer is not None and int(layer[1]) >= count:
            reason = f"is of layer {int(layer[1])}, but the model has {count}"
        elif path == "lm_head" and self.config.tie_word_embeddings:
            reason = "is of the output head, which this model shares with its embedding"
        else:
            reason = f"changes {path[:120]!r}, which the model does not have"
        return CheckpointError(f"{info.file}: tensor {info.name!r} {reason}; the adapter is of another model")

    def check(self, matrix: Matrix, change: Factors) -> Factors:
        """``change``, if its factors fit one expert of the matrix.

        Raises:
            CheckpointError: they do not, or are not of a float type.
        """
        out, into = matrix.out_features, matrix.in_features
        if change.a.shape[1] != into:
            raise self._unfit(matrix, change.a, "in", into, change.a.shape[1])
        if change.b.shape[0] != out:
            raise self._unfit(matrix, change.b, "out", out, change.b.shape[0])
        first, second = change.a, change.b
        if first.shape[0] != second.shape[1]:
            raise CheckpointError(
                f"{first.info.file}: tensor {first.info.name!r} has rank {first.shape[0]} and {second.info.name!r} has "
                f"{second.shape[1]}; the two do not belong together"
            )
        if first.shape[0] == 0:
            raise CheckpointError(f"{first.info.file}: tensor {first.info.name!r} has rank 0, which changes nothing")
        for info in (first.info, second.info, change.magnitude, change.bias):
            if info is not None:
                check_float(info)
        for info in (change.magnitude, change.bias):
            if info is not None:
                self.check_shape(info, (out,))
        return change

    def check_shape(self, info: TensorInfo, wanted: tuple[int, ...]) -> None:
        """Raise CheckpointError unless a tensor has this shape and a float type."""
        check_float(info)
        if info.shape != wanted:
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} has shape {list(info.shape)}; this model calls for {list(wanted)}: the "
                f"adapter is of another model{self._resized(info, wanted)}"
            )

    def replacement(self, path: str, info: TensorInfo) -> None:
        """Raise CheckpointError unless a tensor can stand in place of the matrix or norm of this path."""
        if (norm := self._norms.get(path)) is not None:
            self.check_shape(info, (norm.size,))
            return
        matrix = self.matrix(path, info)
        if matrix.part == "expert":
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} replaces a matrix of a feed-forward network, which makes it a model rather "
                "than an adapter; merge it into its base where it was trained, and convert the result"
            )
        self.check_shape(info, matrix.shape)

    def norm(self, path: str) -> Norm | None:
        return self._norms.get(path)

    def _unfit(self, matrix: Matrix, part: TensorPart, side: str, wanted: int, found: int) -> CheckpointError:
        info = part.info
        return CheckpointError(
            f"{info.file}: tensor {info.name!r} of shape {list(info.shape)} is for a matrix with {found} {side}puts; "
            f"{matrix.path} has {wanted}: the adapter is of another model{self._resized(info, (wanted,), matrix)}"
        )

    def _resized(self, info: TensorInfo, wanted: tuple[int, ...], matrix: Matrix | None = None) -> str:
        vocabulary = self.config.vocab_size
        of_tokens = matrix is None or matrix.part in ("embedding", "head")
        if vocabulary in wanted and of_tokens and vocabulary not in info.shape:
            return f", or of this one with its vocabulary resized from {vocabulary}, which is not supported"
        return ""


def check_float(info: TensorInfo) -> None:
    """Raise CheckpointError for a tensor of another type than those adapters are trained in."""
    if info.dtype not in FLOATS:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} has dtype {info.dtype}; adapters of {', '.join(FLOATS)} are read"
        )
