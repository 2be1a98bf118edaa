"""Adapters with random values, in mlx-lm's files and in memory, and what they make of a model by the plainest means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mixtral.adapters.adapter import Adapter, LowRank, TokenRows
from mlx_mixtral.config.layout import Matrix, matrices
from mlx_mixtral.config.mixtral import MixtralConfig
from tests.convert.support import Floats

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
EXPERTS = tuple(f"block_sparse_moe.switch_mlp.{name}_proj" for name in ("gate", "up", "down"))
EVERYTHING = (*ATTENTION, "block_sparse_moe.gate", *EXPERTS)
Changes = dict[tuple[str, int | None], LowRank]


def key_of(matrix: Matrix) -> str:
    """What mlx-lm calls a matrix within its layer."""
    return matrix.path.split(".", 3)[-1]


def random_changes(
    config: Mapping[str, Any],
    keys: tuple[str, ...],
    *,
    rank: int = 4,
    scale: float = 2.0,
    seed: int = 1,
    dora: bool = False,
) -> Changes:
    """A change for every expert of the matrices of ``keys``, as strong as a trained one."""
    random = np.random.default_rng(seed)
    changes: Changes = {}
    for matrix in matrices(MixtralConfig.from_hf(config)):
        if key_of(matrix) not in keys:
            continue
        for expert in range(matrix.num_experts) if matrix.num_experts else (None,):
            a = random.standard_normal((rank, matrix.in_features)).astype(np.float32) / 10
            b = random.standard_normal((matrix.out_features, rank)).astype(np.float32) / 20
            m = (0.5 + random.random(matrix.out_features)).astype(np.float32) if dora else None
            changes[matrix.path, expert] = LowRank(a, b * np.float32(scale), m)
    return changes


def write_mlx_adapter(
    folder: Path,
    config: Mapping[str, Any],
    keys: tuple[str, ...],
    *,
    rank: int = 4,
    scale: float = 2.0,
    seed: int = 1,
    dora: bool = False,
) -> Changes:
    """A folder of mlx-lm's; what it holds."""
    changes = random_changes(config, keys, rank=rank, scale=scale, seed=seed, dora=dora)
    tensors: dict[str, Floats] = {}
    for path in dict.fromkeys(path for path, _ in changes):
        parts = [change for (own, _), change in changes.items() if own == path]
        if (path, None) in changes:
            tensors[f"{path}.lora_a"] = parts[0].a.T
            tensors[f"{path}.lora_b"] = parts[0].b.T / np.float32(scale)
        else:
            tensors[f"{path}.lora_a"] = np.stack([part.a for part in parts])
            tensors[f"{path}.lora_b"] = np.stack([part.b for part in parts]) / np.float32(scale)
        if parts[0].magnitude is not None:
            tensors[f"{path}.m"] = parts[0].magnitude
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": list(keys)}
    settings = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": config["num_hidden_layers"],
        "lora_parameters": parameters,
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    mx.save_safetensors(
        str(folder / "adapters.safetensors"), {name: mx.array(value) for name, value in tensors.items()}
    )
    return changes


def changed(weights: npt.NDArray[Any], change: LowRank) -> npt.NDArray[np.float64]:
    """``weights [out, in]`` after a change, value by value in float64."""
    out = weights.astype(np.float64)
    for row in range(len(out)):
        out[row] += sum(float(change.b[row, r]) * change.a[r].astype(np.float64) for r in range(len(change.a)))
        if change.magnitude is not None:
            out[row] *= float(change.magnitude[row]) / float(np.sqrt((out[row] ** 2).sum()))
    return out


def fused_by_hand(base: Mapping[str, Any], *adapters: Changes) -> dict[str, npt.NDArray[np.float64]]:
    """The tensors of an unquantised MLX folder after adapters, one after the other."""
    out = {name: np.array(value).astype(np.float64) for name, value in base.items()}
    for changes in adapters:
        for (path, expert), change in changes.items():
            tensor = out[f"{path}.weight"]
            where = ... if expert is None or tensor.ndim == 2 else expert
            tensor[where] = changed(tensor[where], change)
    return out


@dataclass
class MemoryAdapter(Adapter):
    """An adapter of arrays."""

    changes: Changes = field(default_factory=dict)
    whole: Mapping[str, Floats] = field(default_factory=dict)
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)
    folder: Path = Path("nowhere")
    name: str = "memory"
    kind: str = "PEFT"
    scale: float = 1.0
    notes: tuple[str, ...] = ()
    fingerprint: str = "0" * 64
    closed: bool = False

    def __post_init__(self) -> None:
        self.ranks = {path: len(change.a) for (path, _), change in self.changes.items()}
        self.dora = frozenset(path for (path, _), change in self.changes.items() if change.magnitude is not None)
        self.replaced, self.token_rows = frozenset(self.whole), frozenset(self.tokens)

    def low_rank(self, path: str, expert: int | None = None) -> LowRank | None:
        return self.changes.get((path, expert))

    def replacement(self, path: str) -> Floats:
        return self.whole[path]

    def rows(self, path: str) -> TokenRows:
        return self.tokens[path]

    def close(self) -> None:
        self.closed = True
