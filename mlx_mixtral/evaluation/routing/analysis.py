"""Figures of a recorded routing by domain, as in section 5 of "Mixtral of Experts" (arXiv 2401.04088), with standard errors.

T tokens of a domain, L layers, K experts per token, E experts, G blocks of consecutive tokens.

Neighbouring tokens are routed alike, so standard errors are those of whole blocks (``BLOCK_TOKENS`` tokens of one stretch of
text), as in `mlx_mixtral.evaluation.statistics`: with N values in G blocks and s_g the sum of deviations from the mean in block
g it is ``sqrt(G / (G - 1) * sum(s_g ** 2)) / N``. With fewer than 32 blocks each token is its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.arguments import check_type
from mlx_mixtral.evaluation.routing.record import RoutingRecord
from mlx_mixtral.evaluation.statistics import BLOCK_TOKENS, MIN_BLOCKS
from mlx_mixtral.experts.trace import chance_of_repeat

__all__ = ["ALL", "DomainRouting", "Estimate", "RoutingAnalysis", "analyse", "expected_pairs"]

ALL = "all"
MIN_EXPECTED = 20
FITTING_ROUNDS = 2000

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Estimate:
    """Means and their standard errors, of one shape; NaN where there was nothing, or too little, to average."""

    value: Floats
    stderr: Floats

    def to_dict(self) -> dict[str, Any]:
        return {"value": _rounded(self.value), "stderr": _rounded(self.stderr)}


@dataclass(frozen=True, eq=False)
class DomainRouting:
    """Routing of one domain.

    Args:
        tokens: T.
        transitions: pairs of consecutive tokens, of which repeats are counted.
        shares: ``[L, E]``, the part of all assignments, first or second choice, that went to each expert; sums to 1 in a
            layer, and is 1/E where routing is uniform (figure 7).
        choice_shares: ``[K, L, E]``, the same of first choices alone, of second ones, and so on (figure 9).
        repeats_first: ``[L]``, share of consecutive tokens with the same first choice (table 5 and figure 10, "first
            choice"). Random: 1/E, 12.5% of 8 experts.
        repeats_either: ``[L]``, share of consecutive tokens that have an expert in common among all K choices ("first or
            second choice"). Random: 1 - 6/8 * 5/7, about 46%, for 2 of 8.
        pairs: ``[L, E, E]``, share of tokens that chose both experts, symmetric; the diagonal is 0. Each token has
            K (K - 1) / 2 pairs.
        entropy: ``[L]``, mean entropy in bits of the gate's softmax over all E experts; log2 E where the gate is indifferent.
    """

    tokens: int
    transitions: int
    shares: Estimate
    choice_shares: Estimate
    repeats_first: Estimate
    repeats_either: Estimate
    pairs: Estimate
    entropy: Estimate | None

    @cached_property
    def pair_lift(self) -> Floats:
        """``[L, E, E]``: pairs over ``expected_pairs``, what chance would pair; NaN on the diagonal and of unused experts."""
        expected = self._expected
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(expected > 0, self.pairs.value / expected, np.nan))

    @cached_property
    def _expected(self) -> Floats:
        return np.stack([expected_pairs(layer) for layer in self.pairs.value])

    @cached_property
    def clear_lift(self) -> Floats:
        """``pair_lift``, NaN too for pairs that chance would give fewer than 20 tokens: their lift is mostly noise."""
        return np.where(self._expected * self.tokens >= MIN_EXPECTED, self.pair_lift, np.nan)

    def clear_pairs(self, layer: int) -> list[tuple[int, int]]:
        """Pairs of experts by ``clear_lift``, largest first."""
        lift = self.clear_lift[layer]
        first, second = np.nonzero(np.triu(np.isfinite(lift), 1))
        order = np.argsort(-lift[first, second], kind="stable")
        return list(zip(first[order].tolist(), second[order].tolist(), strict=True))

    @cached_property
    def effective_experts(self) -> Floats:
        """``[L]``: two to the entropy of ``shares``: E where all are used alike, fewer where some are preferred."""
        shares = self.shares.value
        logs = np.log2(np.where(shares > 0, shares, 1.0))
        return np.asarray(np.exp2(-(shares * logs).sum(axis=-1)))

    def to_dict(self, *, with_pairs: bool) -> dict[str, Any]:
        found: dict[str, Any] = {
            "tokens": self.tokens,
            "transitions": self.transitions,
            "shares": self.shares.to_dict(),
            "choice_shares": self.choice_shares.to_dict(),
            "repeats_first": self.repeats_first.to_dict(),
            "repeats_either": self.repeats_either.to_dict(),
            "effective_experts": _rounded(self.effective_experts),
            "entropy_bits": None if self.entropy is None else self.entropy.to_dict(),
        }
        if with_pairs:
            found |= {"pairs": self.pairs.to_dict(), "pair_lift": _rounded(self.pair_lift)}
        return found


@dataclass(frozen=True, eq=False)
class RoutingAnalysis:
    """Routing of a model on texts: ``domains`` by name, and ``overall``, in which every token counts once."""

    name: str
    layers: int
    num_experts: int
    per_token: int
    domains: dict[str, DomainRouting]
    overall: DomainRouting

    @property
    def chance_first(self) -> float:
        """Of a repeated first choice, where routing is random."""
        return 1.0 / self.num_experts

    @property
    def chance_either(self) -> float:
        """Of an expert in common, where routing is random."""
        return chance_of_repeat(self.num_experts, self.per_token)

    @property
    def shown_layers(self) -> tuple[int, ...]:
        """First, middle and last, as the paper shows them: 0, 15 and 31 of 32."""
        return tuple(sorted({0, (self.layers - 1) // 2, self.layers - 1}))

    @property
    def rows(self) -> dict[str, DomainRouting]:
        """The domains, and all of them where there are several."""
        return self.domains if len(self.domains) == 1 else {**self.domains, ALL: self.overall}

    @property
    def repeats_first(self) -> dict[str, Estimate]:
        """By domain."""
        return {name: domain.repeats_first for name, domain in self.domains.items()}

    @property
    def repeats_either(self) -> dict[str, Estimate]:
        """By domain."""
        return {name: domain.repeats_either for name, domain in self.domains.items()}

    @property
    def entropies(self) -> dict[str, Estimate]:
        """By domain; none where they were not recorded, or there is no choice."""
        if self.num_experts == 1:
            return {}
        return {name: domain.entropy for name, domain in self.domains.items() if domain.entropy is not None}

    def to_dict(self) -> dict[str, Any]:
        """For JSON: arrays are nested lists with the layer first, but for ``choice_shares``: choice, layer, expert."""
        return {
            "model": self.name,
            "layers": self.layers,
            "experts": self.num_experts,
            "experts_per_token": self.per_token,
            "random": {
                "share": self.chance_first,
                "repeats_first": self.chance_first,
                "repeats_either": self.chance_either,
            },
            "overall": self.overall.to_dict(with_pairs=True),
            "domains": {name: domain.to_dict(with_pairs=False) for name, domain in self.domains.items()},
        }


def analyse(record: RoutingRecord) -> RoutingAnalysis:
    """All figures of a record."""
    check_type("record", record, RoutingRecord, "a RoutingRecord")
    everything = np.arange(len(record.segments))
    domains = {
        name: _domain(record, np.flatnonzero(record.segments == number)) for number, name in enumerate(record.domains)
    }
    _, layers, per_token = record.trace.experts.shape
    overall = next(iter(domains.values())) if len(domains) == 1 else _domain(record, everything)
    return RoutingAnalysis(record.name, layers, record.trace.num_experts, per_token, domains, overall)


def _domain(record: RoutingRecord, stretches: Ints) -> DomainRouting:
    starts, lengths = np.asarray(record.starts, np.int64)[stretches], record.lengths[stretches]
    places = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
    within = np.concatenate([np.arange(n) for n in lengths])  # position in the stretch
    stretch = np.repeat(np.arange(len(lengths)), lengths)
    is_last = within == lengths[stretch] - 1
    tokens, follows = _Blocks(stretch, within), _Blocks(stretch[~is_last], within[~is_last])
    before, after = places[~is_last], places[~is_last] + 1
    _, layers, per_token = record.trace.experts.shape
    size = record.trace.num_experts
    shares, pairs, first, either, entropy = [], [], [], [], []
    choices: list[list[Estimate]] = [[] for _ in range(per_token)]
    for layer in range(layers):
        experts = record.trace.experts[:, layer].astype(np.int64)  # [all T, K]
        own = experts[places]
        by_choice = [tokens.count(own[:, choice], size) for choice in range(per_token)]  # [G, E] each
        shares.append(tokens.mean(sum(by_choice[1:], by_choice[0]) / per_token))
        for found, counts in zip(choices, by_choice, strict=True):
            found.append(tokens.mean(counts))
        together = np.zeros((tokens.blocks, size * size))
        for a in range(per_token):
            for b in range(a + 1, per_token):
                together += tokens.count(own[:, a] * size + own[:, b], size * size)
        square = together.reshape(-1, size, size)
        pairs.append(tokens.mean(square + square.transpose(0, 2, 1)))
        first.append(follows.mean(follows.add(experts[before, 0] == experts[after, 0])))
        shared = (experts[before][:, :, None] == experts[after][:, None, :]).any(axis=(1, 2))
        either.append(follows.mean(follows.add(shared)))
        if record.entropy is not None:
            entropy.append(tokens.mean(tokens.add(record.entropy[places, layer].astype(np.float64))))
    return DomainRouting(
        len(places),
        len(before),
        _stacked(shares),
        _stacked([_stacked(choice) for choice in choices]),
        _stacked(first),
        _stacked(either),
        _stacked(pairs),
        _stacked(entropy) if entropy else None,
    )


class _Blocks:
    """Sums over blocks of consecutive values of one stretch, and means with standard errors from them.

    Args:
        stretch, within: ``[N]``, of each value its stretch, ascending, and its position there.
    """

    def __init__(self, stretch: Ints, within: Ints) -> None:
        keys = np.stack([stretch, within // BLOCK_TOKENS])
        is_new = np.ones(len(stretch), bool)
        is_new[1:] = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
        if is_new.sum() < MIN_BLOCKS:
            is_new[:] = True
        self._block = np.cumsum(is_new) - 1
        self.blocks = int(is_new.sum())
        self._sizes = np.bincount(self._block, minlength=self.blocks).astype(np.float64)

    def count(self, values: Ints, size: int) -> Floats:
        """``[G, size]``: how often each of ``size`` values is among those of a block."""
        counted = np.bincount(self._block * size + values, minlength=self.blocks * size)
        return counted.reshape(self.blocks, size).astype(np.float64)

    def add(self, values: npt.NDArray[Any]) -> Floats:
        """``[G]``: sums of one number a value."""
        return np.bincount(self._block, weights=values, minlength=self.blocks).astype(np.float64)

    def mean(self, sums: Floats) -> Estimate:
        """Of ``[G, ...]`` sums over blocks."""
        total = self._sizes.sum()
        shape = sums.shape[1:]
        if not total:
            return Estimate(np.full(shape, np.nan), np.full(shape, np.nan))
        mean = sums.sum(axis=0) / total
        if self.blocks < 2:
            return Estimate(np.asarray(mean), np.full(shape, np.nan))
        deviations = sums - mean * self._sizes.reshape(-1, *[1] * len(shape))
        spread = self.blocks / (self.blocks - 1) * np.square(deviations).sum(axis=0)
        return Estimate(np.asarray(mean), np.asarray(np.sqrt(spread) / total))


def expected_pairs(pairs: Floats) -> Floats:
    """``[E, E]``: how often experts would meet by chance, each being used as often as it is.

    An expert cannot be paired with itself, so this is not a product of shares but quasi-independence (L. A. Goodman, 1968):
    ``q_i q_j`` off the diagonal and 0 on it, with q such that the rows sum to what those of ``pairs`` sum to.
    """
    rows = pairs.sum(axis=1)
    used = rows > 0
    if used.sum() < 2:
        return np.zeros_like(pairs)
    q = np.sqrt(rows / rows.sum()) * math.sqrt(rows.sum())
    for _ in range(FITTING_ROUNDS):
        others = np.where(used, q.sum() - q, 1.0)
        wanted = np.where(used & (others > 0), rows / np.where(others > 0, others, 1.0), 0.0)
        following = np.sqrt(q * wanted)  # the geometric mean: alternating steps would swing
        if np.abs(following - q).max() <= 1e-12 * q.max():
            break
        q = following
    expected = np.outer(q, q)
    np.fill_diagonal(expected, 0.0)
    return np.asarray(expected)


def _stacked(layers: list[Estimate]) -> Estimate:
    return Estimate(np.stack([layer.value for layer in layers]), np.stack([layer.stderr for layer in layers]))


def _rounded(values: Floats) -> Any:
    return np.round(values, 6).tolist()
