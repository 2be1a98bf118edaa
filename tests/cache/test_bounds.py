"""Bounded and quantised caches against one forward over everything: a mask made by a loop, numbers rounded beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mixtral import Mixtral, load
from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.cache.options import KVOptions
from mlx_mixtral.cache.quantized import QuantizedStorage
from mlx_mixtral.cache.storage import LayerArrays, PlainStorage
from mlx_mixtral.cache.views import PrefillView
from mlx_mixtral.cache.window import COLUMN_MULTIPLE, SLACK_TOKENS, Window
from mlx_mixtral.errors import ContextLengthError, InvalidRequestError
from mlx_mixtral.model.step import DecodeStep
from tests.conftest import Loader

ATOL = 3e-4
SIZE, SINKS = 40, 3
Logits = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def tiny(small: Path) -> Path:
    return small


@pytest.fixture(scope="module")
def model(small_model: Mixtral) -> Mixtral:
    return small_model


@pytest.fixture(scope="module")
def one_rounding(small: Path, as_on_gpus: Loader) -> Iterator[Mixtral]:
    """Rounds a token alike in a prompt and in a step: else keys and values may round to another code."""
    with as_on_gpus(small) as loaded:
        yield loaded


class Rounded(PlainStorage):
    """Plain numbers, each token's rounded to 4 or 8 bits as it comes."""

    bits = 4

    def pack(self, keys: mx.array, values: mx.array) -> LayerArrays:
        return tuple(self._rounded(array) for array in (keys, values))

    def _rounded(self, array: mx.array) -> mx.array:
        packed, scales, biases = mx.quantize(array.astype(mx.float16), group_size=32, bits=self.bits)
        groups = [part.astype(mx.float32) for part in (scales, biases)]
        return mx.dequantize(packed, *groups, group_size=32, bits=self.bits)


class Rounded8(Rounded):
    bits = 8


def _ids(model: Mixtral, length: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, model.config.vocab_size, length)]


def _expected(model: Mixtral, ids: list[int], kv: KVOptions) -> Logits:
    """One forward over ``ids``, what each may see told one by one."""
    c, size, sinks = model.config, kv.size or len(ids), kv.sinks if kv.size else 0
    kind = {None: PlainStorage, 4: Rounded, 8: Rounded8}[kv.bits]
    storage = kind(c.num_key_value_heads, c.head_dim, mx.float32)
    mask = np.zeros((1, 1, len(ids), len(ids)), bool)
    for query in range(len(ids)):
        recent = range(max(0, query + 1 - (size - sinks)), query + 1)
        for key in {*recent, *range(min(sinks, query + 1))}:
            mask[0, 0, query, key] = True
    layers = [storage.empty(1, len(ids)) for _ in range(c.num_hidden_layers)]
    chunk = PrefillView(storage, layers, 0, len(ids), 0, 0, mx.array(mask), None)
    return np.asarray(model.module.head(model.module.through_layers(mx.array([ids]), chunk)))[0]


def _cache(model: Mixtral, kv: KVOptions) -> KVCache:
    module, before = model.module, model.module.kv
    module.kv = kv
    try:
        return module.make_cache()
    finally:
        module.kv = before


def _fed(model: Mixtral, cache: KVCache, ids: list[int], sizes: list[int]) -> Logits:
    """Chunks of ``sizes`` tokens, then the rest token by token as decode steps."""
    step, parts, start = DecodeStep(model.module, compiled=False), [], 0
    for size in [*sizes, *[1] * (len(ids) - sum(sizes))]:
        tokens = mx.array([ids[start : start + size]])
        parts.append(np.asarray(model.module(tokens, cache) if start < sum(sizes) else step(tokens, cache))[0])
        start += size
    return np.concatenate(parts)


OPTIONS = [
    KVOptions(size=SIZE, sinks=SINKS),
    KVOptions(size=SIZE, sinks=0),
    KVOptions(bits=8),
    KVOptions(bits=4),
    KVOptions(bits=4, size=SIZE, sinks=SINKS),
]


