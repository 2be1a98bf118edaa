"""mlx-lm's networks and quantisers, for ``quality.py``: all that is quantised is evaluated by the same code."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

# Bits and group of the uniform conversions, 4.5, 4.0 and 3.5 bits with scales; the fitted ones are held to their bytes.
WIDTHS = {"4": (4, 64), "3.5": (3, 32), "3": (3, 64)}


def load_network(folder: Path) -> Any:
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


def mean_kl(network: Any, tokens: mx.array, reference: Path) -> float:
    true, other = mx.load(str(reference))["reference"], log_probabilities(network, tokens)
    return float(np.mean([(mx.exp(p) * (p - q)).sum(axis=-1).mean().item() for p, q in zip(true, other, strict=True)]))


def _uniform(network: Any, tokens: mx.array, argument: str) -> Any:
    from mlx_lm.utils import quantize_model

    bits, group = WIDTHS[argument]
    return quantize_model(network, {}, group, bits)[0]


def _mixed(network: Any, tokens: mx.array, argument: str) -> Any:
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model

    return quantize_model(network, {}, 64, 4, quant_predicate=mixed_quant_predicate_builder(argument, network, 64))[0]


def _gptq(network: Any, tokens: mx.array, argument: str) -> Any:
    from mlx_lm.quant.gptq import gptq_quantize

    bits, group = WIDTHS[argument]
    return gptq_quantize(network, tokens, bits, group, 6, 64)[0]


def _dynamic(network: Any, tokens: mx.array, argument: str) -> Any:
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold
    from mlx_lm.utils import quantize_model

    low, high, target = (float(part) for part in argument.split("/"))
    found = dict(estimate_sensitivities(network, tokens, int(low), 64, int(high), 64))
    threshold = estimate_threshold(network, found, target, int(low), 64, int(high), 64)

    def predicate(path: str, module: Any) -> Any:
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": int(high), "group_size": 64} if found[path] > threshold else True

    return quantize_model(network, {}, 64, int(low), quant_predicate=predicate)[0]


def _dwq(network: Any, tokens: mx.array, argument: str) -> Any:
    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize
    from mlx_lm.utils import quantize_model

    width, rate = argument.split("@")
    bits, group = WIDTHS[width]
    student = quantize_model(copy.deepcopy(network), {}, group, bits)[0]
    listed = [(row, 0) for row in np.array(tokens).tolist()]
    train, valid = listed[4:] * 6, listed[:4]
    dwq_quantize(
        student, lambda batch, _index, split: network(batch), Adam(float(rate), bias_correction=True), train, valid, 4, 257, 0,
        dtype=mx.float32,
    )  # fmt: skip
    return student


METHODS = {"uniform": _uniform, "mixed": _mixed, "gptq": _gptq, "dynamic": _dynamic, "dwq": _dwq}
