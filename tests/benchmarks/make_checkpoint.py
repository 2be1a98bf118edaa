"""Make a synthetic Mixtral checkpoint of a benchmark's shape: bfloat16, Hugging Face names, one tensor an expert.

    python tests/benchmarks/make_checkpoint.py wide bench-data/wide-2 --layers 2

Weights look Gaussian with standard deviation 0.02 and are the same for the same seed. They are written in blocks from one
pool of random numbers, so memory stays small and the disk sets the pace. There is no tokenizer.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# 8x7B: config.json of mistralai/Mixtral-8x7B-v0.1
_WIDE: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
SHAPES: dict[str, dict[str, Any]] = {
    "wide": _WIDE,
    "mid": _WIDE
    | {
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_hidden_layers": 8,
    },
    "skinny": _WIDE | {"intermediate_size": 64, "num_hidden_layers": 4},
}
STD = 0.02
POOL_VALUES = 2**22 + 4099
SHARD_BYTES = 4_000_000_000


class GaussianPool:
    """Bfloat16 values (as uint16) drawn once; every block is a stretch of them from a random place, negated or not."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        values = self._random.standard_normal(POOL_VALUES, np.float32) * np.float32(STD)
        bits = values.view(np.uint32)
        self._pool = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    def blocks(self, count: int) -> Iterator[npt.NDArray[np.uint16]]:
        while count > 0:
            start = int(self._random.integers(POOL_VALUES // 2))
            # A wandering start: rows of a matrix are practically never equal.
            block = self._pool[start : start + min(count, POOL_VALUES // 2)]
            yield block ^ np.uint16(0x8000 * int(self._random.integers(2)))
            count -= len(block)


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order they are written."""
    hidden, width, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        yield f"{path}.input_layernorm.weight", (hidden,)
        yield f"{path}.post_attention_layernorm.weight", (hidden,)
        yield f"{path}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{path}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{path}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{path}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{path}.block_sparse_moe.gate.weight", (config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            prefix = f"{path}.block_sparse_moe.experts.{expert}"
            yield f"{prefix}.w1.weight", (width, hidden)
            yield f"{prefix}.w2.weight", (hidden, width)
            yield f"{prefix}.w3.weight", (width, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def make(shape: str, folder: Path, *, layers: int | None = None, seed: int = 0) -> int:
    """Write the checkpoint of ``shape`` into ``folder`` and return its weights' bytes."""
    config = dict(SHAPES[shape])
    if layers is not None:
        config["num_hidden_layers"] = layers
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dims in tensors(config):
        nbytes = 2 * prod(dims)
        if filled and filled + nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, dims))
        filled += nbytes
    pool = GaussianPool(seed)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        total += _write_shard(folder / file, shard, pool)
        weight_map |= {name: file for name, _ in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def _write_shard(path: Path, shard: list[tuple[str, tuple[int, ...]]], pool: GaussianPool) -> int:
    with path.open("wb") as file:
        file.write(file_header(shard))
        for name, dims in shard:
            if "norm" in name:
                file.write(np.full(dims, 0x3F80, np.uint16).tobytes())  # 1.0
                continue
            for block in pool.blocks(prod(dims)):
                block.tofile(file)
    return sum(2 * prod(dims) for _, dims in shard)


def file_header(tensors: list[tuple[str, tuple[int, ...]]]) -> bytes:
    """The beginning of a safetensors file of bfloat16 tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in tensors:
        begin, end = end, end + 2 * prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    total = make(args.shape, args.folder, layers=args.layers, seed=args.seed)
    print(f"{args.folder}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