@pytest.mark.parametrize("kv", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", [[60], [120], [5, 70, 40], [17] * 7, [45, 1, 1, 40, 1]], ids=str)
def test_any_cut_equals_one_forward(model: Mixtral, one_rounding: Mixtral, kv: KVOptions, sizes: list[int]) -> None:
    model = model if kv.bits is None else one_rounding
    ids = _ids(model, 130)
    cache = _cache(model, kv)
    np.testing.assert_allclose(_fed(model, cache, ids, sizes), _expected(model, ids, kv), atol=ATOL)
    assert cache.capacity == 256 if kv.size is None else cache.capacity <= SIZE + SLACK_TOKENS + COLUMN_MULTIPLE


@pytest.mark.parametrize("kv", OPTIONS, ids=str)
def test_what_was_taken_back_was_never_there(model: Mixtral, one_rounding: Mixtral, kv: KVOptions) -> None:
    model = model if kv.bits is None else one_rounding
    ids, wrong, cache = _ids(model, 200), _ids(model, 200, seed=1), _cache(model, kv)
    expected = _expected(model, ids, kv)
    _fed(model, cache, ids[:100], [60])
    for start, count in ((100, 9), (103, 17), (120, 1), (150, 32)):
        if cache.length < start:
            _fed(model, cache, ids[cache.length : start], [start - cache.length])
        for sizes in ([count], [1]):
            _fed(model, cache, wrong[:count], sizes)
            cache.trim(count)
            assert cache.length == start
    rest = _fed(model, cache, ids[150:], [7, 20])
    np.testing.assert_allclose(rest, expected[150:], atol=ATOL)


def test_more_is_not_taken_back_than_the_slack(model: Mixtral) -> None:
    cache = _cache(model, KVOptions(size=SIZE, sinks=SINKS))
    _fed(model, cache, _ids(model, 50), [50])
    assert cache.trimmable == 50
    _fed(model, cache, _ids(model, 150), [150])
    window = cache.window
    assert window is not None
    assert cache.trimmable == window.slack
    with pytest.raises(InvalidRequestError, match=f"cannot forget {window.slack + 1} tokens.*{window.slack} can be"):
        cache.trim(window.slack + 1)
    cache.trim(window.slack)
    assert cache.trimmable == 0


@given(st.integers(2, 70), st.integers(0, 20), st.data())
@settings(max_examples=60, deadline=None)
def test_columns_and_places_agree(size: int, sinks: int, data: st.DataObject) -> None:
    window = Window(size, min(sinks, size - 1))
    held, length = {}, 0
    for count in data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=6)):
        for first, column, run in window.runs(length, count):
            for offset in range(run):
                held[column + offset] = length + first + offset
        length += count
    last = mx.array([length - 1])
    places = np.asarray(window.places(window.columns, last))[0].tolist()
    in_sight = {*range(window.sinks), *range(length - (size - window.sinks), length)} & set(range(length))
    assert in_sight <= set(held.values())
    for column, place in enumerate(places):
        assert held.get(column, place) == place
        assert column in held or place >= length
    where = np.asarray(window.columns_of(mx.array(sorted(in_sight)))).tolist()
    assert [held[column] for column in where] == sorted(in_sight)


def test_batches_of_bounded_rows_equal_rows_alone(tiny: Path) -> None:
    for options in ({"kv_size": 24, "kv_sinks": 0}, {"kv_bits": 4, "kv_size": 24}):
        with load(tiny, **options) as model:  # type: ignore[arg-type]
            prompts = [_ids(model, length, seed=length) for length in (5, 9, 60, 5, 33)]
            alone = [model.generate(prompt, max_tokens=40).token_ids for prompt in prompts]
            together = [row.token_ids for row in model.generate_batch(prompts, max_tokens=40, max_rows=3)]
            assert together == alone


def test_bytes_are_those_the_bits_say(model: Mixtral) -> None:
    c = model.config
    numbers = 256 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    expected = {None: 4 * numbers, 16: 2 * numbers, 8: numbers + numbers // 8, 4: numbers // 2 + numbers // 8}
    for bits, nbytes in expected.items():
        kv = KVOptions(bits=bits)
        cache = _cache(model, kv)
        _fed(model, cache, _ids(model, 5), [5])
        assert cache.nbytes == nbytes == 256 * kv.bytes_per_token(c, 4)


def test_8x7b_at_32k_takes_what_the_design_allows() -> None:
    from mlx_mixtral.info.estimate import BUILT_IN

    config = BUILT_IN["8x7b"]
    assert 32768 * KVOptions().bytes_per_token(config, 2) <= 4.3e9
    assert 32768 * KVOptions(bits=4).bytes_per_token(config, 2) <= 1.3e9


def test_16_bits_are_halves_of_what_is_computed_in_float32(model: Mixtral) -> None:
    cache = _cache(model, KVOptions(bits=16))
    ids = _ids(model, 30)
    np.testing.assert_allclose(_fed(model, cache, ids, [20]), _expected(model, ids, KVOptions()), atol=0.05)
    assert cache.arrays[0].dtype == mx.float16


def test_a_bounded_text_goes_on_beyond_what_the_budget_holds(tiny: Path) -> None:
    with load(tiny, memory="60MB", context=64, kv_size=64) as model:
        assert model.residency.plan.kv_columns == 96
        assert len(model.generate(_ids(model, 300), max_tokens=100, stop_token_ids=[]).token_ids) == 100
    with load(tiny, memory="60MB", context=64) as model, pytest.raises(ContextLengthError):
        model.generate(_ids(model, 300), max_tokens=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": 3}, "kv_bits is 3; a KV cache has 4, 8 or 16 bits"),
        ({"kv_size": 0}, "kv_size is 0"),
        ({"kv_size": 4}, "kv_size is 4 and kv_sinks 4.*larger size or fewer sinks"),
        ({"kv_size": 10, "kv_sinks": 12}, "kv_size is 10 and kv_sinks 12"),
        ({"kv_size": 10, "kv_sinks": -1}, "kv_sinks is -1"),
        ({"kv_size": "10"}, "kv_size is '10'"),
    ],
)
def test_options_that_cannot_be(tiny: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        load(tiny, **options)  # type: ignore[arg-type]


def test_heads_that_no_group_divides(model: Mixtral) -> None:
    config = replace(model.config, head_dim=24)
    with pytest.raises(InvalidRequestError, match="head_dim that 32 divides; this model's is 24"):
        KVOptions(bits=4).storage(config, mx.float32)
    with pytest.raises(InvalidRequestError, match="groups of 64 needs a head_dim they divide"):
        QuantizedStorage(1, 96, mx.float32, 4, 64)


def test_padding_and_sinks_do_not_go_together() -> None:
    with pytest.raises(InvalidRequestError, match="rows of different lengths"):
        KVCache(1, 1, 32, window=Window(10, 2), left_padding=[3, 0])
