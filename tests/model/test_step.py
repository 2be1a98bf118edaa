"""The compiled step: the same numbers as the plain forward, written in place, in no more kernels than promised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import Mixtral, load
from mlx_mixtral.cache.options import STEP_TOKENS
from mlx_mixtral.model import step as step_module
from mlx_mixtral.model.step import DecodeStep
from mlx_mixtral_convert import Recipe, convert
from tests.conftest import Loader
from tests.kernels import kernels
from tests.shared import SharedFolders, random_checkpoint

RECORDED = Path(__file__).parents[1] / "goldens" / "transformers"
KERNELS_A_LAYER = 17
BUNDLED_VOCAB = 4096


@pytest.fixture(scope="module", params=["tiny", "sliding_window", "rope_dynamic", "one_expert", "tied_embeddings"])
def each(request: pytest.FixtureRequest, tiny: Path, as_on_gpus: Loader) -> Iterator[Mixtral]:
    with as_on_gpus(tiny if request.param == "tiny" else RECORDED / request.param) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def model(tiny: Path, as_on_gpus: Loader) -> Iterator[Mixtral]:
    with as_on_gpus(tiny) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def one_layer(shared: SharedFolders) -> Iterator[Mixtral]:
    with load(shared("one layer", lambda folder: random_checkpoint(folder, num_hidden_layers=1))) as loaded:
        yield loaded


def _ids(model: Mixtral, rows: int, length: int) -> mx.array:
    return mx.array(np.random.default_rng(0).integers(3, model.config.vocab_size, (rows, length)))


def _step(model: Mixtral) -> DecodeStep:
    """Compiled for the bundled checkpoint only: on the CPU backend every other one costs a dozen calls of a C++ compiler."""
    return DecodeStep(model.module, compiled=model.config.vocab_size == BUNDLED_VOCAB)


@pytest.mark.parametrize("padding", [None, [3, 0, 5]])
def test_steps_equal_plain_forwards(each: Mixtral, padding: list[int] | None) -> None:
    rows = len(padding) if padding else 1
    step, caches = _step(each), [each.make_cache(padding) for _ in "ab"]
    prompt = _ids(each, rows, 9)
    plain, ours = (each.module(prompt, cache)[:, -1] for cache in caches)
    for _ in range(12):
        token = mx.argmax(plain, axis=-1)[:, None]
        plain = each.module(token, caches[0])[:, -1]
        ours = step(token, caches[1])[:, -1]
        np.testing.assert_allclose(ours, plain, atol=2e-5)
    assert caches[0].length == caches[1].length


def test_several_tokens_a_step_equal_one_forward(each: Mixtral) -> None:
    step, caches = _step(each), [each.make_cache() for _ in "ab"]
    mx.eval([each.module(_ids(each, 1, 5), cache) for cache in caches])
    draft = _ids(each, 1, 4)
    np.testing.assert_allclose(step(draft, caches[1], last_only=False), each.module(draft, caches[0]), atol=2e-5)
    for cache in caches:
        cache.trim(2)
    following = _ids(each, 1, 3)
    np.testing.assert_allclose(step(following, caches[1]), each.module(following, caches[0])[:, -1:], atol=2e-5)


def test_one_graph_serves_all_steps_until_the_cache_grows(model: Mixtral) -> None:
    traced: list[int] = []
    real = step_module._step

    def watched(*args: object, **kwargs: object) -> object:
        traced.append(1)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    with patch.object(step_module, "_step", watched):
        step, cache = DecodeStep(model.module, compiled=True), model.make_cache()
        mx.eval(model.module(_ids(model, 1, STEP_TOKENS - 20), cache))
        for _ in range(20):
            mx.eval(step(mx.array([[7]]), cache))
        assert len(traced) == 1
        mx.eval(step(mx.array([[7]]), cache))
        assert len(traced) == 2
        other = model.make_cache()
        mx.eval(model.module(_ids(model, 1, 3), other), step(mx.array([[7]]), other))
        assert len(traced) == 2


def test_the_cache_is_written_in_place(one_layer: Mixtral) -> None:
    model = one_layer
    step, cache = DecodeStep(model.module, compiled=True), model.make_cache()
    mx.eval(model.module.remember(_ids(model, 1, 1000), cache), cache.arrays)
    for _ in range(2):
        mx.eval(step(mx.array([[7]]), cache))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(step(mx.array([[7]]), cache))
    # Scores of one token over all columns are held for a moment; a copy of one layer's keys would be four times the limit.
    assert mx.get_peak_memory() - before < cache.layers[0][0].nbytes / 4


def test_closing_a_model_releases_what_its_graph_holds(tiny: Path) -> None:
    before = mx.get_active_memory()
    model = load(tiny)
    model.generate([1, 2, 3], max_tokens=3)
    assert mx.get_active_memory() > before + 2**20
    model.close()
    assert mx.get_active_memory() < before + 2**16


@pytest.mark.parametrize("rows", [1, 8])
def test_kernels_of_a_layer(shared: SharedFolders, tmp_path: Path, as_on_gpus: Loader, rows: int) -> None:
    three_layers = shared("three narrow layers", lambda folder: random_checkpoint(folder, num_hidden_layers=3))
    convert(three_layers, tmp_path / "4bit", recipe=Recipe(bits=4))
    with as_on_gpus(tmp_path / "4bit", dtype="float16") as model:
        layers = model.module.layers

        def graph(count: int) -> mx.array:
            model.module.layers = layers[:count]
            cache = model.make_cache()
            mx.eval(model.module(_ids(model, rows, 3), cache), cache.lengths)
            return DecodeStep(model.module, compiled=True)(_ids(model, rows, 1), cache)

        two, three = (kernels(lambda count=count: graph(count)) for count in (2, 3))  # type: ignore[misc]
        model.module.layers = layers
    assert three.total() - two.total() <= KERNELS_A_LAYER, three - two
