"""Shares whose experts are read from disk: the bits of a share in memory, whatever the budget, and no more than its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral.budget.slots import Speeds
from mlx_mixtral.distributed.shares import Share
from mlx_mixtral.experts.residency import Residency
from mlx_mixtral.experts.trace import RoutingTrace
from mlx_mixtral.machine.device import current_device
from mlx_mixtral.model import planning
from mlx_mixtral.model.planning import TRACE_FILE, make_planner
from mlx_mixtral.model.transformer import MixtralModel
from mlx_mixtral.runtime.filling import load_module

from .conftest import LAYERS, SHAPE, MakeFolder
from .support import EQUAL, UNEVEN, array, builder, built, rewritten, shares_of, tensors_of

STEPS = [mx.array([[1, *range(20, 29)]], mx.int32), *(mx.array([[token]], mx.int32) for token in (7, 99, 200, 7))]
SPEEDS = Speeds(5e7, 1e10, 2e-5)
PACKINGS = ["hugging face", "fused", "3 bits", "6 bits", "mixed", "mxfp4", "packed apart"]


def _states(module: MixtralModel) -> list[np.ndarray[Any, Any]]:
    """Hidden states behind the layers held, of a prompt and a few tokens; what enters is as good as any."""
    cache, out = module.make_cache(), []
    for index, tokens in enumerate(STEPS):
        length = tokens.shape[1]
        x = mx.random.normal((1, length, SHAPE["hidden_size"]), key=mx.random.key(index))
        out.append(array(module.stage(x, cache.chunk(1, length, module.frequencies(cache.length + length)))))
        cache.advance(length)
    return out


def _assert_same(got: Sequence[np.ndarray[Any, Any]], wanted: Sequence[np.ndarray[Any, Any]]) -> None:
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("page_cache", [True, False])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_streamed_share_has_the_bits_of_one_in_memory(
    folder_of: MakeFolder, packing: str, page_cache: bool, disk_path: Path
) -> None:
    """From a disk, where there is one that bypasses the page cache."""
    source = folder_of(packing)
    rewritten(source, disk_path / "model", tensors_of(source))
    for share in shares_of(source, "experts", UNEVEN):
        wanted = _states(built(source, share).module)
        kinds = builder(source, share).sizes().kinds
        slots, overflow = [2, 0, 4], {kinds[1]: 2}
        made = built(disk_path / "model", share, slots, overflow, page_cache=page_cache)
        _assert_same(_states(made.module), wanted)
        counters, sizes = made.builder.store.counters, made.builder.sizes()
        assert counters.misses > 8
        # Every layer's experts are as long on disk, but for those that are packed otherwise.
        least, most = min(sizes.expert_file_bytes), max(sizes.expert_file_bytes)
        assert counters.misses * least <= counters.bytes_read <= counters.misses * most
        made.builder.store.close()


@pytest.mark.parametrize("split", ["experts", "layers"])
def test_budgets_change_under_a_share(folder_of: MakeFolder, split: str) -> None:
    """The last machine: its first layer is not the checkpoint's, where layers are shared out."""
    folder = folder_of("4 bits")
    share = shares_of(folder, split, EQUAL)[-1]
    wanted = _states(built(folder, share).module)
    made = builder(folder, share)
    planner = make_planner(made, current_device(), speeds=SPEEDS)
    needs = planner.needs(256)
    module, residency = load_module(made, planner.plan(needs.min_bytes, 256), None)
    assert len(residency.slots) == len(module.layers) == len(share.layers)
    _assert_same(_states(module), wanted)
    assert residency.is_streamed
    assert residency.misses
    _assert_resident(residency, module)
    for budget in (needs.resident_bytes, needs.min_bytes + made.sizes().expert_bytes[0], needs.resident_bytes):
        residency.change(planner.plan(budget, 256), made.bank)
        _assert_same(_states(module), wanted)
        assert residency.is_streamed == (budget < needs.resident_bytes)
        _assert_resident(residency, module)
    residency.close()


def _assert_resident(residency: Residency, module: MixtralModel) -> None:
    assert module.nbytes == residency.resident_bytes


def test_needs_are_a_shares_own(floats: Path) -> None:
    def needs(share: Share | None) -> Any:
        return make_planner(builder(floats, share), current_device(), speeds=SPEEDS).needs(512)

    whole, stages = needs(None), [needs(share) for share in shares_of(floats, "layers", (1, 1, 1))]
    # Keys and values of its layers, and of one that grows.
    assert [3 * each.kv_bytes for each in stages] == [whole.kv_bytes * 2 * 3 // 4] * 3
    cut = [needs(share) for share in shares_of(floats, "experts", EQUAL)]
    assert [each.kv_bytes for each in cut] == [whole.kv_bytes] * 2
    assert all(each.working_bytes(64) < whole.working_bytes(64) for each in cut)
    # Beside the buffer of a read, there is one for whole rows, of which columns are kept.
    assert all(each.reading_bytes > whole.reading_bytes for each in cut)
    assert all(each.reading_bytes == whole.reading_bytes for each in stages)


def test_hit_rates_are_those_of_the_layers_held(floats: Path, tmp_path: Path) -> None:
    rewritten(floats, tmp_path / "out", tensors_of(floats))
    experts = np.random.default_rng(3).random((50, LAYERS, SHAPE["num_local_experts"])).argsort(axis=2)
    RoutingTrace(experts[..., :2].astype(np.uint16), SHAPE["num_local_experts"]).save(tmp_path / "out" / TRACE_FILE)
    rates: Callable[[Any], np.ndarray[Any, Any]] = planning._hit_rates
    whole = rates(builder(tmp_path / "out"))
    parts = [rates(builder(tmp_path / "out", share)) for share in shares_of(floats, "layers", EQUAL)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    (tmp_path / "out" / TRACE_FILE).unlink()
    published = [rates(builder(tmp_path / "out", share)) for share in (None, *shares_of(floats, "layers", EQUAL))]
    np.testing.assert_array_equal(np.concatenate(published[1:]), published[0])


def test_speeds_are_measured_on_the_layers_held(folder_of: MakeFolder) -> None:
    for split in ("experts", "layers"):
        made = builder(folder_of("4 bits"), shares_of(folder_of("4 bits"), split, EQUAL)[-1])
        measured = planning._measured(made)
        assert measured.disk_bytes_per_s > 0
        made.store.close()
