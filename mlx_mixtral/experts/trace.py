"""Routing traces: which experts each token chose in each layer, and how often they would be found in a bank of slots.

T tokens, L layers, K experts per token, E experts, S slots. All K experts of a token are needed at once: none of them makes
room for another. A bank is touched in the order of the token's choice.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mlx_mixtral.arguments import as_path, is_integer
from mlx_mixtral.errors import CheckpointError, DestinationError, DiskSpaceError, InvalidRequestError
from mlx_mixtral.experts.policy import Optimal, make_policy
from mlx_mixtral.files import check_kind, replace_file
from mlx_mixtral.reading import check_size, parse_json

__all__ = [
    "PUBLISHED_REPEATS",
    "Counts",
    "RoutingTrace",
    "chance_of_repeat",
    "hit_rates",
    "is_trace",
    "published_trace",
    "simulate",
]

FORMAT = "mlx-mixtral-routing-trace-1"
# Arrays that an analysis keeps in the same file for itself: `mlx_mixtral.evaluation.routing.record`.
ANNOTATIONS = frozenset({"segments", "entropy", "text", "text_ends"})
# A trace may come with a stranger's checkpoint. 32 MB are 130,000 tokens of 8x7B.
MAX_FILE_BYTES = 2**25
MAX_EXPERTS = 256
BLOCK_TOKENS = 4096

# arXiv 2401.04088, Table 5, "first or second choice", mean over the eight domains: share of consecutive tokens that have an
# expert in common, by depth of the layer (layers 0, 15 and 31 of 32).
PUBLISHED_REPEATS = {0.0: 0.4804, 15 / 31: 0.6369, 1.0: 0.5091}

Experts = npt.NDArray[np.uint16]


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The router's choices of a text, or of several one after another.

    Args:
        experts: uint16 ``[T, L, K]``, different ones in each row, below ``num_experts``; the router's first choice first.
        starts: tokens at which a new text starts, ascending; the first token need not be named.

    Raises:
        InvalidRequestError: they are not that.
    """

    experts: Experts
    num_experts: int
    starts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        shape, dtype = self.experts.shape, self.experts.dtype
        if dtype != np.uint16 or len(shape) != 3 or 0 in shape:
            raise InvalidRequestError(
                f"a routing trace is uint16 [tokens, layers, experts per token], not {dtype} {shape}"
            )
        if not shape[2] <= self.num_experts <= MAX_EXPERTS:
            raise InvalidRequestError(
                f"a routing trace of {shape[2]} experts per token cannot have {self.num_experts} experts in all; at "
                f"most {MAX_EXPERTS}"
            )
        if int(self.experts.max()) >= self.num_experts:
            raise InvalidRequestError(
                f"a routing trace of {self.num_experts} experts names expert {self.experts.max()}"
            )
        ordered = np.sort(self.experts, axis=2)
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise InvalidRequestError("a routing trace has a token that chose one expert twice")
        if any(not a < b for a, b in zip((-1, *self.starts), (*self.starts, shape[0]), strict=True)):
            raise InvalidRequestError(f"starts of texts must ascend within the {shape[0]} tokens of a routing trace")

    @property
    def repeat_rates(self) -> npt.NDArray[np.float64]:
        """``[L]``: share of consecutive tokens of one text that have an expert in common."""
        before, after = self.experts[:-1], self.experts[1:]
        shared = (before[..., :, None] == after[..., None, :]).any(axis=(2, 3))  # [T - 1, L]
        within = np.ones(len(shared), bool)
        within[[start - 1 for start in self.starts if start]] = False
        return np.asarray(shared[within].mean(axis=0)) if within.any() else np.zeros(shared.shape[1])

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """``[L, E]``: how many tokens chose each expert."""
        _, layers, _ = self.experts.shape
        found = [np.bincount(self.experts[:, layer].reshape(-1), minlength=self.num_experts) for layer in range(layers)]
        return np.stack(found).astype(np.int64)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; the same trace gives the same bytes.

        Raises:
            InvalidRequestError: it cannot be written, or something that is no trace lies there.
        """
        arrays: dict[str, npt.NDArray[Any]] = {
            "experts": np.ascontiguousarray(self.experts),
            "starts": np.array(self.starts, np.int64),
        }
        try:
            place = as_path("path", path)
            check_kind(place, "a routing trace", is_trace)
            # One key: safetensors writes several in an order of its own, another one each time.
            replace_file(place, save(arrays, {FORMAT: json.dumps({"num_experts": self.num_experts})}))
        except (DestinationError, DiskSpaceError) as error:
            raise InvalidRequestError(f"routing trace {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Read what ``save`` wrote, or an analysis of routing, whose annotations are left aside.

        Raises:
            CheckpointError: it cannot be read, or is something else.
        """
        path = as_path("path", path)
        check_size(path, MAX_FILE_BYTES)
        try:
            with safe_open(str(path), "numpy") as file:
                header = (file.metadata() or {}).get(FORMAT)
                if header is None or set(file.keys()) - ANNOTATIONS != {"experts", "starts"}:
                    raise CheckpointError(f"{path} is not a routing trace")
                experts, starts = file.get_tensor("experts"), file.get_tensor("starts")
            num_experts = parse_json(f"the header of {path}", header)["num_experts"]
            if not is_integer(num_experts) or starts.dtype != np.int64 or starts.ndim != 1:
                raise CheckpointError(f"{path} is not a routing trace")
            return cls(experts, num_experts, tuple(starts.tolist()))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"routing trace {path} cannot be read: {reason}") from error


def is_trace(place: Path) -> bool:
    """Whether a file is a routing trace, annotated or not."""
    try:
        RoutingTrace.load(place)
    except (CheckpointError, InvalidRequestError):
        return False
    return True


