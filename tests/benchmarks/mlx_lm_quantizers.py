"""mlx-lm's quantisers, for ``quality.py``."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import numpy as np

# Bits and group of uniform conversions. They take bits + 32 / group for each weight: a scale and a bias of 16 bits a group.
WIDTHS = {f"{bits}g{group}": (bits, group) for bits in (2, 3, 4) for group in (128, 64, 32)}


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
