"""The cache of a batch: every row holds and computes what it would alone, whoever joins, leaves, grows or is taken back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mixtral import Mixtral, load
from mlx_mixtral.cache.batch import BatchCache
from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.model.step import DecodeStep
from tests.conftest import Loader
from tests.generation.support import prompt_of

LENGTHS = (250, 3, 255, 40, 520)


@pytest.fixture(scope="module", params=["plain", "kv_bits", "window"])
def model(request: pytest.FixtureRequest, small: Path) -> Iterator[Mixtral]:
    options = {"plain": {}, "kv_bits": {"kv_bits": 4}, "window": {"kv_size": 100, "kv_sinks": 4}}[request.param]
    with load(small, **options) as loaded:  # type: ignore[arg-type]
        yield loaded


def _filled(model: Mixtral, tokens: list[int]) -> KVCache:
    cache = model.make_cache()
    model.module.remember(mx.array([tokens], mx.int32), cache)
    mx.eval(cache.arrays)
    return cache


def _batch(model: Mixtral, spread: float | None = 2.0) -> BatchCache:
    empty = model.make_cache()
    return BatchCache(empty.storage, empty.window, spread=spread)


class _Pairs:
    """Rows in a batch, and the same rows by themselves."""

    def __init__(self, model: Mixtral, spread: float | None) -> None:
        self.model, self.batch = model, _batch(model, spread)
        self.compute = DecodeStep(model.module, compiled=False)
        self.alone: list[KVCache] = []
        self.made = 0

    def join(self, length: int) -> None:
        tokens = prompt_of(self.model, length, seed=self.made)
        self.made += 1
        self.alone.append(_filled(self.model, tokens))
        self.batch.join(_filled(self.model, tokens), [(0, length)])

    def step(self) -> None:
        tokens = [3 + (index * 7 + cache.length) % 200 for index, cache in enumerate(self.alone)]
        wanted = [
            self.compute(mx.array([[token]], mx.int32), cache) for token, cache in zip(tokens, self.alone, strict=True)
        ]
        found = self.compute(mx.array(tokens, mx.int32)[:, None], self.batch)
        np.testing.assert_array_equal(np.asarray(found), np.concatenate([np.asarray(logits) for logits in wanted]))
        assert self.batch.taken == [cache.length for cache in self.alone]

    def keep(self, rows: list[int]) -> None:
        self.alone = [self.alone[row] for row in rows]
        self.batch.keep(rows)


@pytest.mark.parametrize("spread", [2.0, None, math.inf], ids=str)
def test_rows_compute_what_they_would_alone(model: Mixtral, spread: float | None) -> None:
    pairs = _Pairs(model, spread)
    for length in LENGTHS:
        pairs.join(length)
    for _ in range(9):  # over the edge of a step of columns, where rows go to another group
        pairs.step()
    pairs.keep([1, 3, 4])
    pairs.step()
    pairs.join(300)
    pairs.step()
    pairs.keep([0])
    pairs.step()


@given(st.lists(st.tuples(st.sampled_from([3, 30, 250, 256, 511]), st.integers(0, 3), st.integers(0, 5)), max_size=5))
@settings(max_examples=8, deadline=None)
def test_whoever_comes_and_goes(small_model: Mixtral, plan: list[tuple[int, int, int]]) -> None:
    pairs = _Pairs(small_model, 2.0)
    for length, steps, leaves in plan:
        pairs.join(length)
        for _ in range(steps):
            pairs.step()
        if leaves < len(pairs.alone) > 1:
            pairs.keep([row for row in range(len(pairs.alone)) if row != leaves])
            pairs.step()


def test_what_is_extracted_goes_on_as_the_row_does(model: Mixtral) -> None:
    pairs = _Pairs(model, 2.0)
    for length in (40, 300):
        pairs.join(length)
    for _ in range(3):
        pairs.step()
    for row, alone in enumerate(pairs.alone):
        own = pairs.batch.extract(row)
        mx.eval(own.arrays)
        assert (own.length, own.trimmable, own.rows) == (alone.length, alone.trimmable, 1)
        for _ in range(3):
            token = mx.array([[9]], mx.int32)
            wanted, found = pairs.compute(token, alone), pairs.compute(token, own)
            np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_a_row_that_is_taken_back_forgets_its_last_token(model: Mixtral) -> None:
    pairs = _Pairs(model, 2.0)
    for length in (40, 45):
        pairs.join(length)
    pairs.step()
    pairs.batch.take_back(1)
    pairs.alone[1].trim(1)
    pairs.step()
    own = pairs.batch.extract(1)
    assert own.written == pairs.alone[1].written == 46


def test_one_prompt_serves_several_rows(small_model: Mixtral) -> None:
    tokens = prompt_of(small_model, 30)
    batch, cache = _batch(small_model), _filled(small_model, tokens)
    batch.join(cache, [(0, 30)] * 2, keep=True)
    batch.join(cache, [(0, 20)])
    assert (batch.taken, cache.rows) == ([30, 30, 20], 0)
    step = DecodeStep(small_model.module, compiled=False)
    found = np.asarray(step(mx.array([[5], [6], [5]], mx.int32), batch))
    for row, (length, token) in enumerate(((30, 5), (30, 6), (20, 5))):
        alone = step(mx.array([[token]], mx.int32), _filled(small_model, tokens[:length]))
        np.testing.assert_array_equal(found[row], np.asarray(alone)[0])


def test_a_long_row_does_not_make_short_ones_as_large(small_model: Mixtral) -> None:
    grouped, dense = _batch(small_model), _batch(small_model, math.inf)
    for length in (50, 60, 70, 1000):
        for batch in (grouped, dense):
            batch.join(_filled(small_model, prompt_of(small_model, length)), [(0, length)])
    assert (grouped.columns, dense.columns) == (3 * 256 + 1024, 4 * 1024)
    assert dense.nbytes == 4096 * small_model.config.kv_bytes_per_token(4)
    assert grouped.nbytes == 1792 * small_model.config.kv_bytes_per_token(4)
    # What there would be is said beforehand.
    assert grouped.columns_with([300]) == 3 * 256 + 512 + 1024
    assert grouped.columns_with([300], more=213) == 3 * 512 + 768 + 1280
    # 70 and 187 are one more than a step; 60 stays within it.
    assert grouped.columns_with([], more=187) == 2 * 256 + 512 + 1280


def test_a_compiled_step_takes_groups(small: Path, as_on_gpus: Loader) -> None:
    with as_on_gpus(small) as model:
        steps = [DecodeStep(model.module, compiled=compiled) for compiled in (False, True)]
        batches = [_batch(model) for _ in steps]
        for length in (5, 300, 7):
            for batch in batches:
                batch.join(_filled(model, prompt_of(model, length)), [(0, length)])
        for _ in range(3):
            wanted, found = (
                np.asarray(step(mx.array([[5], [6], [7]], mx.int32), batch))
                for step, batch in zip(steps, batches, strict=True)
            )
            np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert [len(group.rows) for group in batches[1].groups] == [2, 1]
        assert batches[1].taken == [8, 303, 10]


def test_rows_of_one_adapter_lie_side_by_side(small_model: Mixtral) -> None:
    """However they came: each adapter of a step costs its products once."""
    batch, wanted = _batch(small_model), []
    for index, adapter in enumerate([1, None, 0, None, 1, 0]):
        cache = small_model.module.make_cache(adapter=adapter)
        small_model.module.remember(mx.array([list(range(3, 20 + index))]), cache)
        batch.join(cache, [(0, 17 + index)])
        wanted.append(adapter)
    assert isinstance(batch.adapter, tuple)
    assert sorted(batch.adapter, key=str) == [(0, 2), (1, 2), (None, 2)]
    assert batch.orders is not None
    order = [int(place) for place in np.array(batch.orders[0])]
    lying = [adapter for adapter, count in batch.adapter for _ in range(count)]
    assert [wanted[place] for place in order] == lying
    assert batch.extract(2).adapter == 0
    batch.keep([1, 3])
    assert batch.adapter is None
