"""What a source reads once adapters are fused in, matrix by matrix; and which adapters cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_mixtral import AdapterSource
from mlx_mixtral.adapters.adapter import Adapter, LowRank, TokenRows
from mlx_mixtral.config.layout import Matrix, Norm, matrices, norms
from mlx_mixtral.errors import ConversionError, NonFiniteWeightsError
from mlx_mixtral_convert.sources import PackedSource, TensorSource, main_dtype, matrix_bytes, open_source, small_files
from mlx_mixtral_convert.sources.adapted import AdaptedSource, adapt, fuse, open_adapted
from tests.convert.adapter_writer import EVERYTHING, EXPERTS, Changes, MemoryAdapter, changed, random_changes
from tests.convert.support import CONFIG, Floats, dense_config, make_checkpoint, weights

MADE = weights(CONFIG)
Q = "model.layers.0.self_attn.q_proj"
DOWN = EXPERTS[2]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of several blocks, the last of them short."""
    monkeypatch.setattr("mlx_mixtral_convert.packing.measure.BLOCK_VALUES", 700)
    monkeypatch.setattr("mlx_mixtral_convert.sources.adapted.PRODUCT_VALUES", 1500)


@pytest.fixture(params=["BF16", "F16", "F32"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> TensorSource:
    return open_source(make_checkpoint(tmp_path / "source", dtype=request.param))


def read(source: TensorSource, matrix: Matrix, expert: int = 0) -> Floats:
    """Through memory that holds exactly the matrix, and something before."""
    scratch = np.full(matrix_bytes(source, matrix), 0xAB, np.uint8)
    values = source.read(matrix, expert, scratch)
    assert values.dtype == source.dtype(matrix)
    assert np.shares_memory(values.array, scratch)
    assert values.dtype == "F32"
    return values.array


def by_path(source: TensorSource) -> dict[str, Matrix]:
    return {matrix.path: matrix for matrix in matrices(source.config)}


def close_to(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_every_expert_has_its_own_change(source: TensorSource, dora: bool) -> None:
    changes = random_changes(CONFIG, EVERYTHING, dora=dora)
    adapted = adapt(source, [MemoryAdapter(changes)])
    seen = 0
    for path, matrix in by_path(source).items():
        for expert in range(matrix.num_experts or 1):
            if (change := changes.get((path, expert if matrix.num_experts else None))) is not None:
                close_to(read(adapted, matrix, expert), changed(MADE[source.name(matrix, expert)], change))
                seen += 1
    assert seen == len(changes)


def test_what_is_not_touched_is_read_as_it_was(source: TensorSource) -> None:
    adapted = adapt(source, [MemoryAdapter(random_changes(CONFIG, (DOWN,)))])
    for matrix in matrices(source.config):
        if matrix.path.endswith("down_proj"):
            assert adapted.dtype(matrix) == "F32"
            continue
        assert adapted.dtype(matrix) == source.dtype(matrix)
        left, right = (
            each.read(matrix, 0, np.empty(matrix_bytes(each, matrix), np.uint8)) for each in (adapted, source)
        )
        assert left.dtype == right.dtype
        assert left.array.tobytes() == right.array.tobytes()


def test_experts_without_a_change_keep_their_values_in_float32(source: TensorSource) -> None:
    changes = {place: each for place, each in random_changes(CONFIG, (DOWN,)).items() if place[1] == 2}
    adapted = adapt(source, [MemoryAdapter(changes)])
    matrix = by_path(source)[f"model.layers.1.{DOWN}"]
    for expert in range(4):
        was = MADE[source.name(matrix, expert)]
        was = was.astype(np.float16).astype(np.float32) if source.dtype(matrix) == "F16" else was
        if expert == 2:
            close_to(read(adapted, matrix, expert), changed(was, changes[matrix.path, 2]))
        else:
            np.testing.assert_array_equal(read(adapted, matrix, expert), was)


def test_replaced_matrices_and_norms_stand_in_place_of_the_source_s(source: TensorSource) -> None:
    random = np.random.default_rng(2)
    head = random.standard_normal((64, 128)).astype(np.float32)
    norm = random.standard_normal(128).astype(np.float32)
    whole = {"lm_head": head, "model.layers.1.input_layernorm": norm}
    adapted = adapt(source, [MemoryAdapter(whole=whole)])
    np.testing.assert_array_equal(read(adapted, by_path(source)["lm_head"]), head)
    assert head is not read(adapted, by_path(source)["lm_head"])
    found: dict[str, Norm] = {each.path: each for each in norms(source.config)}
    values = adapted.read_norm(found["model.layers.1.input_layernorm"])
    assert (values.dtype, values.array.shape) == ("F32", (1, 128))
    np.testing.assert_array_equal(values.array[0], norm)
    for path in ("model.layers.0.input_layernorm", "model.norm"):
        assert adapted.read_norm(found[path]).array.tobytes() == source.read_norm(found[path]).array.tobytes()


def test_rows_of_tokens_stand_in_place_of_theirs_after_everything_else(source: TensorSource) -> None:
    rows = np.random.default_rng(4).standard_normal((2, 128)).astype(np.float32)
    change = LowRank(np.ones((1, 128), np.float32), np.ones((64, 1), np.float32))
    adapter = MemoryAdapter(
        {("model.embed_tokens", None): change}, tokens={"model.embed_tokens": TokenRows((63, 5), rows)}
    )
    found = read(adapt(source, [adapter]), by_path(source)["model.embed_tokens"])
    wanted = MADE["model.embed_tokens.weight"] + 1
    wanted[[63, 5]] = rows
    np.testing.assert_array_equal(found, wanted)


def test_adapters_apply_in_their_order_each_to_what_the_last_one_left(source: TensorSource) -> None:
    q = by_path(source)[Q]
    lora, dora = (
        {(Q, None): random_changes(CONFIG, ("self_attn.q_proj",), seed=seed, dora=seed == 2)[Q, None]}
        for seed in (1, 2)
    )
    whole = np.random.default_rng(2).standard_normal((128, 128)).astype(np.float32)
    kept = whole.copy()

    def after(*adapters: Adapter) -> Floats:
        return read(adapt(source, adapters), q)

    def by_hand(values: Any, *changes: Changes) -> Any:
        for each in changes:
            values = changed(values, each[Q, None])
        return values

    first, second, third = MemoryAdapter(lora), MemoryAdapter(dora), MemoryAdapter(whole={Q: whole})
    was = MADE[f"{Q}.weight"]
    close_to(after(first, second), by_hand(was, lora, dora))
    close_to(after(second, first), by_hand(was, dora, lora))
    close_to(after(first, third), whole)
    close_to(after(first, third, second), by_hand(whole, dora))
    close_to(after(third, third, first, first), by_hand(whole, lora, lora))
    # What an adapter gives is its own.
    np.testing.assert_array_equal(whole, kept)


def test_a_row_of_zeros_stays_zero_whatever_its_magnitude() -> None:
    weights = np.zeros((3, 4), np.float32)
    weights[1] = [3, 0, 4, 0]
    fuse(weights, LowRank(np.zeros((1, 4), np.float32), np.zeros((3, 1), np.float32), np.full(3, 10, np.float32)))
    np.testing.assert_allclose(weights, [[0] * 4, [6, 0, 8, 0], [0] * 4])


def test_a_dense_model_has_one_expert(tmp_path: Path) -> None:
    config = CONFIG | dense_config()
    made = weights(config)
    changes = random_changes(config, ("mlp.down_proj",))
    with open_source(make_checkpoint(tmp_path / "dense", **dense_config())) as source:
        matrix = by_path(source)["model.layers.1.mlp.down_proj"]
        adapted = adapt(source, [MemoryAdapter(changes)])
        close_to(read(adapted, matrix), changed(made[f"{matrix.path}.weight"], changes[matrix.path, 0]))


def test_it_stays_the_source_in_everything_else(source: TensorSource) -> None:
    adapter = MemoryAdapter(random_changes(CONFIG, EVERYTHING), notes=("something is ignored",), name="mine")
    adapted = adapt(source, [adapter])
    assert adapted.notes == (*source.notes, "adapter mine: something is ignored")
    assert small_files(adapted) == small_files(source)
    assert adapted.files.describe() == source.files.describe()
    assert adapted.files.nbytes == source.files.nbytes
    assert (adapted.config, adapted.entries, adapted.folder) == (source.config, source.entries, source.folder)
    assert not isinstance(adapted, PackedSource)
    assert main_dtype(adapted) == "F32"
    q = by_path(source)[Q]
    assert (adapted.name(q), adapted.file(q)) == (source.name(q), source.file(q))
    with adapted:
        pass
    assert adapter.closed


def given(monkeypatch: pytest.MonkeyPatch, source: TensorSource, *adapters: MemoryAdapter) -> AdaptedSource:
    """``open_adapted``, of adapters that lie in memory."""
    waiting = iter(adapters)
    monkeypatch.setattr("mlx_mixtral_convert.sources.adapted.open_adapter", lambda *_, **__: next(waiting))
    return open_adapted(source, [AdapterSource("memory") for _ in adapters])


def test_an_adapter_with_a_bias_cannot_be_fused(source: TensorSource, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = random_changes(CONFIG, (DOWN,))
    place = f"model.layers.1.{DOWN}", 3
    change = changes[place]
    changes[place] = LowRank(change.a, change.b, bias=np.zeros(128, np.float32))
    first, second = MemoryAdapter(random_changes(CONFIG, (DOWN,))), MemoryAdapter(changes, name="mine")
    with pytest.raises(ConversionError) as caught:
        given(monkeypatch, source, first, second)
    assert "adapter mine adds a bias to the output of model.layers.1.block_sparse_moe.switch_mlp.down_proj" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    assert first.closed
    assert second.closed


def test_what_cannot_be_read_is_known_before_anything_is_written(
    source: TensorSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Damaged(MemoryAdapter):
        def low_rank(self, path: str, expert: int | None = None) -> LowRank | None:
            if (path, expert) == (f"model.layers.1.{DOWN}", 3):
                raise NonFiniteWeightsError("NaN")
            return super().low_rank(path, expert)

    with pytest.raises(NonFiniteWeightsError):
        given(monkeypatch, source, Damaged(random_changes(CONFIG, (DOWN,))))
