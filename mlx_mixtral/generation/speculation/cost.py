r"""What a forward over several tokens costs on a mixture of experts.

A forward reads the trunk (attention, embeddings, head) once, however many tokens it has. Not so the experts: more tokens
choose more of them. If each of n tokens chose K of E experts by chance, a layer would need

    D(n) = E (1 - (1 - K / E)^n)

distinct ones, against K for one token: for 8x7B 2, 3.5, 4.6, 5.5 for 1 to 4 tokens, 7.2 for 8. (Tokens that follow each other
choose more alike than that, so it errs on the side of caution.) What has to be moved in a layer:

    from disk     those of the D(n) that are not in memory: D(n) (1 - h) at the hit rate h of single tokens, and no less
                  than D(n) - S with S slots. A miss in one layer can be read while its hits are computed.
    from memory   D(n) experts where the grouped kernel runs. MLX's gathered products, which run below
                  ``gathers_sorted``, read an expert once for every token that chose it: n K.

A layer that is streamed waits for its router once a forward. So with T bytes of trunk, e of an expert in memory and f on disk,
a forward of n tokens takes, layer by layer,

    seconds(n) = (T + layers R(n) e) / memory rate + streamed layers x (read-back + waiting for the disk)
    R(n) = n K, or D(n) from the grouped kernel's threshold on

8x7B resident, T being 12% of a step's bytes: 1 token costs 1, 2 tokens 1.9, 4 tokens 3.6, 15 tokens 13.3, and 16 tokens, from
where each expert is read once, 3.6. Proposing 3 tokens hardly pays there even when all are right; proposing 15 pays from 3
accepted ones on.
A dense model has no experts: every n costs 1, until the arithmetic takes longer than the reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_mixtral.budget.slots import ModelSizes, Speeds
from mlx_mixtral.layers.linear import gathers_sorted

__all__ = ["ForwardCost", "distinct_experts"]

# With all weights in memory only ratios count: any rate does.
NOMINAL_SPEEDS = Speeds(disk_bytes_per_s=1e9, memory_bytes_per_s=1e11, readback_s=0.0)


def distinct_experts(num_experts: int, per_token: int, tokens: int) -> float:
    """Expected number of experts that ``tokens`` tokens choose in a layer, each ``per_token`` of ``num_experts`` by chance."""
    return float(num_experts * (1.0 - (1.0 - per_token / num_experts) ** tokens))


@dataclass(frozen=True)
class ForwardCost:
    """The model above for one loaded model.

    Args:
        sizes: bytes of trunk and experts; a dense model is all trunk.
        speeds: measured; None when nothing is streamed.
        slots: of each layer, as in a plan; None when nothing is streamed.
        hit_rates: of each layer for single tokens, as in a plan.
    """

    sizes: ModelSizes
    speeds: Speeds | None = None
    slots: Sequence[int] | None = None
    hit_rates: Sequence[float] = ()

    def seconds(self, tokens: int) -> float:
        """Predicted time of a forward over ``tokens`` tokens; in a unit of its own without ``speeds``."""
        speeds, sizes = self.speeds or NOMINAL_SPEEDS, self.sizes
        total = sizes.trunk_bytes / speeds.memory_bytes_per_s
        for layer, nbytes in enumerate(sizes.expert_bytes):
            read_s = nbytes / speeds.memory_bytes_per_s
            total += self.expert_reads(tokens) * read_s
            if self.slots is not None and self.slots[layer] < sizes.num_experts:
                missed = self._misses(layer, tokens)
                hits = distinct_experts(sizes.num_experts, sizes.num_experts_per_tok, tokens) - missed
                load_s = sizes.expert_file_bytes[layer] / speeds.disk_bytes_per_s
                total += speeds.readback_s + max(missed * load_s - hits * read_s, 0.0)
        return total

    def expert_reads(self, tokens: int) -> float:
        """How often a layer's experts are read from memory."""
        experts, per_token = self.sizes.num_experts, self.sizes.num_experts_per_tok
        pairs = tokens * per_token
        return distinct_experts(experts, per_token, tokens) if gathers_sorted(pairs, experts) else float(pairs)

    def _misses(self, layer: int, tokens: int) -> float:
        assert self.slots is not None
        distinct = distinct_experts(self.sizes.num_experts, self.sizes.num_experts_per_tok, tokens)
        return max(distinct * (1.0 - self.hit_rates[layer]), distinct - self.slots[layer], 0.0)
