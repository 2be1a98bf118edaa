"""A model of a few tokens whose every sequence has a probability one can write down, and proposers that are right as told."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mixtral import GenerationStats, SamplingParams
from mlx_mixtral.constraints.base import Constraint
from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.loop import decode
from mlx_mixtral.generation.request import Request
from mlx_mixtral.generation.sampling import Sampler
from mlx_mixtral.generation.speculation.economics import Economics
from mlx_mixtral.generation.speculation.loop import speculate
from mlx_mixtral.generation.speculation.proposal import Guess, Proposal, Proposer
from mlx_mixtral.generation.stats import Token
from tests.generation.dry_by_hand import dry_penalties

Floats = np.ndarray[Any, np.dtype[np.float64]]


class ChainCache:
    """Of a model that looks at the last token only: all there is to hold is how many there were."""

    arrays: tuple[mx.array, ...] = ()

    window = adapter = None

    def __init__(self) -> None:
        self.length = 0
        self.longest = 0

    def advance(self, tokens: int) -> None:
        self.length += tokens
        self.longest = max(self.longest, self.length)

    def trim(self, tokens: int) -> None:
        assert 0 <= tokens <= self.length
        self.length -= tokens


class Chain:
    """A Markov chain with a model's interface: row t of ``table [V, V]`` are the logits after token t.

    Attributes:
        forwards: tokens of every forward so far.
    """

    is_streamed, counters, min_chunk_tokens = False, None, 1

    def __init__(self, table: Floats) -> None:
        self.table = table
        self._table = mx.array(table.astype(np.float32))
        self.forwards: list[int] = []

    def make_cache(self, max_tokens: int | None = None) -> ChainCache:
        return ChainCache()

    def hidden(
        self, tokens: mx.array, cache: ChainCache, *, last_only: bool = False, total: int = 0, ends: None = None
    ) -> mx.array:
        self.forwards.append(tokens.shape[1])
        cache.advance(tokens.shape[1])
        return tokens[:, -1:, None] if last_only else tokens[..., None]

    def remember(self, tokens: mx.array, cache: ChainCache, *, total: int = 0) -> None:
        self.hidden(tokens, cache)

    def head(self, hidden: mx.array, choice: object = None) -> mx.array:
        return self._table[hidden[..., 0]]

    def __call__(self, tokens: mx.array, cache: ChainCache, **_: Any) -> mx.array:
        """As the model itself and as its decode step."""
        return self.head(self.hidden(tokens, cache))


def chain(vocab: int, seed: int, scale: float = 1.5) -> Chain:
    return Chain(np.random.default_rng(seed).standard_normal((vocab, vocab)) * scale)


class Told:
    """Proposes the true continuation, each token right with probability ``right``; after the first wrong one at random."""

    def __init__(self, truth: Sequence[int], right: float, vocab: int, seed: int = 0) -> None:
        self._truth, self._right, self._vocab = list(truth), right, vocab
        self._done = 0
        self._random = np.random.default_rng(seed)
        self.proposed: list[int] = []

    def guess(self) -> Guess | None:
        return Guess(0)

    def propose(self, count: int, sampler: Sampler, constraint: Constraint | None = None) -> Proposal:
        tokens = []
        for at in range(self._done, self._done + count):
            right = at < len(self._truth) and self._random.random() < self._right
            wrong = (self._truth[at] + 1) % self._vocab if at < len(self._truth) else 0
            tokens.append(self._truth[at] if right else wrong)
        self.proposed.append(count)
        return Proposal(mx.array(tokens, mx.int32))

    def take(self, tokens: Sequence[int], accepted: int = 0) -> None:
        self._done += len(tokens)


def always(most: int) -> Economics:
    """Proposes as much as it may."""
    return Economics(most, lambda k: 1.0, expected_acceptance=1.0, is_adaptive=False)


def speculated(
    model: Any,
    prompt: Sequence[int],
    proposer: Proposer,
    max_tokens: int,
    params: SamplingParams | None = None,
    *,
    economics: Economics | None = None,
    most: int = 4,
    cache: Any = None,
    step: Any = None,
    take: int | None = None,
) -> tuple[list[Token], GenerationStats]:
    """Tokens with speculation, closed after ``take`` of them."""
    request = Request(prompt, max_tokens, Sampler(params or SamplingParams(), prompt, vocab_of(model)))
    steps = speculate(
        context_of(model, step),
        request,
        model.make_cache() if cache is None else cache,
        proposer=proposer,
        economics=economics or always(most),
    )
    tokens = list(itertools.islice(steps, take))
    steps.close()
    return tokens, request.stats


def context_of(model: Any, step: Any = None, chunk_tokens: int = 1024) -> DecodeContext:
    """What loops work with; a model of tests is its own step."""
    return DecodeContext(model, step or model, mx.default_stream(mx.default_device()), chunk_tokens)


def plain(
    model: Any,
    prompt: Sequence[int],
    max_tokens: int,
    params: SamplingParams | None = None,
    *,
    step: Any = None,
    cache: Any = None,
) -> list[Token]:
    """Tokens of the plain loop; ``cache`` holds a beginning of the prompt."""
    cache = model.make_cache() if cache is None else cache
    sampler = Sampler(params or SamplingParams(), prompt, vocab_of(model))
    return list(decode(context_of(model, step), Request(prompt, max_tokens, sampler), cache))


def vocab_of(model: Any) -> int:
    return len(model.table) if isinstance(model, Chain) else int(model.config.vocab_size)


def ids_of(tokens: Sequence[Token]) -> list[int]:
    return [token.token_id for token in tokens]


def truncated(logits: Floats, params: SamplingParams) -> Floats:
    """The distribution sampling is to follow, in float64 and loops."""
    shifted = logits / params.temperature
    p: Floats = np.exp(shifted - shifted.max())
    p /= p.sum()
    if params.top_k:
        p[np.argsort(-p)[params.top_k :]] = 0
        p /= p.sum()
    kept, reached = np.zeros_like(p), 0.0
    for token in np.argsort(-p):
        if reached >= params.top_p:
            break
        kept[token] = p[token]
        reached += p[token]
    kept[kept < params.min_p * kept.max()] = 0
    kept /= kept.sum()
    if not params.xtc_probability:
        return kept
    # XTC: with its probability all tokens above the threshold go but the least likely of them, temperature left aside.
    plain = np.where(kept > 0, np.exp(logits - logits.max()), 0)
    plain /= plain.sum()
    likely = [token for token in np.argsort(-plain) if plain[token] > params.xtc_threshold]
    others = kept.copy()
    others[likely[:-1]] = 0
    return np.asarray((1 - params.xtc_probability) * kept + params.xtc_probability * others / others.sum())


def penalised(logits: Floats, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> Floats:
    """Logits after penalties, bias and DRY, one token at a time."""
    changed = logits.copy()
    for token in range(len(logits)):
        if token in prompt or token in output:
            factor = params.repetition_penalty
            changed[token] = changed[token] / factor if changed[token] > 0 else changed[token] * factor
        if token in output:
            changed[token] -= params.presence_penalty + params.frequency_penalty * list(output).count(token)
        changed[token] += (params.logit_bias or {}).get(token, 0.0)
    numbers = (params.dry_multiplier, params.dry_base, params.dry_allowed_length, params.dry_penalty_last_n)
    for token, penalty in dry_penalties([*prompt, *output], *numbers).items():
        changed[token] -= penalty
    return changed


def sequence_probabilities(
    model: Chain, prompt: Sequence[int], length: int, params: SamplingParams
) -> dict[tuple[int, ...], float]:
    """Of every sequence of ``length`` tokens that can follow ``prompt``."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer = {}
        for output, probability in found.items():
            last = [*prompt, *output][-1]
            p = truncated(penalised(model.table[last], params, prompt, output), params)
            longer |= {(*output, token): probability * float(p[token]) for token in np.flatnonzero(p)}
        found = longer
    return {tuple(int(token) for token in output): probability for output, probability in found.items()}


