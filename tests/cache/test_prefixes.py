"""Kept prompts: the same tokens with less computed, and nothing mixed up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mixtral import Mixtral, load
from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.cache.prefix_index import PrefixIndex, adapter_of, common_prefix, sequence_key, tokens_of
from mlx_mixtral.cache.prefixes import MAX_LOST_TOKENS, MIN_TOKENS, PrefixStore
from mlx_mixtral.cache.window import Window


@pytest.fixture(scope="module")
def model(small_model: Mixtral) -> Mixtral:
    return small_model


@pytest.fixture(scope="module")
def forgetful(small: Path) -> Iterator[Mixtral]:
    """Keeps nothing: what every other answer is compared with."""
    with load(small, prefix_cache=0) as loaded:
        yield loaded


def _ids(model: Mixtral, length: int, seed: int = 0) -> list[int]:
    return [1, *(int(i) for i in np.random.default_rng(seed).integers(3, model.config.vocab_size, length - 1))]


def _held(cache: object, tokens: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    return [np.asarray(array[:, :, :tokens]) for layer in cache.layers for array in layer]  # type: ignore[attr-defined]


def test_a_prompt_that_goes_on_is_computed_from_where_it_differs(own: Mixtral, forgetful: Mixtral) -> None:
    prompt = _ids(own, 60)
    first = own.generate(prompt, max_tokens=20)
    assert first.stats.reused_tokens == 0
    again = own.generate(prompt, max_tokens=20)
    assert again.stats.reused_tokens == 58
    assert (again.stats.prompt_tokens, again.token_ids) == (60, first.token_ids)
    # The last token of an answer was never fed.
    longer = [*prompt, *first.token_ids, *_ids(own, 10, seed=1)]
    other = own.generate(longer, max_tokens=20)
    assert other.stats.reused_tokens in (79, 80)
    assert other.token_ids == forgetful.generate(longer, max_tokens=20).token_ids
    assert forgetful.generate(longer, max_tokens=2).stats.reused_tokens == 0


def test_two_questions_about_one_text_do_not_disturb_each_other(own: Mixtral, forgetful: Mixtral) -> None:
    text = _ids(own, 100)
    questions = [[*text, *_ids(own, 50 + seed, seed=seed)] for seed in (1, 2, 3)]
    expected = [forgetful.generate(question, max_tokens=12).token_ids for question in questions]
    for turn in range(3):
        for question, tokens in zip(questions, expected, strict=True):
            found = own.generate(question, max_tokens=12)
            assert found.token_ids == tokens
            assert found.stats.reused_tokens == (
                len(question) - 2 if turn else 101 if question is not questions[0] else 0
            )
    assert len(own.engine.prompt_cache.kept) == 3


def test_a_stream_that_is_closed_keeps_what_it_computed(own: Mixtral, forgetful: Mixtral) -> None:
    prompt = _ids(own, 40)
    with own.stream(prompt, max_tokens=50) as stream:
        seen = [next(stream).token_id for _ in range(5)]
    after = [*prompt, *seen, 17, 18]
    found = own.generate(after, max_tokens=10)
    assert found.stats.reused_tokens in (44, 45)
    assert found.token_ids == forgetful.generate(after, max_tokens=10).token_ids


def test_an_error_keeps_nothing(own: Mixtral) -> None:
    def fail(done: int, total: int) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        own.generate(_ids(own, 40), max_tokens=5, on_prefill=fail)
    assert len(own.engine.prompt_cache.kept) == 0


def test_the_least_recently_used_goes_first(small: Path) -> None:
    with load(small, prefix_cache="400KB") as model:
        prompts = [_ids(model, 100, seed=seed) for seed in range(4)]
        for index in (0, 1, 2, 3, 1, 0):
            model.generate(prompts[index], max_tokens=5)
            assert model.engine.prompt_cache.kept.nbytes <= 400_000
        each = model.engine.prompt_cache.kept.nbytes // len(model.engine.prompt_cache.kept)
        assert len(model.engine.prompt_cache.kept) == 400_000 // each < 4
        reused = [bool(model.generate(prompts[index], max_tokens=1).stats.reused_tokens) for index in (0, 1)]
        assert reused == [True, True]


@pytest.mark.parametrize("options", [{"kv_bits": 4}, {"kv_size": 48}, {"kv_size": 48, "kv_bits": 8}], ids=str)
def test_other_kinds_of_cache(small: Path, options: dict[str, int]) -> None:
    with load(small, **options) as model, load(small, prefix_cache=0, **options) as forgetful:  # type: ignore[arg-type]
        prompt = _ids(model, 40)
        for extra in (0, 3, 20, 90, 95):
            longer = [*prompt, *_ids(model, 100, seed=5)[:extra]]
            expected = forgetful.generate(longer, max_tokens=15)
            assert model.generate(longer, max_tokens=15).token_ids == expected.token_ids


def test_under_a_budget_one_is_kept_in_the_memory_of_the_next(small: Path, forgetful: Mixtral) -> None:
    with load(small, memory="30MB", context=256) as model:
        prompts = [_ids(model, 80, seed=seed) for seed in range(2)]
        expected = [forgetful.generate(prompt, max_tokens=10).token_ids for prompt in prompts]
        for index, reused in ((0, 0), (0, 78), (1, 0), (0, 0)):
            found = model.generate(prompts[index], max_tokens=10)
            assert (found.token_ids, found.stats.reused_tokens) == (expected[index], reused)
            assert len(model.engine.prompt_cache.kept) == 1
        model.logits(prompts[0])
        assert len(model.engine.prompt_cache.kept) == 0
        model.generate(prompts[0], max_tokens=2)
        model.set_memory("30MB")
        assert len(model.engine.prompt_cache.kept) == 0


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=80), min_size=1, max_size=8))
@settings(max_examples=20, deadline=None)
def test_whatever_is_kept_a_cache_holds_its_own_tokens(model: Mixtral, sequences: list[list[int]]) -> None:
    store = PrefixStore(10**8)
    for sequence in sequences:
        tokens = [5] * 20 + [token + 3 for token in sequence]
        cache = store.take(tokens) or model.make_cache()
        assert cache.length < len(tokens)
        model.module.remember(mx.array([tokens[cache.length :]]), cache)
        fresh = model.make_cache()
        model.module.remember(mx.array([tokens]), fresh)
        for one, other in zip(_held(cache, len(tokens)), _held(fresh, len(tokens)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
        store.put(tokens, cache)


def test_a_copy_is_made_only_where_much_would_be_lost(model: Mixtral) -> None:
    store, cache = PrefixStore(10**8), model.make_cache()
    tokens = _ids(model, 100)
    model.module.remember(mx.array([tokens]), cache)
    store.put(tokens, cache)
    assert store.take([*tokens[: 99 - MAX_LOST_TOKENS], 4, 5]) is not cache
    (lent,) = [kept.cache for kept in store._kept.values()]
    assert store.take([*tokens[: 100 - MAX_LOST_TOKENS], 4, 5]) is lent
    assert len(store) == 0


def _kept_cache(model: Mixtral, tokens: list[int]) -> KVCache:
    cache = model.make_cache()
    model.module.remember(mx.array([tokens]), cache)
    return cache


def test_what_a_new_sequence_begins_with_is_replaced_and_only_that(model: Mixtral) -> None:
    store, tokens = PrefixStore(10**8), _ids(model, 60)
    for kept in (tokens[:20], [*tokens[:19], 3], tokens[:40], tokens[:20]):
        store.put(kept, _kept_cache(model, kept))
    # The last is what the one of 40 begins with: it goes in beside it, for it was used since.
    assert [len(tokens) for tokens in store.sequences] == [20, 40, 20]
    store.put(tokens, _kept_cache(model, tokens))
    assert store.sequences == [[*tokens[:19], 3], tokens]
    assert store.nbytes == sum(kept.cache.nbytes for kept in store._kept.values())


def test_a_short_sequence_keeps_the_columns_it_uses_and_goes_on_from_them(own: Mixtral, forgetful: Mixtral) -> None:
    prompt = _ids(own, 40)
    own.generate(prompt, max_tokens=4)
    kept = own.engine.prompt_cache.kept
    a_token = own.config.kv_bytes_per_token(4)
    assert kept.nbytes in (42 * a_token, 43 * a_token)
    longer = [*prompt, *_ids(own, 300, seed=3)]
    found = own.generate(longer, max_tokens=8)
    assert found.stats.reused_tokens >= 40
    assert found.token_ids == forgetful.generate(longer, max_tokens=8).token_ids
    # Where more than half is in use nothing is copied: two whole steps.
    (whole,) = [each.cache for each in kept._kept.values()]
    assert sum(array.nbytes for layer in whole.layers for array in layer) == 512 * a_token


def _wrapped(model: Mixtral, length: int) -> tuple[list[int], KVCache]:
    """A cache with 40 tokens in sight that was written over."""
    tokens = _ids(model, length)
    cache = KVCache(2, 2, 32, window=Window(40))
    for start in range(0, length, 20):
        model.module.remember(mx.array([tokens[start : start + 20]]), cache)
    return tokens, cache


def test_what_was_written_over_is_not_taken(model: Mixtral) -> None:
    tokens, cache = _wrapped(model, 140)
    assert (cache.is_whole, cache.trimmable) == (False, 56)
    whole = PrefixStore(10**8)
    whole.put(tokens, cache)
    # So much can be given up, but is too much to be: a copy would be made, and of this none can be.
    assert whole.take([*tokens[:100], 250, 4]) is None
    assert len(whole) == 1
    cache.trim(30)  # tokens that are not kept leave fewer to be given up
    kept, left = tokens[:110], cache.trimmable
    assert 0 < left < MAX_LOST_TOKENS
    store = PrefixStore(10**8)
    store.put(kept, cache)
    # Far from its end nothing can be copied; nearer, more than may be given up would be lost.
    assert store.take([*kept[:50], 3, 4]) is None
    assert store.take([*kept[: 110 - left - 1], 250, 4]) is None
    assert len(store) == 1
    assert store.take([*kept[: 110 - left], 250, 4]) is cache


def test_a_copy_counts_its_own_tokens(model: Mixtral) -> None:
    cache = _kept_cache(model, _ids(model, 40))
    assert cache.lengths.tolist() == [40]
    assert cache.fork(20).lengths.tolist() == [20]
    assert cache.lengths.tolist() == [40]


def test_of_more_than_the_limit_the_oldest_go(model: Mixtral) -> None:
    sequences = [_ids(model, 20, seed=seed) for seed in range(3)]
    each = _kept_cache(model, sequences[0]).fork(20).nbytes
    store = PrefixStore(2 * each)
    for tokens in sequences:
        store.put(tokens, _kept_cache(model, tokens))
    assert store.sequences == sequences[1:]
    # What could never be kept is refused before anything makes room for it.
    large = _ids(model, 50, seed=9)
    store.put(large, _kept_cache(model, large))
    assert store.sequences == sequences[1:]
    too_small = PrefixStore(each - 1)
    too_small.put(sequences[0], _kept_cache(model, sequences[0]))
    assert len(too_small) == 0


def test_a_short_beginning_is_not_taken_from_a_longer_sequence(model: Mixtral) -> None:
    store, tokens = PrefixStore(10**8), _ids(model, 30)
    store.put(tokens, _kept_cache(model, tokens))
    assert store.take([*tokens[: MIN_TOKENS - 1], 3, 4]) is None
    assert len(store) == 1
    found = store.take([*tokens[:MIN_TOKENS], 3, 4])
    assert found is not None
    assert found.length == MIN_TOKENS


def test_what_can_be_had_is_said_without_taking_it(model: Mixtral) -> None:
    store, tokens = PrefixStore(10**8), _ids(model, 100)
    store.put(tokens, _kept_cache(model, tokens))
    for wanted in (tokens, [*tokens, 4, 5], [*tokens[:30], 3, 4], tokens[:10]):
        said = store.reusable(wanted, 2)
        found = store.take(wanted, 2)
        assert said == (0 if found is None else found.length)
        if found is not None and len(store) == 0:
            store.put(tokens[: found.length], found)
            tokens = tokens[: found.length]
    store.shrink(0)
    assert (len(store), store.reusable(tokens)) == (0, 0)


def _alike(a: list[int], b: list[int]) -> int:
    """Numbers that both begin with, one by one."""
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same


SEQUENCE = st.lists(st.sampled_from([0, 1, 256, 2**31]), max_size=12)


ADAPTER = st.sampled_from([None, 0, 1])


@given(SEQUENCE, SEQUENCE, ADAPTER, ADAPTER)
def test_common_prefix_is_what_a_loop_finds(a: list[int], b: list[int], adapter: int | None, other: int | None) -> None:
    """Of what two adapters computed nothing is common."""
    alike = 1 + _alike(a, b) if adapter == other else 0
    assert common_prefix(sequence_key(a, adapter), sequence_key(b, other)) == alike
    assert tokens_of(sequence_key(a, adapter)) == a
    assert adapter_of(sequence_key(a, adapter)) == adapter


@given(st.lists(SEQUENCE, max_size=30), st.lists(SEQUENCE, max_size=5), SEQUENCE, st.integers(0, 14))
def test_an_index_finds_what_looking_at_each_sequence_finds(
    given: list[list[int]], gone: list[list[int]], wanted: list[int], most: int
) -> None:
    index, kept = PrefixIndex(), list[list[int]]()
    for tokens in given:
        if tokens not in kept:
            index.add(sequence_key(tokens))
            kept.append(tokens)
    for tokens in gone:
        if tokens in kept:
            index.remove(sequence_key(tokens))
            kept.remove(tokens)
    assert len(index) == len(kept)
    longest = max((min(_alike(tokens, wanted), most) for tokens in kept), default=0)
    # The first number of a key is the adapter's.
    found = index.likest(sequence_key(wanted), 1 + most)
    if found is None:
        assert not kept
    else:
        tokens = tokens_of(found[0])
        assert (tokens in kept, found[1]) == (True, 1 + longest)
        assert min(_alike(tokens, wanted), most) == longest
        assert (wanted[:longest] in kept) == (tokens == wanted[:longest])
    expected = sorted((tokens for tokens in kept if wanted[: len(tokens)] == tokens), key=len, reverse=True)
    assert [tokens_of(key) for key in index.beginnings(sequence_key(wanted))] == expected


class _CountedKey(bytes):
    """A key of a sequence that counts with how many it is compared."""

    compared = 0

    def __lt__(self, other: bytes) -> bool:
        _CountedKey.compared += 1
        return bytes(self) < bytes(other)

    def __gt__(self, other: bytes) -> bool:
        _CountedKey.compared += 1
        return bytes(self) > bytes(other)


def test_more_sequences_that_begin_otherwise_hardly_cost_more(model: Mixtral, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty times as many: five comparisons more at most wherever a sequence is looked up, for they are sorted."""
    monkeypatch.setattr("mlx_mixtral.cache.prefixes.sequence_key", lambda *given: _CountedKey(sequence_key(*given)))
    compared = {}
    lookups: list[object] = []
    monkeypatch.setattr(
        "mlx_mixtral.cache.prefix_index.common_prefix", lambda a, b: (lookups.append(a), common_prefix(a, b))[1]
    )
    small = model.make_cache()
    model.module.remember(mx.array([list(range(20))]), small)
    for count in (200, 4000):
        store, chance = PrefixStore(10**10), np.random.default_rng(count)
        for _ in range(count):
            store.put([int(token) for token in chance.integers(3, 250, 20)], small)
        assert (len(store), store.nbytes) == (count, sum(kept.nbytes for kept in store._kept.values()))
        tokens = _ids(model, 60)
        store.put(tokens, _kept_cache(model, tokens))
        _CountedKey.compared = 0
        lookups.clear()
        assert store.reusable([*tokens, 7]) == 60
        taken = store.take([*tokens, 7])
        assert taken is not None
        store.put(tokens, taken)
        compared[count] = (_CountedKey.compared, len(lookups))
    (few, looked), (many, looked_then) = compared.values()
    assert looked_then <= looked <= 12
    assert 0 < few < many <= few + 5 * 10


def test_it_is_said_why_a_beginning_is_not_used_again(small: Path) -> None:
    with load(small, kv_size=64) as model:
        prompt = _ids(model, 300)

        def why(tokens: list[int]) -> str | None:
            return model.generate(tokens, max_tokens=1).stats.not_reused

        assert why(prompt) is None
        assert why([*prompt, 5]) is None
        assert "cannot go back" in str(why([*prompt[:100], 7, 8]))
        assert "for 9 tokens, and fewer than 16" in str(why([*prompt[:9], 1, 2, 3]))
        assert why([9, 9, 9, 9]) is None
