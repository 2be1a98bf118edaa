"""Record blocks that llama.cpp's quantiser makes of a few rows, and which tensor gets which type in its mixes.

    pip install llama-cpp-python==0.3.36 gguf==0.19.0 && python tests/goldens/record_k_quants.py

`k_quants.npz` holds `weights` float16 [rows, columns] (Gaussian ones, then heavy-tailed ones), `importance` [columns], and for
every type the blocks uint8 made without and with it: `Q4_K.plain`, `Q4_K.weighted`.
`gguf_mixes.json` holds for each shape of model and each mix the types of every kind of tensor, layer by layer, as
[type, how many layers].
"""

from __future__ import annotations

import ctypes
import itertools
import json
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as lib

HERE = Path(__file__).parent
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
MIXES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
ROWS, COLUMNS = 6, 512
_SHAPE = {"hidden": 256, "width": 256, "heads": 4, "kv_heads": 1, "layers": 32, "experts": 8, "tied": False}
SHAPES = {
    "8x7B": _SHAPE | {"kv_heads": 2},
    "8x22B": _SHAPE | {"layers": 56},
    "sixteen experts": _SHAPE | {"experts": 16, "layers": 6, "kv_heads": 2},
    "dense": _SHAPE | {"experts": 1, "layers": 22},
    "dense, 80 layers": _SHAPE | {"experts": 1, "layers": 80},
    "tied": _SHAPE | {"experts": 1, "layers": 5, "tied": True},
    "narrow": _SHAPE | {"hidden": 128, "layers": 6},
    "odd width": _SHAPE | {"width": 80, "layers": 4},
}


def blocks(ggml: ctypes.CDLL, kind: str, weights: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    number = gguf.GGMLQuantizationType[kind]
    weights_of, block_bytes = gguf.GGML_QUANT_SIZES[number]
    out = np.zeros((len(weights), weights.shape[1] // weights_of * block_bytes), np.uint8)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    written = ggml.ggml_quantize_chunk(
        ctypes.c_int(number),
        ctypes.c_void_p(weights.ctypes.data),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_int64(0),
        ctypes.c_int64(len(weights)),
        ctypes.c_int64(weights.shape[1]),
        None if importance is None else ctypes.c_void_p(importance.ctypes.data),
    )
    assert written == out.size
    return out


def write_model(path: Path, shape: dict[str, int]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(shape["layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(shape["hidden"])
    writer.add_feed_forward_length(shape["width"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    if shape["experts"] > 1:
        writer.add_expert_count(shape["experts"])
        writer.add_expert_used_count(2)
    hidden, width, kv = shape["hidden"], shape["width"], shape["hidden"] * shape["kv_heads"] // shape["heads"]
    experts = (shape["experts"],) if shape["experts"] > 1 else ()
    suffix = "_exps" if experts else ""
    shapes = {"token_embd": (8, hidden)} | ({} if shape["tied"] else {"output": (8, hidden)})
    for layer in range(shape["layers"]):
        named = {
            "attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_output": (hidden, hidden),
            f"ffn_gate{suffix}": (*experts, width, hidden), f"ffn_up{suffix}": (*experts, width, hidden),
            f"ffn_down{suffix}": (*experts, hidden, width),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}": size for name, size in named.items()}
    for name, size in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mix_types(source: Path, dest: Path, mix: str) -> dict[str, list[list[object]]]:
    options = lib.llama_model_quantize_default_params()
    options.nthread, options.ftype = 1, getattr(lib, f"LLAMA_FTYPE_MOSTLY_{mix}")
    assert lib.llama_model_quantize(str(source).encode(), str(dest).encode(), ctypes.byref(options)) == 0
    found: dict[str, dict[int, str]] = {}
    for tensor in gguf.GGUFReader(dest).tensors:
        *layer, name = tensor.name.removesuffix(".weight").removeprefix("blk.").split(".")
        found.setdefault(name.removesuffix("_exps"), {})[int(layer[0]) if layer else 0] = tensor.tensor_type.name
    return {
        name: [[kind, len(list(run))] for kind, run in itertools.groupby(by_layer[i] for i in sorted(by_layer))]
        for name, by_layer in found.items()
    }


def main() -> None:
    folder = Path(llama_cpp.__file__).parent / "lib"
    ggml = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
    random = np.random.default_rng(0)
    plain = random.standard_normal((ROWS // 2, COLUMNS))
    heavy = random.standard_t(3, (ROWS // 2, COLUMNS))
    weights = (0.02 * np.concatenate([plain, heavy])).astype(np.float16)
    importance = np.exp(random.standard_normal(COLUMNS)).astype(np.float32)
    arrays: dict[str, np.ndarray] = {"weights": weights, "importance": importance}
    for kind in TYPES:
        arrays[f"{kind}.plain"] = blocks(ggml, kind, weights.astype(np.float32), None)
        arrays[f"{kind}.weighted"] = blocks(ggml, kind, weights.astype(np.float32), importance)
    np.savez_compressed(HERE / "k_quants.npz", **arrays)
    recorded: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, shape in SHAPES.items():
            source, dest = Path(scratch) / "source.gguf", Path(scratch) / "dest.gguf"
            write_model(source, shape)
            recorded[name] = {"shape": shape, "types": {mix: mix_types(source, dest, mix) for mix in MIXES}}
    (HERE / "gguf_mixes.json").write_text(json.dumps(recorded, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
