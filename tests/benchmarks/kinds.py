"""Where a conversion's bits go and what they buy, for ``quality.py``: bits and relative output error by kind of matrix.

The error of one kind is ``sum E ‖(Ŵ - W) x‖² / sum E ‖W x‖²`` over its layers and experts, square root taken, with the second
moments of its inputs (an expert's own tokens, weighted with the square of their routing weight); of the embedding, which is
looked up, that of its values. On the held-out text it is what counts, on the calibration text what a method saw: where they are
apart, it learnt the text rather than the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.config.layout import Matrix, matrices
from mlx_mixtral_convert.calibration.layer import read_matrix
from mlx_mixtral_convert.calibration.statistics import InputSum, hessian_blocks, input_name
from mlx_mixtral_convert.calibration.walk import Sums, Walk
from mlx_mixtral_convert.sources import open_source

KINDS = ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


class MomentsWalk(Walk):
    """Gathers second moments as well."""

    def new_sum(self, columns: int) -> InputSum:
        return InputSum(columns, full=True)


def save_moments(folder: Path, tokens: npt.NDArray[np.int32], path: Path) -> None:
    """Of ``tokens [B, L]``: second moments of every input, ``name.expert.block [columns, columns]`` float32."""
    found: dict[str, mx.array] = {}

    def note(sums: Sums) -> None:
        for name, experts in sums.items():
            for expert, one in enumerate(experts):
                for block, moments in enumerate(one.hessian):
                    found[f"{name}.{expert}.{block}"] = mx.array(moments)

    with open_source(folder, "hf") as source:
        walk = MomentsWalk(source, tokens)
        for _, sums in walk.layers():
            note(sums)
        note(walk.head_sum())
    mx.save_safetensors(str(path), found)


def by_kind(
    folder: Path, floats: Mapping[str, mx.array], nbytes: Mapping[str, int], held_out: Path, calibration: Path
) -> dict[str, dict[str, float]]:
    """``bits`` per weight and relative output ``error`` and ``error_learnt``, on held-out and calibration text, by kind.

    Args:
        folder: the unquantised model.
        floats: what the quantised weights stand for, by matrix path and ``.weight``.
        nbytes: what each matrix takes, by path.
        held_out, calibration: what ``save_moments`` wrote.
    """
    texts: Any = [mx.load(str(moments)) for moments in (held_out, calibration)]
    totals = {kind: np.zeros(6) for kind in KINDS}  # bytes, weights, and of each text squared error and squared output
    with open_source(folder, "hf") as source:
        for matrix in matrices(source.config):
            kind = matrix.path.rpartition(".")[2]
            if kind not in totals:
                continue
            totals[kind][:2] += nbytes[matrix.path], matrix.parameters
            new = floats[f"{matrix.path}.weight"].reshape(-1, matrix.out_features, matrix.in_features)
            for expert in range(matrix.num_experts or 1):
                true = np.array(read_matrix(source, matrix, expert).astype(mx.float32))
                difference = np.array(new[expert].astype(mx.float32)) - true
                parts = [_output(part, matrix, expert, known) for known in texts for part in (difference, true)]
                totals[kind][2:] += parts
    return {
        kind: {
            "bits": float(8 * size / weights),
            "error": float((error / whole) ** 0.5),
            "error_learnt": float((learnt / whole_learnt) ** 0.5),
        }
        for kind, (size, weights, error, whole, learnt, whole_learnt) in totals.items()
        if weights
    }


def _output(weights: Any, matrix: Matrix, expert: int, known: Mapping[str, mx.array]) -> float:
    """``E ‖W x‖²``; inputs of different blocks are taken as uncorrelated, as they are when packed."""
    name = input_name(matrix)
    if matrix.part == "embedding" or f"{name}.{expert}.0" not in known:
        return float(np.square(weights).sum())
    total = 0.0
    for index, columns in enumerate(hessian_blocks(matrix.in_features)):
        part = weights[:, columns]
        total += float(((part @ np.array(known[f"{name}.{expert}.{index}"])) * part).sum())
    return total
