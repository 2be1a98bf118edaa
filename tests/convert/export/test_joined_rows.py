"""The benchmark's detour for llama.cpp's types: rows joined in the header of a GGUF file are the same weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np

from mlx_mixtral.config.layout import matrices
from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral_convert.sources import open_source
from tests.benchmarks.llama_files import file_bytes, join_rows, read_back, tensor_name, write_f16


def test_joined_rows_divide_into_blocks_and_read_back_as_the_weights_they_were(tmp_path: Path) -> None:
    source = checkpoint_path()
    write_f16(source, source / "tokenizer.model", tmp_path / "f16.gguf")
    before = file_bytes(tmp_path / "f16.gguf")
    with open_source(source, "hf") as opened:
        config = opened.config
    join_rows(tmp_path / "f16.gguf", config)
    found = read_back(tmp_path / "f16.gguf", config)
    assert file_bytes(tmp_path / "f16.gguf") == before
    shapes = {tensor.name: tensor.shape for tensor in gguf.GGUFReader(tmp_path / "f16.gguf").tensors}
    weights = mx.load(str(source / "model.safetensors"))
    for matrix in matrices(config):
        if matrix.part != "router":
            assert shapes[tensor_name(matrix)][0] % 256 == 0
        if matrix.part in ("embedding", "attention", "head"):
            true = np.array(weights[f"{matrix.path}.weight"].astype(mx.float16).astype(mx.float32))
            np.testing.assert_array_equal(found[matrix.path][0], true)
    experts = "model.layers.2.block_sparse_moe.experts.{}.w2.weight"
    true = np.stack([np.array(weights[experts.format(e)].astype(mx.float16).astype(mx.float32)) for e in range(8)])
    np.testing.assert_array_equal(found["model.layers.2.block_sparse_moe.switch_mlp.down_proj"][0], true)
