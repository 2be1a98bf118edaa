"""How the matrices of a checkpoint are packed: what its configuration says, held against its tensors."""

from __future__ import annotations

from mlx_mixtral.config.folder import must_convert
from mlx_mixtral.config.layout import Matrix, Rows, locate
from mlx_mixtral.config.quantization import MODES, QuantizationConfig, QuantizationSpec
from mlx_mixtral.errors import CheckpointError, ConfigError
from mlx_mixtral.weights.checkpoint import Checkpoint

__all__ = ["packing_of"]


def packing_of(matrix: Matrix, config: QuantizationConfig | None, checkpoint: Checkpoint) -> QuantizationSpec | None:
    """How a matrix is packed, None for one of floats: it is packed when it has scales, and the shapes confirm the config.

    Raises:
    ConfigError: the config contradicts the tensors, or says nothing.
    CheckpointError: there are scales without a weight, or the packing of GPTQ or AWQ.
    """
    if (words := f"{matrix.path}.qweight") in checkpoint:
        raise must_convert(checkpoint.folder, "weights packed by GPTQ or AWQ", checkpoint[words].file.name)
    scales = locate(matrix, "scales", checkpoint)
    if scales is None:
        return None
    if config is None:
        raise ConfigError(f"{matrix.path} has scales, but config.json has no 'quantization' entry")
    if locate(matrix, "weight", checkpoint) is None:
        raise CheckpointError(f"{checkpoint.folder}: {matrix.path} has scales but no weight")
    if f"{matrix.path}.global_scale" in checkpoint:
        raise ConfigError(f"{matrix.path} has a global scale, which MLX supports only on CUDA; convert without it")
    weight = locate(matrix, "weight", checkpoint)
    assert weight is not None
    named = _override(config, matrix, scales[0])
    columns = checkpoint[weight[0].name].shape[-1], checkpoint[scales[0].name].shape[-1]
    if named is not None and _fits(named, matrix, columns):
        return named
    inferred = _inferred(matrix, scales[0], columns, checkpoint)
    listed = matrix.path in config.overrides
    if inferred is None or listed:
        raise ConfigError(
            f"{matrix.path}: config.json says {named}, but weight has {columns[0]} columns and scales {columns[1]}, "
            f"for {matrix.in_features} inputs"
        )
    return inferred


def _inferred(
    matrix: Matrix, scales: Rows, columns: tuple[int, int], checkpoint: Checkpoint
) -> QuantizationSpec | None:
    """The one packing that gives these shapes: some checkpoints override modules without saying so."""
    affine = checkpoint[scales.name].dtype != "U8"
    for mode in MODES:
        if (mode == "affine") != affine or not columns[1]:
            continue
        bits, group_size = columns[0] * 32 // matrix.in_features, matrix.in_features // columns[1]
        try:
            spec = QuantizationSpec.make(bits, group_size, mode)
        except ConfigError:
            continue
        if _fits(spec, matrix, columns):
            return spec
    return None


def _override(config: QuantizationConfig, matrix: Matrix, scales: Rows) -> QuantizationSpec | None:
    """The entry for a matrix by module path; per-expert checkpoints may name each expert's module instead."""
    own = scales.name.removesuffix(".scales")
    return config.for_module(own if own in config.overrides else matrix.path)


def _fits(spec: QuantizationSpec, matrix: Matrix, columns: tuple[int, int]) -> bool:
    return (
        matrix.in_features % spec.group_size == 0
        and columns[0] == spec.packed_columns(matrix.in_features)
        and columns[1] == spec.groups(matrix.in_features)
    )
