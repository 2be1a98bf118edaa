"""Prefixes in a batch: a row goes on from what an earlier one left, and never from what another conversation left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import Mixtral, load
from mlx_mixtral.cache.kv import KVCache
from tests.generation.support import StorePrefixes, WatchedScheduler, prompt_of


@pytest.fixture(scope="module")
def forgetful(small: Path) -> Iterator[Mixtral]:
    with load(small, prefix_cache=0) as loaded:
        yield loaded


def _alone(model: Mixtral, prompt: Sequence[int], max_tokens: int) -> list[int]:
    return list(model.generate(prompt, max_tokens=max_tokens, stop_token_ids=[]).token_ids)


def test_interleaved_conversations_go_on_from_their_own_turns(forgetful: Mixtral) -> None:
    """Four clients in turn, each by its own conversation: all of it but its newest message is there from turn 2 on."""
    watched = WatchedScheduler(forgetful, prefixes=StorePrefixes(10**8), max_rows=2)
    conversations = [prompt_of(forgetful, 100, seed=client) for client in range(4)]
    for turn in range(4):
        requests = [watched.request(tokens, 12) for tokens in conversations]
        tickets = [watched.scheduler.submit(request) for request in requests]
        watched.run()
        for client, (request, ticket) in enumerate(zip(requests, tickets, strict=True)):
            answer = watched.tokens[ticket]
            assert answer == _alone(forgetful, conversations[client], 12)
            if turn:
                assert request.stats.reused_tokens >= 0.95 * (len(conversations[client]) - 4)
            conversations[client] = [*conversations[client], *answer, *prompt_of(forgetful, 4, seed=client + 10 * turn)]


class _Checked(StorePrefixes):
    """A store that is looked at whenever it gives something."""

    def __init__(self, model: Mixtral, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self.model, self.given = model, 0

    def take(self, tokens: Sequence[int], left: int = 1, adapter: int | None = None) -> KVCache | None:
        cache = super().take(tokens, left, adapter)
        assert self.nbytes <= self.limit_bytes
        if cache is not None:
            self.given += 1
            fresh = self.model.make_cache()
            self.model.module.remember(mx.array([list(tokens[: cache.length])], mx.int32), fresh)
            for held, wanted in zip(cache.layers, fresh.layers, strict=True):
                for one, other in zip(held, wanted, strict=True):
                    length = cache.length
                    np.testing.assert_allclose(one[:, :, :length], other[:, :, :length], atol=1e-4)
        return cache


def test_no_conversation_is_given_what_another_left(forgetful: Mixtral) -> None:
    """Eight clients whose texts differ by a marker near the beginning, 200 rounds in any order, some cut, some beside others,
    in a store that holds about half of them: each cache that is given is what its own tokens leave."""
    random = np.random.default_rng(1)
    store = _Checked(forgetful, 60 * 10 * forgetful.config.kv_bytes_per_token(4))
    watched = WatchedScheduler(forgetful, prefixes=store, max_rows=3, prefill_chunk=64)
    shared = prompt_of(forgetful, 20)
    texts = {client: [*shared, 100 + client, *prompt_of(forgetful, 20)] for client in range(8)}
    of_ticket: dict[int, int] = {}
    wanted: dict[tuple[int, ...], list[int]] = {}
    for _ in range(200):
        client = int(random.integers(8))
        ticket = watched.submit(texts[client], 4)
        of_ticket[ticket] = client
        for _ in range(int(random.integers(0, 3))):
            watched.step()
        if random.random() < 0.1:
            watched.scheduler.finish(ticket)
        if random.random() < 0.5:
            watched.run()
            key = tuple(texts[client])
            if watched.tokens[ticket] and len(watched.tokens[ticket]) == 4:
                wanted.setdefault(key, watched.tokens[ticket])
                assert wanted[key] == watched.tokens[ticket]
            texts[client] = [*texts[client], *watched.tokens[ticket], int(random.integers(3, 200))]
        if len(texts[client]) > 90:
            texts[client] = texts[client][:41]
    watched.run()
    assert store.given > 60
    for key, tokens in list(wanted.items())[:20]:
        assert tokens == _alone(forgetful, key, 4)


def test_a_prompt_is_kept_at_its_end_and_with_its_answer(forgetful: Mixtral) -> None:
    store = StorePrefixes(10**8)
    watched = WatchedScheduler(forgetful, prefixes=store)
    prompt = prompt_of(forgetful, 40)
    ticket = watched.submit(prompt, 8)
    watched.step()
    assert store.sequences == [prompt]
    # Somebody else may go on from it while this one is still answered.
    request = watched.request([*prompt, 5, 6], 2)
    watched.scheduler.submit(request)
    watched.run()
    assert request.stats.reused_tokens == 40
    # What was lent came back longer; the last token of an answer is never fed.
    answered = [*prompt, *watched.tokens[ticket][:-1]]
    assert answered in store.sequences


@pytest.mark.parametrize("steps", [1, 3])
def test_what_is_cancelled_is_kept_as_far_as_it_came(forgetful: Mixtral, steps: int) -> None:
    store = StorePrefixes(10**8)
    watched = WatchedScheduler(forgetful, prefixes=store, prefill_chunk=50)
    prompt = prompt_of(forgetful, 100)
    ticket = watched.submit(prompt, 8)
    for _ in range(steps):
        watched.step()
    watched.scheduler.finish(ticket)
    watched.step()
    assert watched.scheduler.is_idle
    longest = max(store.sequences, key=len)
    fed = [*prompt, *watched.tokens[ticket]]
    assert longest == (fed[:50] if steps == 1 else fed)
    request = watched.request(fed, 3)
    ticket = watched.scheduler.submit(request)
    watched.run()
    assert request.stats.reused_tokens == min(len(longest), len(fed) - 2)
    assert watched.tokens[ticket] == _alone(forgetful, fed, 3)


def test_a_cache_that_is_lent_is_nobody_elses(forgetful: Mixtral) -> None:
    """The second row of the same prompt, admitted a step later, finds what the first has put back, or nothing."""
    watched = WatchedScheduler(forgetful, prefixes=StorePrefixes(10**8))
    prompt = prompt_of(forgetful, 60)
    watched.submit(prompt, 2)
    watched.run()
    tickets = []
    for _ in range(3):
        tickets.append(watched.submit(prompt, 10))
        watched.step()
    watched.run()
    assert [watched.tokens[ticket] for ticket in tickets] == [_alone(forgetful, prompt, 10)] * 3


@pytest.mark.parametrize("options", [{"kv_bits": 4}, {"kv_size": 48}, {"kv_size": 48, "kv_bits": 8}], ids=str)
def test_other_kinds_of_cache(small: Path, options: dict[str, Any]) -> None:
    with load(small, prefix_cache=0, **options) as forgetful, load(small, **options) as model:
        prompt = prompt_of(model, 40)
        for extra in (0, 3, 20, 90):
            longer = [*prompt, *prompt_of(model, 100, seed=5)[:extra]]
            found = model.generate_batch([longer, prompt_of(model, 30)], max_tokens=15)[0]
            assert list(found.token_ids) == _alone(forgetful, longer, 15)
            assert (found.stats.reused_tokens > 0) == (extra > 0)


def test_under_a_budget_prefixes_lie_in_the_memory_of_rows_that_do_not_run(small: Path, forgetful: Mixtral) -> None:
    with load(small, memory="30MB", context=1000) as model:
        kept, columns = model.engine.prompt_cache.kept, model.engine.plan.kv_columns
        assert columns == 1024
        prompts = [prompt_of(model, 100, seed=seed) for seed in range(3)]
        for _ in range(2):
            found = model.generate_batch(prompts, max_tokens=4, max_rows=2)
            assert [list(row.token_ids) for row in found] == [_alone(forgetful, prompt, 4) for prompt in prompts]
        assert sum(row.stats.reused_tokens for row in found) > 90
        a_token = model.config.kv_bytes_per_token(4)
        assert 0 < kept.nbytes <= columns * a_token
        # A row that needs all of it has it.
        long = prompt_of(model, 900)
        assert list(model.generate_batch([long], max_tokens=4)[0].token_ids) == _alone(forgetful, long, 4)
        assert kept.nbytes <= columns * a_token
