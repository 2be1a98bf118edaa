"""The decode loop: what it computes, in which order, and what it never computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import GenerationStats, Mixtral, SamplingParams
from mlx_mixtral.generation.context import DecodeContext
from mlx_mixtral.generation.loop import decode
from mlx_mixtral.generation.request import Request
from mlx_mixtral.generation.sampling import Sampler
from mlx_mixtral.generation.stats import MIN_RATED_TOKENS, Token
from mlx_mixtral.model.step import DecodeStep
from mlx_mixtral.model.transformer import MixtralModel


class Watched:
    """A model's forwards and head calls, and the reads of tokens, in the order they happen."""

    def __init__(self, model: MixtralModel) -> None:
        self.model, self.compute = model, DecodeStep(model, compiled=False)
        self.events: list[tuple[str, int]] = []
        self.is_streamed, self.counters = model.is_streamed, model.counters
        self.min_chunk_tokens = model.min_chunk_tokens

    def hidden(
        self, tokens: mx.array, cache: Any, *, last_only: bool = False, total: int = 0, ends: Any = None
    ) -> mx.array:
        self.events.append(("forward", tokens.shape[1]))
        return self.model.hidden(tokens, cache, last_only=last_only, total=total, ends=ends)

    def remember(self, tokens: mx.array, cache: Any, *, total: int = 0) -> None:
        self.events.append(("forward", tokens.shape[1]))
        self.model.remember(tokens, cache, total=total)

    def step(self, tokens: mx.array, cache: Any) -> mx.array:
        self.events += [("forward", tokens.shape[1]), ("head", 1)]
        return self.compute(tokens, cache)

    def head(self, hidden: mx.array, choice: Any = None) -> mx.array:
        self.events.append(("head", hidden.size // hidden.shape[-1]))
        return self.model.head(hidden, choice)


def _run(
    model: Mixtral,
    prompt: Sequence[int],
    max_tokens: int,
    take: int | None = None,
    prefill_chunk: int = 1024,
    **options: Any,
) -> tuple[list[Token], Watched, GenerationStats]:
    watched = Watched(model.module)
    context = DecodeContext(watched, watched.step, model.engine.stream, prefill_chunk)  # type: ignore[arg-type]
    request = Request(prompt, max_tokens, Sampler(SamplingParams(), prompt, model.config.vocab_size), **options)
    steps = decode(context, request, model.make_cache())
    tokens = []
    for token in steps:
        tokens.append(token)
        watched.events.append(("read", token.token_id))
        if take is not None and len(tokens) == take:
            steps.close()
            break
    return tokens, watched, request.stats


@pytest.fixture
def prompt() -> list[int]:
    return [1, *(int(i) for i in np.random.default_rng(0).integers(3, 4096, 20))]


def test_greedy_decoding_is_the_argmax_of_one_forward_over_everything(model: Mixtral, prompt: list[int]) -> None:
    tokens, _, _ = _run(model, prompt, 12)
    ids = [token.token_id for token in tokens]
    logits = np.asarray(model.module(mx.array([prompt + ids])))[0]
    assert ids == [int(i) for i in logits[len(prompt) - 1 : -1].argmax(axis=-1)]


def test_every_forward_is_used_when_the_length_ends_it(model: Mixtral, prompt: list[int]) -> None:
    _, watched, _ = _run(model, prompt, 6)
    assert [n for kind, n in watched.events if kind == "forward"] == [len(prompt)] + [1] * 5
    assert sum(kind == "head" for kind, _ in watched.events) == 6


def test_one_token_costs_one_forward(model: Mixtral, prompt: list[int]) -> None:
    _, watched, _ = _run(model, prompt, 1)
    assert [kind for kind, _ in watched.events] == ["forward", "head", "read"]


def test_the_next_step_is_scheduled_before_the_last_is_read(model: Mixtral, prompt: list[int]) -> None:
    _, watched, _ = _run(model, prompt, 4)
    kinds = [kind for kind, _ in watched.events if kind != "head"]
    assert kinds == ["forward", "forward", "read", "forward", "read", "forward", "read", "read"]


def test_the_head_sees_the_last_position_only(model: Mixtral, prompt: list[int]) -> None:
    _, watched, _ = _run(model, prompt, 2, prefill_chunk=8)
    assert [n for kind, n in watched.events if kind == "head"] == [1, 1]


@pytest.mark.parametrize("chunk", [1, 7, 8, 20, 21, 22])
def test_chunked_prefill_gives_the_same_tokens(model: Mixtral, prompt: list[int], chunk: int) -> None:
    done: list[tuple[int, int]] = []
    tokens, watched, _ = _run(model, prompt, 5, prefill_chunk=chunk, on_prefill=lambda *at: done.append(at))
    assert tokens == _run(model, prompt, 5)[0]
    sizes = [n for kind, n in watched.events if kind == "forward"][:-4]
    assert sum(sizes) == len(prompt)
    # A chunk of one token would be rounded as a decode step is.
    assert max(sizes) <= max(chunk, 3)
    assert min(sizes) >= 2
    assert done[-1] == (len(prompt), len(prompt))
    assert [at for at, _ in done] == sorted({at for at, _ in done})


def test_raising_from_the_prefill_callback_cancels(model: Mixtral, prompt: list[int]) -> None:
    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(model, prompt, 5, prefill_chunk=4, on_prefill=cancel)
    assert len(_run(model, prompt, 3)[0]) == 3


def test_stats_count_what_happened(model: Mixtral, prompt: list[int]) -> None:
    _, _, stats = _run(model, prompt, 9, take=4)
    assert (stats.prompt_tokens, stats.tokens) == (len(prompt), 4)
    assert stats.time_to_first_token_s > 0
    assert stats.decode_s > 0
    assert GenerationStats().decode_tok_s == 0
    assert set(stats.to_dict()) >= {"prompt_tokens", "tokens", "time_to_first_token_s", "prompt_tok_s", "decode_tok_s"}


def test_rates_are_of_sixteen_tokens_at_least() -> None:
    few = GenerationStats(prompt_tokens=40, reused_tokens=25, tokens=16, time_to_first_token_s=0.5, decode_s=0.25)
    assert (few.prompt_tok_s, few.decode_tok_s) == (0, 0)
    assert (few.to_dict()["prompt_tok_s"], few.to_dict()["decode_tok_s"]) == (None, None)
    enough = GenerationStats(prompt_tokens=40, reused_tokens=24, tokens=17, time_to_first_token_s=0.5, decode_s=0.25)
    assert (enough.prompt_tok_s, enough.decode_tok_s) == (32, 64)
    assert MIN_RATED_TOKENS == 16
