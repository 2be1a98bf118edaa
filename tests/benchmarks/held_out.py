"""KL to the unquantised model on the held-out texts, of any weights: what ``quality.py`` measures, to be called from elsewhere.

    from held_out import held_out_kl
    held_out_kl(Path("mixtral-3bit"))                      a folder of ours or of mlx-lm's
    held_out_kl({"lm_head.weight": changed}, "smollm2")    float weights by MLX's names; what is not given stays as it is

The texts are for measuring only: nothing may be tuned on them. Every network is evaluated by the same code, mlx-lm's, in
float32, from the values its weights stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral.tokenizer import load_tokenizer
from mlx_mixtral.weights.safetensors import read_header
from mlx_mixtral_convert.calibration.text import default_texts, sequences

HELD_OUT = Path(__file__).parents[1] / "goldens" / "tiny-mixtral" / "heldout"
UPCYCLED = Path(__file__).parents[2] / "bench-data" / "upcycled"
START = 4000  # characters into each file


@dataclass(frozen=True)
class Subject:
    """A model to quantise, the tokens of each held-out text and of the calibration text, and rows that take too long.

    ``taken_apart``: its rows say bits and errors by kind of matrix, too. ``upcycled``: all experts of a layer are copies of a
    dense model's network, so that what packing all of them alike costs can be measured on that one.
    """

    title: str
    folder: Path
    held_out_tokens: int
    calibration_tokens: int | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    taken_apart: bool = True
    upcycled: bool = False

    @property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    @property
    def parameters(self) -> int:
        return sum(
            prod(info.shape) for file in self.folder.glob("*.safetensors") for info in read_header(file).values()
        )

    def held_out(self) -> mx.array:
        """Token ids ``[7, L]``."""
        texts = [path.read_text()[START : START + 4000] for path in sorted(HELD_OUT.glob("*.txt"))]
        return mx.array([self.tokenizer.encode(text)[: self.held_out_tokens] for text in texts])

    def calibration(self) -> mx.array:
        """Token ids ``[B, 256]``, those that ``calibrate`` takes."""
        return mx.array(sequences(self.tokenizer, default_texts(), self.calibration_tokens, 1024))


_LONG = "3,100 s per row, and at 4 bits no better than gptq"
SUBJECTS = {
    "tiny": Subject(
        "The bundled checkpoint, 8.4 million weights",
        checkpoint_path(),
        300,
        left_out={"mlx-lm dwq 3g*": "ended before it was done, after minutes"},
    ),
    "smollm2": Subject(
        "SmolLM2-135M as a mixture, 692 million weights",
        UPCYCLED,
        128,
        2048,
        left_out={"mlx-lm dwq 3g*": _LONG, "mlx-lm dynamic_quant*": "13 GB and ten minutes per row"},
        taken_apart=False,
        upcycled=True,
    ),
}


def load_network(folder: Path) -> Any:
    """mlx-lm's network."""
    from mlx_lm.utils import load_model

    network, _ = load_model(folder)
    # 16-bit arithmetic is slow on the CPU backend; what is stored in 16 bits is rounded to them where it counts.
    network.set_dtype(mx.float32)
    return network


class ByExpert(nn.Module):
    """mlx-lm's ``SwitchGLU``, unquantised, one expert after the other: the same sums in large products, far faster on a CPU."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def __call__(self, x: mx.array, selected_experts: mx.array) -> mx.array:
        flat, chosen = x.reshape(-1, x.shape[-1]), np.array(selected_experts).reshape(-1, selected_experts.shape[-1])
        out = mx.zeros((*chosen.shape, x.shape[-1]))
        gates, ups, downs = (self.experts[name].weight for name in ("gate_proj", "up_proj", "down_proj"))
        for expert in range(len(gates)):
            tokens, places = (mx.array(found.astype(np.int32)) for found in np.nonzero(chosen == expert))
            if tokens.size:
                own = flat[tokens]
                inner = nn.silu(own @ gates[expert].T) * (own @ ups[expert].T)
                out[tokens, places] = inner @ downs[expert].T
        return out.reshape(*selected_experts.shape, -1)


def log_probabilities(network: Any, tokens: mx.array) -> mx.array:
    """``[7, L, V]`` float32; ``network`` is mlx-lm's, quantised or not, its floats in float32. It is used up."""
    from mlx_lm.utils import dequantize_model

    network = dequantize_model(network)
    for layer in network.layers:
        layer.block_sparse_moe.switch_mlp = ByExpert(layer.block_sparse_moe.switch_mlp)
    network.eval()
    found = []
    for text in tokens:
        logits = network(text[None])[0]
        found.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(found)
    return mx.stack(found)


def kl_by_text(true: mx.array, other: mx.array) -> list[float]:
    """Of log-probabilities ``[7, L, V]``: mean KL in nats per token, text by text."""
    return [(mx.exp(p) * (p - q)).sum(axis=-1).mean().item() for p, q in zip(true, other, strict=True)]


@cache
def reference(model: str, kept: Path | None = None) -> mx.array:
    """The unquantised model's log-probabilities; ``kept`` is a safetensors file that is read, or written when it is missing."""
    if kept is not None and kept.exists():
        return mx.load(str(kept))["reference"]
    subject = SUBJECTS[model]
    found = log_probabilities(load_network(subject.folder), subject.held_out())
    if kept is not None:
        mx.save_safetensors(str(kept), {"reference": found})
    return found


def held_out_kl(weights: Path | Mapping[str, mx.array] | Any, model: str = "tiny", kept: Path | None = None) -> float:
    """Mean KL to the unquantised model over the seven held-out texts, in nats per token.

    Args:
        weights: a folder, mlx-lm's network (used up), or float arrays by parameter name, experts stacked
            (``model.layers.0.block_sparse_moe.switch_mlp.gate_proj.weight [E, F, D]``), for the model's own.
        model: which of ``SUBJECTS`` they are of.
        kept: file of the unquantised model's log-probabilities, made when it is missing. Within a process they are made once.
    """
    subject = SUBJECTS[model]
    if isinstance(weights, Path):
        network = load_network(weights)
    elif not isinstance(weights, nn.Module):  # modules are mappings too
        network = load_network(subject.folder)
        network.load_weights([(name, array.astype(mx.float32)) for name, array in weights.items()], strict=False)
    else:
        network = weights
    return float(np.mean(kl_by_text(reference(model, kept), log_probabilities(network, subject.held_out()))))
