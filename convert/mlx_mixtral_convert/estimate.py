"""What a conversion will need, before it runs: one matrix is read and packed on trial, memory follows from the plan."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_mixtral.config.layout import Matrix, matrices
from mlx_mixtral.weights.safetensors import ITEM_BYTES
from mlx_mixtral_convert.calibration.statistics import hessian_blocks
from mlx_mixtral_convert.calibration.walk import walk_bytes
from mlx_mixtral_convert.output.plan import Plan, ShardPlan
from mlx_mixtral_convert.packing.measure import ErrorSum
from mlx_mixtral_convert.pipeline import pack_piece, packed_arrays, read_piece
from mlx_mixtral_convert.report import peak_memory_bytes
from mlx_mixtral_convert.rounding import LayerByLayer, Rounder
from mlx_mixtral_convert.sources import TensorSource, matrix_bytes
from mlx_mixtral_convert.sources.adapted import AdaptedSource
from mlx_mixtral_convert.tuning.walk import attention_copies

__all__ = ["Needs", "estimate_conversion"]

# Trials of at least this long: a small model's first matrix measures the warming-up of kernels.
TRIAL_SECONDS = 0.2
MAX_TRIALS = 64
# Blocks being converted, measured and hashed, threads' stacks, MLX's own buffers.
WORKING_BYTES = 150_000_000


@dataclass(frozen=True)
class Needs:
    """``seconds`` is None for gptq and tuned, whose time goes into hidden states that only a run has."""

    seconds: float | None
    memory_bytes: int


def estimate_conversion(source: TensorSource, plan: Plan, rounder: Rounder | None) -> Needs:
    """Read and pack an expert's matrix as a conversion will, without writing it."""
    return Needs(
        None if isinstance(rounder, LayerByLayer) else _seconds(source, plan, rounder),
        _memory_bytes(source, plan, rounder),
    )


def _seconds(source: TensorSource, plan: Plan, rounder: Rounder | None) -> float:
    listed = list(matrices(plan.config))
    matrix = next((m for m in listed if m.part == "expert"), listed[0])
    scratch = mx.zeros(matrix_bytes(source, matrix), mx.uint8)
    mx.eval(scratch)
    pack_piece(plan, read_piece(source, plan, matrix, 0, scratch), rounder)
    done, trials, started, slowest = 0, 0, time.perf_counter(), 0.0
    while trials < MAX_TRIALS and (not trials or time.perf_counter() - started < TRIAL_SECONDS):
        slowest += _trial(source, plan, matrix, trials % (matrix.num_experts or 1), scratch, rounder)
        done += matrix.out_features * matrix.in_features
        trials += 1
    return slowest * plan.parameters / done


def _trial(
    source: TensorSource, plan: Plan, matrix: Matrix, expert: int, scratch: mx.array, rounder: Rounder | None
) -> float:
    """Seconds of the slowest of the three steps, which a conversion does side by side."""
    started = time.perf_counter()
    piece = read_piece(source, plan, matrix, expert, scratch)
    read = time.perf_counter()
    packed = pack_piece(plan, piece, rounder)
    done = time.perf_counter()
    arrays = packed_arrays(packed)
    for array in arrays.values():
        hashlib.sha256(np.ascontiguousarray(array).data).digest()
    if (spec := plan.specs[matrix.path]) is not None:
        ErrorSum().add(piece.values, arrays, plan.dtype, spec)
    return max(read - started, done - read, time.perf_counter() - done)


def _memory_bytes(source: TensorSource, plan: Plan, rounder: Rounder | None) -> int:
    """What is held now, and of the file that needs most: three matrices as read, cast and packed, and what rounding holds."""
    changes = source.largest_changes_bytes if isinstance(source, AdaptedSource) else 0
    learned = _learned_bytes(plan, rounder)
    most = max(_shard_bytes(source, plan, shard) + learned * (shard.layer is not None) for shard in plan.shards)
    return peak_memory_bytes() + WORKING_BYTES + changes + most


def _shard_bytes(source: TensorSource, plan: Plan, shard: ShardPlan) -> int:
    """Three of the largest matrices as read, cast and packed."""
    read = max((matrix_bytes(source, matrix) for matrix in shard.matrices), default=0)
    cast = packed = 0
    for matrix in shard.matrices:
        spec, count = plan.specs[matrix.path], matrix.out_features * matrix.in_features
        typed = ITEM_BYTES[plan.dtype]
        if source.dtype(matrix) != plan.dtype:
            cast = max(cast, count * typed)
        if spec is not None:
            packed = max(packed, spec.nbytes(matrix.out_features, matrix.in_features, typed))
    return 3 * (read + cast + packed)


def _learned_bytes(plan: Plan, rounder: Rounder | None) -> int:
    """A walk of the text, a packed layer, and the second moments of one expert's down matrix."""
    config = plan.config
    if not isinstance(rounder, LayerByLayer):
        return 0
    moments = 4 * sum(int(block.stop - block.start) ** 2 for block in hessian_blocks(config.intermediate_size))
    walk = walk_bytes(config, copies=attention_copies(learns=rounder.learns))
    return walk + max(shard.nbytes for shard in plan.shards) + moments
