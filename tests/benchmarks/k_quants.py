"""K-quants of the exporter beside llama.cpp's own quantiser: error of the weights, and KL of the logits, both run by llama.cpp.

    python -m venv llama && llama/bin/pip install llama-cpp-python==0.3.36
    python tests/benchmarks/k_quants.py --llama llama/bin/python Q2_K Q4_K_M

The model is the bundled checkpoint widened to rows of 256 and 512: an orthogonal matrix mixes its hidden features, and a third
of each expert's neurons is there twice. It computes the same. Both quantisers get the same importance of inputs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf import quants
from llama_files import quantise, run_llama, tensor_name
from safetensors.numpy import save_file
from sentencepiece import SentencePieceProcessor

from mlx_mixtral.config.layout import matrices
from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral_convert import Calibration, calibrate
from mlx_mixtral_convert.export import export
from mlx_mixtral_convert.rounding import Search
from mlx_mixtral_convert.sources import open_source

HELD_OUT = Path(__file__).parents[1] / "goldens" / "tiny-mixtral" / "heldout"
TOKENS = 384
Arrays = dict[str, np.ndarray]
# A file's logits, by llama.cpp.
LOGITS = """
import sys
import numpy as np
from llama_cpp import Llama, llama_cpp as lib
plain = lib.llama_model_default_params
def default():
    given = plain()
    given.use_extra_bufts = False
    return given
lib.llama_model_default_params = default
model, out = Llama(sys.argv[1], n_ctx=1024, n_batch=1024, verbose=False, logits_all=True), []
for row in np.load(sys.argv[2]):
    model.reset()
    model.eval(row.tolist())
    out.append(np.array(model.scores[: len(row)], np.float32))
np.save(sys.argv[3], np.stack(out))
"""


def widen(dest: Path) -> None:
    """The bundled checkpoint with rows of 256 and 512, in float32."""
    source, hidden = checkpoint_path(), 256
    weights = {name: np.array(a.astype(mx.float32)) for name, a in mx.load(str(source / "model.safetensors")).items()}
    config = json.loads((source / "config.json").read_text())
    old, extra = config["hidden_size"], 512 - config["intermediate_size"]
    mix = np.linalg.qr(np.random.default_rng(1).standard_normal((hidden, hidden)))[0][:, :old]
    made: Arrays = {}
    for name, weight in weights.items():
        layer = ".".join(name.split(".")[:3])
        if "norm" in name:
            wide = np.ones(hidden)
        elif "embed_tokens" in name:
            wide = weight @ mix.T
        elif name.endswith("o_proj.weight"):
            wide = mix @ weight
        elif name.endswith("w2.weight"):
            halved = weight * np.where(np.arange(weight.shape[1]) < extra, 0.5, 1)
            wide = mix @ np.concatenate([halved, halved[:, :extra]], axis=1)
        else:
            before = "input_layernorm" if "self_attn" in name else "post_attention_layernorm"
            norm = weights["model.norm.weight" if name.startswith("lm_head") else f"{layer}.{before}.weight"]
            wide = (weight * norm * np.sqrt(old / hidden)) @ mix.T
            if name.endswith(("w1.weight", "w3.weight")):
                wide = np.concatenate([wide, wide[:extra]])
        made[name] = np.ascontiguousarray(wide, np.float32)
    dest.mkdir()
    config |= {"hidden_size": hidden, "intermediate_size": 512, "head_dim": old // config["num_attention_heads"]}
    config |= {"rms_norm_eps": config["rms_norm_eps"] * old / hidden, "dtype": "float32"}
    (dest / "config.json").write_text(json.dumps(config))
    save_file(made, str(dest / "model.safetensors"), {"format": "pt"})
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, dest / name)


def importance_of(folder: Path, calibration: Calibration) -> Arrays:
    """By GGUF's names, experts one after another."""
    search, found = Search(calibration), {}
    with open_source(folder, "hf") as source:
        for matrix in matrices(source.config):
            rows = [search.importance(matrix, expert) for expert in range(matrix.num_experts or 1)]
            if rows[0] is not None:
                found[tensor_name(matrix)] = np.stack([np.array(row) for row in rows])
    return found


def read(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def relative_error(path: Path, wanted: Arrays, importance: Arrays) -> dict[str, float]:
    """By type, over all tensors of it."""
    sums: dict[str, list[float]] = {}
    for name, tensor in read(path).items():
        found = quants.dequantize(tensor.data, tensor.tensor_type).reshape(wanted[name].shape).astype(np.float64)
        weight = importance[name] if name in importance else np.ones((1, found.shape[-1]))
        weight = weight[:, None] if found.ndim == 3 else weight
        total = sums.setdefault(tensor.tensor_type.name, [0.0, 0.0])
        total[0] += float((weight * np.square(found - wanted[name])).sum())
        total[1] += float((weight * np.square(wanted[name])).sum())
    return {kind: (error / whole) ** 0.5 for kind, (error, whole) in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", required=True, help="a Python that has llama-cpp-python")
    parser.add_argument("mixes", nargs="+")
    given = parser.parse_args()

    def log_probabilities(path: Path) -> np.ndarray:
        run_llama(given.llama, LOGITS, path, scratch / "ids.npy", scratch / "logits.npy")
        logits = np.load(scratch / "logits.npy").astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    with tempfile.TemporaryDirectory() as held:
        scratch = Path(held)
        widen(scratch / "wide")
        pieces = SentencePieceProcessor(model_file=str(scratch / "wide" / "tokenizer.model"))
        texts = [pieces.Encode(path.read_text(encoding="utf-8")) for path in sorted(HELD_OUT.glob("*.txt"))]
        np.save(scratch / "ids.npy", np.array([[1, *ids[: TOKENS - 1]] for ids in texts]))
        calibration = calibrate(scratch / "wide", sensitivities=False)
        importance = importance_of(scratch / "wide", calibration)
        export(scratch / "wide", scratch / "f16.gguf", to="gguf", type="F16")
        wanted = {name: np.asarray(tensor.data, np.float64) for name, tensor in read(scratch / "f16.gguf").items()}
        base = log_probabilities(scratch / "f16.gguf")
        print("| mix | bytes | type | error | llama.cpp's | KL | llama.cpp's |\n|---|---|---|---|---|---|---|")
        for mix in given.mixes:
            for how, used in (("", {}), (", calibrated", importance)):
                ours, theirs = scratch / "ours.gguf", scratch / "theirs.gguf"
                export(
                    scratch / "wide",
                    ours,
                    to="gguf",
                    type=mix,
                    overwrite=True,
                    calibration=calibration if used else None,
                )
                quantise(given.llama, scratch / "f16.gguf", theirs, mix, used or None, join=False)
                kinds = [{name: tensor.tensor_type for name, tensor in read(path).items()} for path in (ours, theirs)]
                assert kinds[0] == kinds[1]
                errors = [relative_error(path, wanted, used) for path in (ours, theirs)]
                main_type = mix[:4]
                kl = [(np.exp(base) * (base - log_probabilities(path))).sum(-1).mean() for path in (ours, theirs)]
                cells = [f"{error[main_type]:.2%}" for error in errors] + [f"{value:.5f}" for value in kl]
                print(f"| {mix}{how} | {ours.stat().st_size:,} | {main_type} | {' | '.join(cells)} |", flush=True)
                theirs.unlink()


if __name__ == "__main__":
    main()
