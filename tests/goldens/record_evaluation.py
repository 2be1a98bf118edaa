"""Record perplexities and KL divergences of the bundled checkpoint, from logits of transformers and float64 NumPy.

    python tests/goldens/record_evaluation.py [OUT_FILE]

Two models on three short texts: the checkpoint, and a coarse copy whose bfloat16 weights keep one bit of mantissa (the low
six bits zero), which a test can make again. Logits are computed in float32 with eager attention and no cache, a window at
a time in a plain loop; everything after them is float64 NumPy. `evaluation.json` has, for each pair of window and stride,
for all texts and for each: the negative log-likelihood of every text, mean KL(checkpoint || coarse) over the whole vocabulary
and with all but the K likeliest tokens merged, percentiles, and top-1 agreement.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file

CHECKPOINT = Path(__file__).parents[2] / "mlx_mixtral" / "demo" / "tiny-mixtral"
HELD_OUT = Path(__file__).parent / "tiny-mixtral" / "heldout"
TEXTS = {"en": 200, "fr": 170, "code": 140}  # characters of each held-out text
WINDOWS = [(32, 32), (32, 12), (1024, 1024)]
TOP_K = 16
MASK = 0xFFC0

Array = np.ndarray[Any, Any]


def load(coarse: bool) -> Any:
    """The checkpoint in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        CHECKPOINT, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    if coarse:
        for name, tensor in load_file(CHECKPOINT / "model.safetensors").items():
            bits = tensor.view(torch.int16).numpy().view(np.uint16) & MASK
            rounded = torch.from_numpy((bits.astype(np.uint32) << 16).view(np.float32))
            place = parameter(model, name)
            place.data.copy_(rounded)
    return model


def parameter(model: Any, name: str) -> torch.Tensor:
    """The tensor of the model that a name of the file stands for; experts are rows of fused ones in transformers 5."""
    found = dict(model.named_parameters())
    if name in found:
        return found[name].data
    prefix, _, rest = name.partition(".block_sparse_moe.")
    if rest == "gate.weight":
        return found[f"{prefix}.mlp.gate.weight"].data
    _, expert, matrix, _ = rest.split(".")
    if matrix == "w2":
        return found[f"{prefix}.mlp.experts.down_proj"].data[int(expert)]
    fused = found[f"{prefix}.mlp.experts.gate_up_proj"].data[int(expert)]
    half = len(fused) // 2
    return fused[:half] if matrix == "w1" else fused[half:]


@torch.no_grad()
def log_probabilities(model: Any, ids: list[int], window: int, stride: int) -> Array:
    """Row j - 1 is the distribution of token j, float64 ``[n, V]``."""
    rows: list[Array] = []
    start = 0
    while len(rows) < len(ids) - 1:
        inputs = ids[start : min(start + window, len(ids) - 1)]
        logits = model(torch.tensor([inputs]), use_cache=False).logits[0].double().numpy()
        shifted = logits - logits.max(axis=-1, keepdims=True)
        found = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        rows += list(found[len(rows) - start :])
        start += stride
    return np.stack(rows)


def merged_kl(p: Array, q: Array, count: int) -> Array:
    """KL with all but the ``count`` likeliest tokens of p as one, row by row."""
    found = []
    for own, other in zip(p, q, strict=True):
        order = np.argsort(-own, kind="stable")
        kept, rest = order[:count], order[count:]
        a, b = np.exp(own[rest]).sum(), np.exp(other[rest]).sum()
        found.append((np.exp(own[kept]) * (own[kept] - other[kept])).sum() + a * np.log(a / b))
    return np.array(found)


def main(out: Path) -> None:
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(CHECKPOINT / "tokenizer.model"))
    texts = {name: (HELD_OUT / f"{name}.txt").read_text(encoding="utf-8")[:size] for name, size in TEXTS.items()}
    ids = {name: [tokenizer.bos_id(), *tokenizer.encode(text)] for name, text in texts.items()}
    plain, coarse = load(False), load(True)
    cases = []
    for window, stride in WINDOWS:
        case: dict[str, Any] = {"window": window, "stride": stride, "nll": {}, "coarse_nll": {}}
        full, merged, agree = [], [], []
        for name, tokens in ids.items():
            p, q = (log_probabilities(model, tokens, window, stride) for model in (plain, coarse))
            places, targets = np.arange(len(tokens) - 1), tokens[1:]
            case["nll"][name] = float(-p[places, targets].sum())
            case["coarse_nll"][name] = float(-q[places, targets].sum())
            full.append((np.exp(p) * (p - q)).sum(axis=-1))
            merged.append(merged_kl(p, q, TOP_K))
            agree.append(p.argmax(axis=-1) == q.argmax(axis=-1))
        kl = np.concatenate(full)
        case |= {
            "kl": {name: float(part.mean()) for name, part in zip(ids, full, strict=True)},
            "kl_mean": float(kl.mean()),
            "kl_percentiles": {str(at): float(np.percentile(kl, at)) for at in (50, 90, 95, 99, 100)},
            "kl_merged": float(np.concatenate(merged).mean()),
            "top1_agreement": float(np.concatenate(agree).mean()),
        }
        print({key: value for key, value in case.items() if not isinstance(value, dict)})
        cases.append(case)
    result = {"texts": texts, "ids": ids, "mask": MASK, "top_k": TOP_K, "cases": cases}
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "evaluation.json")