def assert_follows(seen: dict[tuple[int, ...], int], wanted: dict[tuple[int, ...], float]) -> None:
    """Chi-square test of counts; outcomes expected less than five times are taken together."""
    count = sum(seen.values())
    impossible = {outcome for outcome in seen if wanted.get(outcome, 0.0) == 0.0}
    assert not impossible, f"outcomes that cannot be: {impossible}"
    cells, rest_seen, rest_expected = [], 0, 0.0
    for outcome, probability in wanted.items():
        if probability * count >= 5:
            cells.append((seen.get(outcome, 0), probability * count))
        else:
            rest_seen, rest_expected = rest_seen + seen.get(outcome, 0), rest_expected + probability * count
    if rest_expected >= 5:
        cells.append((rest_seen, rest_expected))
    chi2 = sum((had - expected) ** 2 / expected for had, expected in cells)
    freedom = len(cells) - 1
    assert freedom >= 1, "nothing is tested"
    # 99.99% of a chi-square with f degrees of freedom lies below f + 3.9 sqrt(2 f) + 12; seeds are fixed.
    assert chi2 < freedom + 3.9 * math.sqrt(2 * freedom) + 12, f"chi-square {chi2:.1f} at {freedom} degrees of freedom"


def dense_of(folder: Path, into: Path) -> Path:
    """A dense model of the bundled checkpoint: the experts of a layer side by side in one, each with the same share."""
    config = json.loads((folder / "config.json").read_text())
    experts = config.pop("num_local_experts")
    del config["num_experts_per_tok"]
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    config["intermediate_size"] *= experts
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    dense = {name: tensor for name, tensor in tensors.items() if "block_sparse_moe" not in name}
    for layer in range(config["num_hidden_layers"]):
        moe = f"model.layers.{layer}.block_sparse_moe.experts"
        for name, weight, axis in (("gate_proj", "w1", 0), ("up_proj", "w3", 0), ("down_proj", "w2", 1)):
            parts = [tensors[f"{moe}.{expert}.{weight}.weight"] for expert in range(experts)]
            share = 2.0 / experts if weight == "w2" else 1.0
            joined = mx.concatenate(parts, axis=axis) * share
            dense[f"model.layers.{layer}.mlp.{name}.weight"] = joined.astype(mx.bfloat16)
    into.mkdir()
    mx.save_safetensors(str(into / "model.safetensors"), dense, {"format": "pt"})
    (into / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(folder / name, into / name)
    return into
