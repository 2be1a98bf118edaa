"""Batches of a model that streams experts: rows by the plan's speeds, and a read that fails ends the rows it was for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_mixtral import Mixtral, SamplingParams, load
from mlx_mixtral.budget.slots import ModelSizes, Speeds
from mlx_mixtral.errors import CheckpointError, InvalidRequestError
from mlx_mixtral.generation.speculation.cost import ForwardCost
from mlx_mixtral.runtime.rows import check_limits, default_rows
from tests.generation.support import StorePrefixes, WatchedScheduler, prompt_of
from tests.generation.test_scheduler_constraints import Allowed


@pytest.fixture
def streamed(small: Path, small_model: Mixtral) -> Iterator[Mixtral]:
    with load(small, memory=small_model.min_memory_bytes) as model:
        assert model.module.is_streamed
        yield model


class _Faults:
    """Reads that fail while ``is_broken``."""

    def __init__(self, model: Mixtral, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_broken = False
        store = model.residency.store
        start = store.start

        def started(*args: Any) -> Any:
            if self.is_broken:
                raise CheckpointError("tensor cannot be read: Input/output error")
            return start(*args)

        monkeypatch.setattr(store, "start", started)


def test_a_failed_read_of_a_step_ends_its_rows_and_no_later_ones(
    streamed: Mixtral, small_model: Mixtral, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = _Faults(streamed, monkeypatch)
    store = StorePrefixes(10**8)
    watched = WatchedScheduler(streamed, max_rows=2, prefixes=store)
    running = [watched.submit(prompt_of(streamed, length), 9) for length in (20, 30)]
    waiting = watched.submit(prompt_of(streamed, 25), 9)
    for _ in range(3):
        watched.step()
    faults.is_broken = True
    watched.step()
    assert sorted(watched.errors) == sorted(watched.ended)
    assert set(running) <= set(watched.errors)
    assert all("Input/output error" in str(error) for error in watched.errors.values())
    # What they had in the cache is dropped: only whole prompts are kept.
    assert {len(tokens) for tokens in store.sequences} <= {20, 30}
    faults.is_broken = False
    if waiting in watched.errors:
        waiting = watched.submit(prompt_of(streamed, 25), 9)
    again = watched.submit(prompt_of(streamed, 20), 9)
    watched.run()
    for ticket, length in ((waiting, 25), (again, 20)):
        alone = small_model.generate(prompt_of(streamed, length), max_tokens=9, stop_token_ids=[])
        assert tuple(watched.tokens[ticket]) == alone.token_ids


def test_a_failed_read_of_a_prompt_ends_no_row_that_runs(
    streamed: Mixtral, small_model: Mixtral, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = _Faults(streamed, monkeypatch)
    watched = WatchedScheduler(streamed, prefill_chunk=32)
    running = watched.submit(prompt_of(streamed, 20), 12)
    for _ in range(2):
        watched.step()
    computing = watched.scheduler.submit_group([watched.request(prompt_of(streamed, 90), 4) for _ in range(2)])
    watched.step()
    catch_up = watched.scheduler._catch_up

    def caught_up(updates: Any) -> None:
        catch_up(updates)
        faults.is_broken = True

    monkeypatch.setattr(watched.scheduler, "_catch_up", caught_up)
    watched.step()
    monkeypatch.setattr(watched.scheduler, "_catch_up", catch_up)
    faults.is_broken = False
    assert sorted(watched.errors) == computing
    watched.run()
    alone = small_model.generate(prompt_of(streamed, 20), max_tokens=12, stop_token_ids=[])
    assert tuple(watched.tokens[running]) == alone.token_ids


def test_constraints_and_replaced_tokens_where_no_step_starts_early(streamed: Mixtral, small_model: Mixtral) -> None:
    found = []
    for model in (small_model, streamed):
        watched = WatchedScheduler(model)
        tickets = [
            watched.submit(prompt_of(model, 9), 8, constraint=Allowed([range(200, 256)], replaces={2: 8}, length=6)),
            watched.submit(prompt_of(model, 5), 8, temperature=0.9, seed=1),
        ]
        watched.run()
        found.append([watched.tokens[ticket] for ticket in tickets])
    assert found[0] == found[1]
    assert (found[0][0][2], len(found[0][0])) == (8, 6)


# 8x7B in half precision under a third of it, from a disk of 5 GB/s: published sizes.
SIZES = ModelSizes(
    trunk_bytes=3 * 10**9,
    expert_bytes=(352_321_536,) * 32,
    expert_file_bytes=(352_321_536,) * 32,
    kinds=(0,) * 32,
    num_experts=8,
    num_experts_per_tok=2,
)


@pytest.mark.parametrize(
    ("disk", "slots", "hit_rate", "rows"),
    [
        (3e9, 2, 0.3, 1),  # 1.4 of two experts a layer are read: 5 s
        (400e9, 2, 0.3, 8),
        (60e9, 2, 0.3, 2),
    ],
    ids=str,
)
def test_rows_are_as_many_as_the_plan_can_read_experts_for(disk: float, slots: int, hit_rate: float, rows: int) -> None:
    """By the formula: B rows touch 8 (1 - 0.75^B) experts a layer, of which those that are not there are read."""
    speeds = Speeds(disk_bytes_per_s=disk, memory_bytes_per_s=10e12, readback_s=0.0)
    cost = ForwardCost(SIZES, speeds, (slots,) * 32, (hit_rate,) * 32)

    class Plan:
        residency = object()

    found = default_rows(Plan(), cost)  # type: ignore[arg-type]

    def step_s(count: int) -> float:
        distinct = 8 * (1 - 0.75**count)
        return 32 * max(distinct * (1 - hit_rate), distinct - slots) * 352_321_536 / disk

    by_hand = max((count for count in range(1, 9) if count == 1 or step_s(count) <= 0.5), default=1)
    assert found == by_hand == rows


def test_a_resident_model_has_eight_rows(small_model: Mixtral, streamed: Mixtral) -> None:
    assert default_rows(small_model.engine.plan, small_model.engine.forward_cost()) == 8
    plan, cost = streamed.engine.plan, streamed.engine.forward_cost()
    assert default_rows(plan, cost, max_step_s=1e-12) == 1
    assert default_rows(plan, cost, max_step_s=1e12) == 8


@pytest.mark.parametrize("limits", [(0, 0.25), (True, 0.25), (2, 0), (2, "x"), (2, float("nan"))], ids=str)
def test_limits_that_are_none_are_refused(limits: tuple[Any, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"max_rows is|max_stall_s is"):
        check_limits(*limits)


def test_a_streamed_batch_has_the_bits_of_a_resident_one(streamed: Mixtral, small_model: Mixtral) -> None:
    prompts = [prompt_of(streamed, length) for length in (5, 20, 90, 33)]
    sampling = SamplingParams(logprobs=0)
    mx.synchronize()
    found = streamed.generate_batch(prompts, max_tokens=8, sampling=sampling, max_rows=3)
    for prompt, row in zip(prompts, found, strict=True):
        small_model.engine.prompt_cache.clear()
        alone = small_model.generate(prompt, max_tokens=8, sampling=sampling)
        assert (row.token_ids, row.logprobs) == (alone.token_ids, alone.logprobs)
