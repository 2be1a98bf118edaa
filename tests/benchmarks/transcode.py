"""MB of packed weights per second and core: re-packed for MLX, and dequantised, beside the gguf package's own dequantiser.

python tests/benchmarks/transcode.py [ROWS]
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "convert")]

from mlx_mixtral.config.layout import matrices  # noqa: E402
from mlx_mixtral_convert.packing.transcode import AFFINE, dequantize_affine, transcode  # noqa: E402
from mlx_mixtral_convert.sources import PackedSource, open_source  # noqa: E402

COLUMNS = 4096


def rate(nbytes: int, work: Callable[[], object]) -> float:
    """MB/s by processor time of this thread, the best of three."""
    best = float("inf")
    for _ in range(3):
        started = time.thread_time()
        work()
        best = min(best, time.thread_time() - started)
    return nbytes / best / 1e6


def grouped(method: str, size: int) -> None:
    """AWQ and GPTQ: the expert's matrices of a one-layer checkpoint of random integers."""
    random, tensors = np.random.default_rng(0), {}
    path = "model.layers.0."

    def packed(name: str, outputs: int, inputs: int) -> None:
        shape = (inputs, outputs // 8) if method == "awq" else (inputs // 8, outputs)
        words = {"qweight": shape, "qzeros": (inputs // 128, outputs // 8)}
        for field, axes in words.items():
            tensors[f"{name}.{field}"] = random.integers(-(2**31), 2**31, axes).astype(np.int32)
        tensors[f"{name}.scales"] = random.random((inputs // 128, outputs)).astype(np.float16)

    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = np.zeros((64, size), np.float16)
    for name in ("model.norm", f"{path}input_layernorm", f"{path}post_attention_layernorm"):
        tensors[f"{name}.weight"] = np.ones(size, np.float16)
    tensors[f"{path}block_sparse_moe.gate.weight"] = np.zeros((1, size), np.float16)
    for name in "qkvo":
        packed(f"{path}self_attn.{name}_proj", size, size)
    for number in (1, 2, 3):
        packed(f"{path}block_sparse_moe.experts.0.w{number}", size, size)
    config = {
        "model_type": "mixtral", "hidden_size": size, "intermediate_size": size, "num_hidden_layers": 1,
        "num_attention_heads": size // 128, "num_key_value_heads": size // 128, "num_local_experts": 1,
        "num_experts_per_tok": 1, "vocab_size": 64, "max_position_embeddings": 64, "rope_theta": 1e6,
        "quantization_config": {"quant_method": method, "bits": 4, "group_size": 128, "version": "gemm"},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        save_file(tensors, str(Path(folder, "model.safetensors")))
        with open_source(Path(folder)) as source:
            assert isinstance(source, PackedSource)
            matrix = next(m for m in matrices(source.config) if m.part == "expert")
            scratch = np.empty(4 * size * size, np.uint8)
            exact = rate(size * size // 2, lambda: source.read_packed(matrix, 0))
            floats = rate(size * size // 2, lambda: source.read(matrix, 0, scratch))
    print(f"{method.upper():6} {exact:8.0f} {floats:12.0f}")


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    print(f"{'type':6} {'exact':>8} {'dequantised':>12} {'gguf package':>13}   MB/s of source, one core")
    for name, kind in AFFINE.items():
        raw = np.random.default_rng(0).integers(0, 60, (rows, COLUMNS // kind.weights * kind.block_bytes), np.uint8)
        out = np.empty((rows, COLUMNS), np.float32)
        theirs = gguf.GGMLQuantizationType[name]
        part = raw[: rows // 8]
        exact = rate(raw.nbytes, lambda raw=raw, kind=kind: transcode(raw, kind, "x"))  # type: ignore[misc]
        floats = rate(raw.nbytes, lambda raw=raw, kind=kind, out=out: dequantize_affine(raw, kind, out))  # type: ignore[misc]
        package = rate(part.nbytes, lambda part=part, theirs=theirs: gguf.quants.dequantize(part, theirs))  # type: ignore[misc]
        print(f"{name:6} {exact:8.0f} {floats:12.0f} {package:13.0f}")
    for method in ("awq", "gptq"):
        grouped(method, 4096)


if __name__ == "__main__":
    main()
