"""The cache never changes an answer: steps, chunks, padding, windows and growth all equal one forward over everything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mixtral import Mixtral, load
from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.cache.options import STEP_TOKENS
from mlx_mixtral.errors import InvalidRequestError

RECORDED = Path(__file__).parents[1] / "goldens" / "transformers"
ATOL = 2e-4


@pytest.fixture(scope="module", params=["small", "sliding_window"])
def either(request: pytest.FixtureRequest, small: Path) -> Iterator[Mixtral]:
    """Full attention and a window of 8 tokens."""
    with load(small if request.param == "small" else RECORDED / request.param) as loaded:
        yield loaded


def _ids(model: Mixtral, length: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, model.config.vocab_size, length)]


def _in_steps(model: Mixtral, ids: list[int], sizes: list[int]) -> np.ndarray[Any, Any]:
    cache, parts, start = model.make_cache(), [], 0
    for size in sizes:
        parts.append(np.asarray(model.module(mx.array([ids[start : start + size]]), cache)))
        start += size
    assert cache.length == len(ids)
    return np.concatenate(parts, axis=1)[0]


@given(st.lists(st.integers(1, 13), min_size=1, max_size=8))
@settings(max_examples=15, deadline=None)
def test_any_cut_into_chunks_equals_one_forward(either: Mixtral, sizes: list[int]) -> None:
    ids = _ids(either, sum(sizes))
    whole = np.asarray(either.module(mx.array([ids])))[0]
    np.testing.assert_allclose(_in_steps(either, ids, sizes), whole, atol=ATOL)


def test_token_by_token_past_a_growth_of_the_cache(either: Mixtral) -> None:
    ids = _ids(either, STEP_TOKENS + 5)
    whole = np.asarray(either.module(mx.array([ids])))[0]
    stepped = _in_steps(either, ids, [STEP_TOKENS - 3] + [1] * 8)
    np.testing.assert_allclose(stepped, whole, atol=ATOL)


def test_rows_padded_on_the_left_equal_rows_alone(either: Mixtral) -> None:
    rows = [_ids(either, length, seed=length) for length in (3, 11, 17, 1)]
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    batch = mx.array([[0] * pad + row for pad, row in zip(padding, rows, strict=True)])
    cache = either.make_cache(left_padding=padding)
    first = np.asarray(either.module(batch, cache))
    steps = [_ids(either, 4, seed=90 + n) for n in range(6)]
    later = [np.asarray(either.module(mx.array(tokens)[:, None], cache)) for tokens in steps]
    assert np.isfinite(first).all()
    for row, (ids, pad) in enumerate(zip(rows, padding, strict=True)):
        alone = np.asarray(either.module(mx.array([ids + [tokens[row] for tokens in steps]])))[0]
        ours = np.concatenate([first[row, pad:], *(logits[row] for logits in later)])
        np.testing.assert_allclose(ours, alone, atol=ATOL)


def test_padded_rows_in_chunks_equal_rows_alone(either: Mixtral) -> None:
    rows = [_ids(either, length, seed=length) for length in (9, 14)]
    batch = np.array([[0] * 5 + rows[0], rows[1]])
    cache = either.make_cache(left_padding=[5, 0])
    parts = [np.asarray(either.module(mx.array(batch[:, a:b]), cache)) for a, b in ((0, 4), (4, 11), (11, 14))]
    together = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(together[0, 5:], np.asarray(either.module(mx.array([rows[0]])))[0], atol=ATOL)
    np.testing.assert_allclose(together[1], np.asarray(either.module(mx.array([rows[1]])))[0], atol=ATOL)


def test_trimmed_cache_continues_as_if_the_tokens_had_not_been(either: Mixtral) -> None:
    ids, other = _ids(either, 12), _ids(either, 4, seed=5)
    cache = either.make_cache()
    mx.eval(either.module(mx.array([ids]), cache))
    cache.trim(4)
    ours = np.asarray(either.module(mx.array([other]), cache))[0]
    wanted = np.asarray(either.module(mx.array([ids[:8] + other])))[0, 8:]
    np.testing.assert_allclose(ours, wanted, atol=ATOL)
    with pytest.raises(InvalidRequestError, match=r"13 tokens.*holds 12"):
        cache.trim(13)


@pytest.mark.parametrize(
    "name", ["rope_dynamic", "rope_longrope_short", "rope_yarn", "rope_llama3", "rope_linear_legacy"]
)
def test_scaled_positions_in_steps_equal_one_forward_below_the_switch(name: str) -> None:
    """Past the switch, dynamic and longrope frequencies depend on the length by definition, so steps may differ."""
    with load(RECORDED / name) as model:
        switch = model.config.rope.switches_at()
        ids = _ids(model, min(20, switch or 20))
        whole = np.asarray(model.module(mx.array([ids])))[0]
        np.testing.assert_allclose(_in_steps(model, ids, [7, 1, 1, len(ids) - 9]), whole, atol=ATOL)


@given(
    held=st.integers(0, 12),
    new=st.integers(1, 9),
    window=st.none() | st.integers(1, 10),
    padding=st.none() | st.lists(st.integers(0, 6), min_size=1, max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_mask_says_what_a_loop_says(held: int, new: int, window: int | None, padding: list[int] | None) -> None:
    cache = KVCache(1, 1, 2, window=window, left_padding=padding)
    rows = len(padding) if padding else 1
    if held:
        cache.reserve(rows, held)
        cache.advance(held)
    mask, total = cache.mask(new), held + new
    first = 0 if window is None else max(0, held + 1 - window)
    for row in range(rows):
        pad = padding[row] if padding else 0
        for i in range(new):
            query = held + i
            allowed = {k for k in range(query + 1) if k >= pad and (window is None or k > query - window)} | {query}
            if mask is None:
                seen = set(range(first, total))
            elif isinstance(mask, str):
                seen = set(range(first, query + 1))
            else:
                line = np.broadcast_to(np.asarray(mask), (rows, 1, new, total - first))[row, 0, i]
                seen = {first + int(k) for k in np.flatnonzero(line)}
            assert seen == allowed


def test_memory_grows_in_steps_and_is_reported() -> None:
    cache = KVCache(2, 3, 4)
    assert cache.nbytes == 0
    for _ in range(STEP_TOKENS + 1):
        cache.reserve(1, 1)
        cache.advance(1)
    mx.eval(cache.arrays)
    assert cache.nbytes == 2 * 2 * (2 * STEP_TOKENS) * 3 * 4 * 4


def test_negative_padding_is_an_error() -> None:
    with pytest.raises(InvalidRequestError, match="-1"):
        KVCache(1, 1, 2, left_padding=[0, -1])


@pytest.mark.parametrize("padding", [None, [4, 0]])
def test_last_only_is_the_last_position_of_all(either: Mixtral, padding: list[int] | None) -> None:
    tokens = mx.array([_ids(either, 12, seed=row) for row in range(2)])
    caches = [either.make_cache(left_padding=padding) for _ in "ab"]
    for part in (tokens[:, :5], tokens[:, 5:]):
        everything = either.module.hidden(part, caches[0])
        last = either.module.hidden(part, caches[1], last_only=True)
        assert last.shape == (2, 1, everything.shape[2])
        np.testing.assert_allclose(last[:, 0], everything[:, -1], atol=1e-5)
    for one, other in zip(caches[0].arrays, caches[1].arrays, strict=True):
        np.testing.assert_allclose(one[:, :, :12], other[:, :, :12], atol=1e-5)
