"""What an evaluation gives: figures overall, by domain, by file and by length of context, and the worst tokens."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_mixtral.evaluation.statistics import Mean, mean_of

__all__ = ["Comparison", "Evaluation", "LengthBucket", "Score", "Tokens", "WorstToken"]

PERCENTILES = (50, 90, 95, 99, 100)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Per predicted token: its log-probability, its block, how many tokens it was predicted from, and against a reference
    the KL divergence, whether both have the same likeliest token, and the reference's log-probability.
    """

    logprobs: Floats
    blocks: npt.NDArray[np.int64]
    contexts: npt.NDArray[np.int64]
    kl: Floats | None = None
    agrees: npt.NDArray[np.bool_] | None = None
    reference: Floats | None = None

    def __getitem__(self, places: Any) -> Tokens:
        parts = (self.logprobs, self.blocks, self.contexts, self.kl, self.agrees, self.reference)
        return Tokens(*(None if part is None else part[places] for part in parts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Comparison:
    """Distance to a reference, in nats per token. ``kl`` has percentiles by their number ("100" is the largest).

    ``perplexity_ratio`` is the model's over the reference's; its error is that of the paired differences.
    """

    kl_mean: float
    kl_stderr: float
    kl: dict[str, float]
    top1_agreement: float
    top1_stderr: float
    reference_perplexity: float
    perplexity_ratio: float
    perplexity_ratio_stderr: float

    @classmethod
    def of(cls, tokens: Tokens) -> Comparison:
        assert tokens.kl is not None
        assert tokens.agrees is not None
        assert tokens.reference is not None
        kl, agreement = mean_of(tokens.kl, tokens.blocks), mean_of(tokens.agrees.astype(float), tokens.blocks)
        ratio = _exponential(mean_of(tokens.reference - tokens.logprobs, tokens.blocks))
        percentiles = np.percentile(tokens.kl, PERCENTILES)
        return cls(
            *kl,
            {str(number): float(value) for number, value in zip(PERCENTILES, percentiles, strict=True)},
            *agreement,
            math.exp(-float(np.mean(tokens.reference, dtype=np.float64))),
            *ratio,
        )


@dataclass(frozen=True)
class Score:
    """Perplexity over ``tokens`` predicted tokens, and bits for each of their ``bytes`` in UTF-8.

    Standard errors: see ``statistics.mean_of``; a perplexity's is itself times that of the mean negative log-likelihood.
    """

    tokens: int
    bytes: int
    perplexity: float
    perplexity_stderr: float
    bits_per_byte: float
    bits_per_byte_stderr: float
    comparison: Comparison | None = None

    @classmethod
    def of(cls, tokens: Tokens, nbytes: int) -> Score:
        loss = mean_of(-tokens.logprobs, tokens.blocks)
        count = len(tokens.logprobs)
        bits = count / nbytes / math.log(2)
        return cls(
            count,
            nbytes,
            *_exponential(loss),
            loss.value * bits,
            loss.stderr * bits,
            None if tokens.kl is None else Comparison.of(tokens),
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: a comparison's figures stand beside the others."""
        found = asdict(self)
        return found | (found.pop("comparison") or {})


@dataclass(frozen=True)
class LengthBucket:
    """Perplexity of the tokens predicted from ``low`` to ``high`` tokens of context."""

    low: int
    high: int
    tokens: int
    perplexity: float
    perplexity_stderr: float


@dataclass(frozen=True)
class WorstToken:
    """One token where model and reference are farthest apart: the text before it, what came, and each one's likeliest."""

    file: str
    place: int
    kl: float
    before: str
    token: str
    logprob: float
    reference_logprob: float
    best: str
    reference_best: str


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one text. ``tok_s`` counts tokens read in this run, not those a journal had."""

    overall: Score
    domains: dict[str, Score]
    files: dict[str, Score]
    by_length: list[LengthBucket]
    window: int
    stride: int
    seconds: float
    tok_s: float
    top_k: int | None = None
    worst: list[WorstToken] = field(default_factory=list)

    @property
    def rows(self) -> dict[str, Score]:
        """The domains, and where there are several all of them together."""
        if len(self.domains) == 1:
            return self.domains
        return {**self.domains, "all" if "all" not in self.domains else "all texts": self.overall}

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the overall figures on top, others under ``domains``, ``files``, ``by_length`` and ``worst``."""
        found: dict[str, Any] = {
            **self.overall.to_dict(),
            "domains": {name: score.to_dict() for name, score in self.domains.items()},
            "files": {name: score.to_dict() for name, score in self.files.items()},
            "by_length": [asdict(bucket) for bucket in self.by_length],
            "window": self.window,
            "stride": self.stride,
            "seconds": self.seconds,
            "tok_s": self.tok_s,
        }
        if self.top_k is not None:
            found |= {"top_k": self.top_k, "worst": [asdict(token) for token in self.worst]}
        return found


def length_buckets(tokens: Tokens, window: int) -> list[LengthBucket]:
    """Perplexity by length of context, lengths doubling up to the window; those no text reaches are left out."""
    edges, low, found = [], min(32, window), []
    while low < window:
        edges.append(low)
        low *= 2
    before = 0
    for high in (*edges, window):
        part = tokens[(tokens.contexts > before) & (tokens.contexts <= high)]
        if len(part.logprobs):
            found.append(
                LengthBucket(before + 1, high, len(part.logprobs), *_exponential(mean_of(-part.logprobs, part.blocks)))
            )
        before = high
    return found


def _exponential(mean: Mean) -> Mean:
    value = math.exp(mean.value) if mean.value < 700 else math.inf
    return Mean(value, value * mean.stderr)