class Counts(NamedTuple):
    """Experts that were in a slot when they were needed, and those that were not."""

    hits: int
    misses: int


def simulate(choices: Experts, num_experts: int, slots: int, policy_name: str = "lru") -> Counts:
    """What a bank of ``slots``, empty at first, would do on one layer's choices ``[T, K]``.

    Args:
        policy_name: one of ``POLICIES``, or ``optimal``.

    Raises:
        InvalidRequestError: an unknown policy, or slots that cannot hold the experts of one token.
    """
    if not choices.shape[1] <= slots <= num_experts:
        raise InvalidRequestError(
            f"{slots} slots: {choices.shape[1]} experts per token and {num_experts} in all need that many"
        )
    policy = Optimal(choices.reshape(-1).tolist()) if policy_name == "optimal" else make_policy(policy_name)
    held: set[int] = set()
    hits = 0
    for needed in choices.tolist():
        for expert in needed:
            if expert in held:
                hits += 1
                continue
            if len(held) == slots:
                held.remove(given_up := policy.victim(sorted(held.difference(needed))))
                policy.forget(given_up)
            held.add(expert)
        for expert in needed:
            policy.touch(expert)
    return Counts(hits, choices.size - hits)


def hit_rates(trace: RoutingTrace, policy: str = "lru") -> npt.NDArray[np.float64]:
    """``[L, E + 1]``: share of experts found in a bank of S slots, for S from 0 to E.

    0 below K slots, where a layer only has its turn in a bank shared with others (an overflow bank); 1 with E slots, where
    all experts are resident from the beginning.

    Raises:
        InvalidRequestError: an unknown policy.
    """
    _, layers, per_token = trace.experts.shape
    rates = np.zeros((layers, trace.num_experts + 1))
    between = range(per_token, trace.num_experts)
    for layer in range(layers):
        choices = trace.experts[:, layer]
        if policy == "lru":
            rates[layer] = np.cumsum(_stack_distances(choices, trace.num_experts)) / choices.size
        else:
            rates[layer, between] = [
                simulate(choices, trace.num_experts, slots, policy).hits / choices.size for slots in between
            ]
    rates[:, :per_token] = 0.0
    rates[:, -1] = 1.0
    return rates


def _stack_distances(choices: Experts, num_experts: int) -> npt.NDArray[np.int64]:
    """How many uses in ``[T, K]`` an LRU bank of d slots serves and one of d - 1 does not, at index d.

    With S slots LRU holds the S experts used last, whatever S: one pass serves all sizes (R. L. Mattson et al.,
    "Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970). That stays true when a token needs K
    experts at once, as long as S is at least K: what it leaves behind are its K experts and the S - K used last before.
    """
    per_token = choices.shape[1]
    counts = np.zeros(num_experts + 2, np.int64)
    last = np.full(num_experts, -1)  # when each was used last
    for start in range(0, len(choices), BLOCK_TOKENS):
        block = choices[start : start + BLOCK_TOKENS].astype(np.int64)
        rows = np.arange(len(block))[:, None]
        used = np.full((len(block) + 1, num_experts), -1)
        used[0] = last
        used[rows + 1, block] = (start + rows) * per_token + np.arange(per_token)
        used = np.maximum.accumulate(used, axis=0)
        before = used[:-1]
        own = before[rows, block]  # [T, K]
        depth = (before[:, None, :] > own[..., None]).sum(axis=2) + 1  # [T, K]
        depth[own < 0] = num_experts + 1  # never used before
        counts += np.bincount(depth.reshape(-1), minlength=num_experts + 2)
        last = used[-1]
    return counts[:-1]


def chance_of_repeat(num_experts: int, per_token: int) -> float:
    """Probability that two random choices have an expert in common: 46.4% for 2 of 8."""
    return 1.0 - comb(num_experts - per_token, per_token) / comb(num_experts, per_token)


@functools.lru_cache(maxsize=4)
def published_trace(
    num_layers: int, num_experts: int, per_token: int, tokens: int = 4096, seed: int = 0
) -> RoutingTrace:
    """A made-up trace that repeats experts as often from token to token as Mixtral 8x7B was published to.

    Each layer is a Markov chain. With probability q a token keeps one expert of the token before, any of them, and takes the
    others at random; else it takes all at random. Consecutive tokens then share an expert with probability
    ``q + (1 - q) * chance_of_repeat``, which gives q for the rates of ``PUBLISHED_REPEATS``, linear between them over depth.
    By symmetry all experts get equal shares, as Mixtral's nearly do. Models with other numbers of experts get the same q.
    What a real text has and this does not: favourites that last longer than a token.
    """
    chance = chance_of_repeat(8, 2)
    depth = np.arange(num_layers) / max(num_layers - 1, 1)
    repeats = np.interp(depth, list(PUBLISHED_REPEATS), list(PUBLISHED_REPEATS.values()))
    keeping = np.clip((repeats - chance) / (1.0 - chance), 0.0, 1.0)
    random = np.random.default_rng(seed)
    experts = np.empty((tokens, num_layers, per_token), np.uint16)
    before = np.zeros((num_layers, per_token), np.int64)
    for token in range(tokens):
        order = random.random((num_layers, num_experts))
        if token:
            kept = np.flatnonzero(random.random(num_layers) < keeping)
            order[kept, before[kept, random.integers(per_token, size=len(kept))]] = -1.0
        before = random.permuted(order.argsort(axis=1)[:, :per_token], axis=1)
        experts[token] = before
    experts.flags.writeable = False  # shared by all who ask
    return RoutingTrace(experts, num_experts)
