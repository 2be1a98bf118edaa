"""Losses to fit by when a checkpoint was not calibrated: a simple model of Mixtral.

A packing's error falls by four for every bit, by five from the first to the second (as on the bundled checkpoint), and a little
with smaller groups: ``error = 4^-bits (g / 64)^0.25``. A group's loss is its error times its weight. The weights follow the
measured perplexities of arXiv 2312.17238 (Mixtral 8x7B, Wiki2; 16 bits 3.59): attention at 4 and experts at 2 bits 4.61,
attention at 2 and experts at 4 bits 5.08; attention loses more, though the experts hold 97% of the parameters. Over the layers
the first two and the last count double; embedding and head count as one layer's attention each. These last two are judgement,
not measurement.

A calibration of the model at hand is better.
"""

from __future__ import annotations

from mlx_mixtral.config.layout import matrices
from mlx_mixtral.config.mixtral import MixtralConfig
from mlx_mixtral_convert.calibration.file import Losses
from mlx_mixtral_convert.calibration.sensitivity import candidates_for, group_of

__all__ = ["default_losses"]

# Perplexities 4.61 and 5.08 against 3.59, in nats at 2 bits: ln(4.61 / 3.59) = 0.25 for the experts, ln(5.08 / 3.59) = 0.35.
_EXPERTS_AT_2_BITS, _ATTENTION_AT_2_BITS = 0.25, 0.35
_SHARES = {"qkv": 0.5, "o": 0.5, "gate_up": 0.5, "down": 0.5}


def default_losses(config: MixtralConfig) -> Losses:
    """Predicted KL of every group and packing, in nats per token, as a calibration has them."""
    layers = config.num_hidden_layers
    emphasis = [2.0 if index < 2 or index == layers - 1 else 1.0 for index in range(layers)]
    losses: dict[str, dict[str, float]] = {}
    for matrix in matrices(config):
        if (name := group_of(matrix)) is None:
            continue
        at_2_bits = _EXPERTS_AT_2_BITS if matrix.part == "expert" else _ATTENTION_AT_2_BITS
        share = 1.0 if matrix.layer is None else emphasis[matrix.layer] * _SHARES[name.rpartition(".")[2]]
        weight = 16 * at_2_bits * share / sum(emphasis)
        losses[name] = {
            str(spec): weight * (5 / 16 if spec.bits == 1 else 4.0**-spec.bits) * (spec.group_size / 64) ** 0.25
            for spec in candidates_for(matrix.in_features)
        }
    return losses
