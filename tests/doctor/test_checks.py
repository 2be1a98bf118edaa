"""The doctor passes here, and each of its checks fails when the thing it is about is broken on purpose."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import Mixtral
from mlx_mixtral.bench import run as bench_run
from mlx_mixtral.cache.kv import KVCache
from mlx_mixtral.cache.storage import PlainStorage
from mlx_mixtral.cache.window import Window
from mlx_mixtral.demo import reference_path
from mlx_mixtral.doctor import CheckResult, run_doctor
from mlx_mixtral.doctor import checks as checks_module
from mlx_mixtral.doctor.checks import CHECKS, CheckFailedError
from mlx_mixtral.errors import CheckpointError
from mlx_mixtral.experts.pool import SlotPool
from mlx_mixtral.experts.store import ExpertStore
from mlx_mixtral.layers import cpu
from mlx_mixtral.layers import expert_bank as bank
from mlx_mixtral.layers.cpu import CpuProducts
from mlx_mixtral.layers.linear import StackedLinear
from mlx_mixtral.machine import bandwidth as bandwidth_module
from mlx_mixtral.machine.bandwidth import copy_rates, disk_bandwidth, memory_bandwidth
from mlx_mixtral.weights import dtypes

Patch = pytest.MonkeyPatch
NAMES = [check.name for check in CHECKS]
MIB = 2**20
# Room that the step's cache has here: attention over what it has on a GPU takes MLX's CPU backend seconds.
ROOM_TOKENS = 2**12
# Quantised products accumulate in 16 bits on MLX's CPU backend, at the edge of what a GPU is allowed. Routing is in float32
# whatever the type, and the whole model computes in the device's own.
NOT_IN_16_BITS = {
    "fused products", "gathered products", "resident against streamed", "routing", "decode step", "recorded logits"
}  # fmt: skip


def _run(name: str, dtype: str = "F32") -> str:
    return next(check for check in CHECKS if check.name == name).run(dtype)


def test_every_check_passes_on_this_machine_and_the_diagnosis_is_json(monkeypatch: Patch) -> None:
    """One run of everything, with small bandwidth measurements."""
    told: list[str] = []
    monkeypatch.setattr(checks_module, "ROOM_TOKENS", ROOM_TOKENS)
    monkeypatch.setattr("mlx_mixtral.doctor.memory_bandwidth", lambda: memory_bandwidth(4 * MIB, 2))
    monkeypatch.setattr("mlx_mixtral.doctor.disk_bandwidth", lambda: disk_bandwidth(8 * MIB))
    diagnosis = run_doctor(told.append)
    assert [(r.name, r.passed, r.measured) for r in diagnosis.results if not r.passed] == []
    assert diagnosis.passed
    assert [result.name for result in diagnosis.results] == NAMES
    assert told == [*NAMES, "bandwidths"]
    for result in diagnosis.results:
        assert result.measured
        assert result.failure_means
        assert result.seconds >= 0
    read = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
    assert read["passed"] is True
    assert read["mlx_version"] == mx.__version__  # type: ignore[attr-defined]
    assert read["device"]["kind"] == diagnosis.device.kind
    assert read["compute_dtype"] == diagnosis.compute_dtype
    assert [result["name"] for result in read["results"]] == NAMES
    assert set(read["results"][0]) == {"name", "passed", "measured", "failure_means", "seconds"}
    assert read["memory_bytes_per_s"] > 0
    assert read["disk_bytes_per_s"] > 0


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_IN_16_BITS])
def test_the_checks_of_single_pieces_also_pass_in_16_bits(name: str, dtype: str) -> None:
    assert _run(name, dtype)


def _copying_bytes_of(patch: Patch) -> None:
    real = dtypes.bytes_of
    patch.setattr(dtypes, "bytes_of", lambda array: real(array).copy())


def _scaled(patch: Patch, name: str) -> None:
    real = getattr(mx, name)
    patch.setattr(mx, name, lambda *arguments, **options: real(*arguments, **options) * 1.01)


def _one_format_wrong(patch: Patch, name: str, bits: int, group_size: int) -> None:
    real = getattr(mx, name)

    def wrong(*arguments: Any, **options: Any) -> mx.array:
        given = {value for value in (*arguments, *options.values()) if isinstance(value, int | str)}
        product = real(*arguments, **options)
        return product * 1.01 if {bits, group_size, "affine"} <= given else product

    patch.setattr(mx, name, wrong)


def _unsorted_on_the_way_back(patch: Patch) -> None:
    real, calls = mx.argsort, []

    def second_call_wrong(array: mx.array) -> mx.array:
        calls.append(array)
        return real(array)[::-1] if len(calls) % 2 == 0 else real(array)

    patch.setattr(mx, "argsort", second_call_wrong)


def _wrong_rows_of_groups(patch: Patch) -> None:
    """What MLX 0.31 and 0.32 give on GPUs for rows whose axis of length 1 was inserted: the first alone is right."""
    real = mx.gather_mm

    def grouped(x: mx.array, *rest: Any, sorted_indices: bool = False) -> mx.array:
        y = real(x, *rest, sorted_indices=sorted_indices)
        return mx.concatenate([y[:1], mx.roll(y, 1, -1)[1:]]) if sorted_indices else y

    patch.setattr(mx, "gather_mm", grouped)
    of_cpu = CpuProducts.gathered

    def on_cpu(self: CpuProducts, *arguments: Any, is_sorted: bool) -> mx.array:
        y = of_cpu(self, *arguments, is_sorted=is_sorted)
        return mx.concatenate([y[:1], mx.roll(y, 1, -1)[1:]]) if is_sorted and len(y) >= 128 else y

    patch.setattr(CpuProducts, "gathered", on_cpu)


def _blas_off(patch: Patch) -> None:
    real = cpu.write_product

    def product(x: Any, matrix: Any, rows: slice, out: Any) -> None:
        real(x, matrix, rows, out)
        out *= 1.01

    patch.setattr(cpu, "write_product", product)


def _blas_by_rows(patch: Patch) -> None:
    """What a BLAS does that has another kernel for more rows."""
    real = cpu.write_product

    def product(x: Any, matrix: Any, rows: slice, out: Any) -> None:
        real(x, matrix, rows, out)
        if len(x) > 40:
            out[:] = np.nextafter(out, np.float32(np.inf))

    patch.setattr(cpu, "write_product", product)


def _tokens_of_the_neighbour(patch: Patch) -> None:
    real, calls = mx.argsort, []

    def first_call_shifted(array: mx.array) -> mx.array:
        calls.append(array)
        order = real(array)
        return mx.roll(order, 1) if len(calls) % 2 else order

    patch.setattr(mx, "argsort", first_call_shifted)
    # The slots gathered are the shifted ones too, so make them the sorted ones: tokens meet other tokens' experts.
    whole = bank.ExpertBank._experts
    patch.setattr(
        bank.ExpertBank,
        "_experts",
        lambda self, x, slots, changes, is_sorted: whole(
            self, x, mx.sort(slots) if is_sorted else slots, changes, is_sorted=is_sorted
        ),
    )


def _wrong_slot(patch: Patch) -> None:
    class Wrong(StackedLinear):
        def __call__(self, x: mx.array, slots: mx.array, *, is_sorted: bool) -> mx.array:
            return super().__call__(x, (slots + 1) % self.weight.shape[0], is_sorted=is_sorted)

    patch.setattr(checks_module, "StackedLinear", Wrong)


def _rows_one_off(patch: Patch) -> None:
    real = checks_module.fill

    def shifted(reader: Any, fills: list[Any]) -> None:
        *most, last = fills
        moved = type(last)(last.array, last.row, last.dtype, last.info, last.start, last.stop - 1)
        real(reader, [*most, moved])

    patch.setattr(checks_module, "fill", shifted)


def _wrong_slot_of_a_pool(patch: Patch) -> None:
    real = SlotPool.slot
    patch.setattr(SlotPool, "slot", lambda self, key: (real(self, key) + 1) % self.size)


def _neighbour_read(patch: Patch) -> None:
    real = ExpertStore.start
    patch.setattr(
        ExpertStore,
        "start",
        lambda self, layer, expert, arrays, slot: real(self, layer, (expert + 1) % 8, arrays, slot),
    )


def _later_positions(patch: Patch) -> None:
    real = KVCache.lengths.fget  # type: ignore[attr-defined]
    patch.setattr(KVCache, "lengths", property(lambda self: real(self) + 1))


def _ring_one_off(patch: Patch) -> None:
    real = Window.places
    patch.setattr(Window, "places", lambda self, capacity, last: real(self, capacity, last - 1))


def _copied_caches(patch: Patch) -> None:
    real, kept = PlainStorage.scatter, []

    def held_elsewhere(self: PlainStorage, held: Any, *rest: Any) -> Any:
        kept.append(held)  # what something else holds, MLX may not write into
        return real(self, held, *rest)

    patch.setattr(PlainStorage, "scatter", held_elsewhere)


def _gelu(patch: Patch) -> None:
    patch.setattr(bank, "swiglu", lambda gate, up: gate * 0.5 * (1 + mx.erf(gate / math.sqrt(2))) * up)


def _swapped_halves(patch: Patch) -> None:
    real = bank.swiglu
    patch.setattr(bank, "swiglu", lambda gate, up: real(up, gate))


def _route(change: Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]) -> Callable[[Patch], None]:
    real = checks_module.route

    def broken(logits: mx.array, experts: int) -> tuple[mx.array, mx.array]:
        return change(*real(logits, experts), logits)

    return lambda patch: patch.setattr(checks_module, "route", broken)


def _recorded(change: Callable[[dict[str, Any]], None], tmp_path: Path, patch: Patch) -> None:
    arrays = dict(np.load(reference_path()))
    change(arrays)
    np.savez(tmp_path / "reference.npz", **arrays)
    patch.setattr(checks_module, "reference_path", lambda: tmp_path / "reference.npz")


def _altered_logits(arrays: dict[str, Any]) -> None:
    arrays["logits"] = arrays["logits"].copy()
    arrays["logits"][1, 3] = arrays["logits"][1, 3][::-1]


def _altered_greedy(arrays: dict[str, Any]) -> None:
    arrays["greedy_ids"] = arrays["greedy_ids"].copy()
    arrays["greedy_ids"][20] += 1


def _altered_weights(patch: Patch) -> None:
    real = checks_module.load

    def load(path: Any) -> Any:
        model = real(path)
        projection = model.module.layers[0].attention.o_proj
        projection.weight = projection.weight * 1.05
        return model

    patch.setattr(checks_module, "load", load)


BROKEN: list[tuple[str, str, str, Callable[[Patch], None]]] = [
    ("in-place fill", "a copy instead of the memory", "the device computes the sum 0; ", _copying_bytes_of),
    (
        "fused products",
        "1% off",
        "quantized_matmul 2-bit g64: relative error 1",
        lambda p: _scaled(p, "quantized_matmul"),
    ),
    (
        "fused products",
        "one format 1% off",
        "quantized_matmul 4-bit g128: relative error",
        lambda p: _one_format_wrong(p, "quantized_matmul", 4, 128),
    ),
    ("long products", "1% off", "70 rows, 2-bit g64: relative error 1", _blas_off),
    (
        "long products",
        "rows that depend on their number",
        "rows of a product depend on the rows next to them",
        _blas_by_rows,
    ),
    ("gathered products", "1% off", "gather_qmm 2-bit g64: relative error 1", lambda p: _scaled(p, "gather_qmm")),
    (
        "gathered products",
        "one format 1% off",
        "gather_qmm 6-bit g64: relative error",
        lambda p: _one_format_wrong(p, "gather_qmm", 6, 64),
    ),
    ("gathered products", "the next slot", "gather_qmm 2-bit g64: relative error", _wrong_slot),
    (
        "sorted gathering",
        "not put back in order",
        "sorted gathering 4-bit g64: relative error",
        _unsorted_on_the_way_back,
    ),
    (
        "sorted gathering",
        "tokens at other experts",
        "sorted gathering 4-bit g64: relative error",
        _tokens_of_the_neighbour,
    ),
    ("sorted gathering", "wrong rows", "sorted gathering unquantised: relative error", _wrong_rows_of_groups),
    (
        "sorted gathering",
        "never sorted",
        "128 pairs over 8 experts are not sorted",
        lambda p: p.setattr(checks_module, "gathers_sorted", lambda pairs, experts: False),
    ),
    ("slots from disk", "the next slot", "experts in other slots give different products", _wrong_slot),
    ("slots from disk", "a row not read", "experts in other slots give different products", _rows_one_off),
    ("resident against streamed", "another slot", "logits differ by up to", _wrong_slot_of_a_pool),
    ("resident against streamed", "wrong expert read", "logits differ by up to", _neighbour_read),
    (
        "resident against streamed",
        "a budget that holds everything",
        "nothing was streamed",
        lambda p: p.setattr(Mixtral, "min_memory_bytes", property(lambda self: 10**9)),
    ),
    ("compiled against plain", "GELU", "the compiled SwiGLU: relative error", _gelu),
    ("compiled against plain", "gate and up swapped", "the compiled SwiGLU: relative error", _swapped_halves),
    (
        "routing",
        "another expert",
        "the selected experts are not the two with the largest logits",
        _route(lambda selected, weights, logits: ((selected + 1) % 8, weights)),
    ),
    (
        "routing",
        "one token's second choice",
        "the selected experts are not the two with the largest logits",
        _route(
            lambda selected, weights, logits: (
                mx.concatenate([selected[:-1], mx.argsort(logits[-1:], axis=-1)[:, -3:-1].astype(selected.dtype)]),
                weights,
            )
        ),
    ),
    (
        "routing",
        "equal weights",
        "the weights of a token's experts are not the softmax of their logits",
        _route(lambda selected, weights, logits: (selected, mx.full(weights.shape, 0.5))),
    ),
    (
        "routing",
        "weights swapped",
        "the weights of a token's experts are not the softmax of their logits",
        _route(lambda selected, weights, logits: (selected, weights[:, ::-1])),
    ),
    (
        "routing",
        "weights not renormalised",
        "the weights of a token's experts are not the softmax of their logits",
        _route(
            lambda selected, weights, logits: (
                selected,
                mx.take_along_axis(mx.softmax(logits, axis=-1), selected, axis=-1),
            )
        ),
    ),
    ("decode step", "a position too far", "steps with plain numbers: relative error", _later_positions),
    ("decode step", "keys in the wrong columns", "steps with a full ring with sinks: relative error", _ring_one_off),
    ("decode step", "a copy of the cache", "the cache is copied, not written in place", _copied_caches),
    ("recorded logits", "wrong rows", "of a text of 64 tokens read at once, ", _wrong_rows_of_groups),
    ("recorded logits", "other weights", "nats from the recorded logits; at most 1e-07", _altered_weights),
]


@pytest.mark.parametrize(
    ("name", "said", "break_it"),
    [pytest.param(name, said, break_it, id=f"{name}: {what}") for name, what, said, break_it in BROKEN],
)
def test_a_check_fails_when_its_property_is_broken(
    monkeypatch: Patch, name: str, said: str, break_it: Callable[[Patch], None]
) -> None:
    monkeypatch.setattr(checks_module, "ROOM_TOKENS", ROOM_TOKENS)
    break_it(monkeypatch)
    with pytest.raises(CheckFailedError) as caught:
        _run(name)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_altered_logits, "nats from the recorded logits; at most 1e-07"),
        (_altered_greedy, "greedy tokens diverge from the recorded ones after 23 of 24"),
    ],
)
def test_the_whole_model_is_held_to_the_recording(
    monkeypatch: Patch, tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    _recorded(change, tmp_path, monkeypatch)
    with pytest.raises(CheckFailedError) as caught:
        _run("recorded logits")
    assert said in str(caught.value)


def test_every_check_is_broken_above() -> None:
    assert {name for name, *_ in BROKEN} == set(NAMES)


def _only(patch: Patch, run: Callable[[str], str]) -> CheckResult:
    """The result of a doctor that has one check, ``run``."""
    patch.setattr("mlx_mixtral.doctor.CHECKS", (checks_module.Check("the one", "bad news", run),))
    patch.setattr("mlx_mixtral.doctor.memory_bandwidth", lambda: 1.0)
    patch.setattr("mlx_mixtral.doctor.disk_bandwidth", lambda: 1.0)
    diagnosis = run_doctor()
    (result,) = diagnosis.results
    assert diagnosis.passed == result.passed
    assert diagnosis.to_dict()["passed"] == result.passed
    return result


@pytest.mark.parametrize(
    ("error", "measured"),
    [
        (CheckFailedError("off by 7"), "off by 7"),
        (CheckpointError("no file"), "CheckpointError: no file"),
        (RuntimeError("[metal] out of memory"), "RuntimeError: [metal] out of memory"),
        (ValueError("bad bits"), "ValueError: bad bits"),
        (TypeError("no such argument"), "TypeError: no such argument"),
        (KeyError("logits"), "KeyError: 'logits'"),
    ],
)
def test_a_check_that_fails_or_breaks_down_counts_as_failed(
    monkeypatch: Patch, error: Exception, measured: str
) -> None:
    def run(dtype: str) -> str:
        raise error

    result = _only(monkeypatch, run)
    assert (result.passed, result.measured, result.failure_means) == (False, measured, "bad news")


def test_an_interrupt_is_not_a_failed_check(monkeypatch: Patch) -> None:
    def run(dtype: str) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _only(monkeypatch, run)


def test_checks_are_run_in_the_type_the_device_computes_in(monkeypatch: Patch) -> None:
    monkeypatch.setattr("mlx_mixtral.doctor.compute_dtype", lambda requested, device: f"{requested} type")
    assert _only(monkeypatch, lambda dtype: f"ran in {dtype}").measured == "ran in auto type"


def test_names_and_meanings_are_distinct() -> None:
    assert len(set(NAMES)) == len(CHECKS)
    assert len({check.failure_means for check in CHECKS}) == len(CHECKS)


def test_bandwidths_are_positive_finite_rates_at_any_size() -> None:
    for rate in (
        memory_bandwidth(MIB, 1),
        memory_bandwidth(3 * MIB, 2),
        disk_bandwidth(bandwidth_module.READ_BYTES, 1),
        disk_bandwidth(2 * bandwidth_module.READ_BYTES, 8),
    ):
        assert math.isfinite(rate)
        assert rate > 0


def test_bench_and_doctor_measure_copying_alike(monkeypatch: Patch) -> None:
    """On the CPU into memory that was written before: fresh pages would be what is measured."""
    copied: list[tuple[int, int]] = []
    copyto = np.copyto
    monkeypatch.setattr(np, "copyto", lambda to, of: (copied.append((id(to), of.nbytes)), copyto(to, of))[1])
    assert len(copy_rates(MIB, 3)) == 3
    assert memory_bandwidth(MIB, 2) > 0
    assert [nbytes for _, nbytes in copied] == [MIB] * 5
    assert len({target for target, _ in copied[:3]}) == 1
    assert bench_run.copy_rates is copy_rates


def test_the_median_of_the_memory_rates_is_reported(monkeypatch: Patch) -> None:
    ticks = iter([0.0, 1.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr(bandwidth_module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert memory_bandwidth(1024, 3) == 2 * 1024 / 2.0


def test_the_disk_rate_counts_the_bytes_read(monkeypatch: Patch) -> None:
    ticks = iter([5.0, 7.0])
    monkeypatch.setattr(bandwidth_module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert disk_bandwidth(8 * MIB, 2) == 4 * MIB
