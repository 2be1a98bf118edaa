"""Masks in a batch: each row has its own, made while the forward computes; a constraint ends its row and no other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlx_mixtral import Mixtral, SamplingParams
from mlx_mixtral.generation.constrained import decode_constrained
from mlx_mixtral.generation.drawing import draw
from mlx_mixtral.generation.loop import read_token
from mlx_mixtral.generation.request import Request
from mlx_mixtral.generation.rows import BatchRow
from mlx_mixtral.generation.sampling import Sampled, Sampler
from mlx_mixtral.generation.stats import Token
from mlx_mixtral.model.step import DecodeStep
from tests.generation.support import WatchedScheduler, prompt_of


class Allowed:
    """Each token is one of a set: the n-th of ``sets``, the last one from there on. Words without one are left as they are.

    Args:
        length: tokens after which the text is whole.
        replaces: tokens that another one takes the place of.
        events: told what is asked, as it is asked.
        fails: what raises at which token, from 0: ``("mask", n)`` or ``("accept", n)``.
    """

    def __init__(
        self,
        sets: Sequence[Sequence[int]],
        *,
        length: int = 1000,
        replaces: dict[int, int] | None = None,
        events: list[str] | None = None,
        fails: tuple[str, int] | None = None,
    ) -> None:
        self.sets, self.length, self.replaces = sets, length, replaces or {}
        self.events, self.fails = events, fails
        self.seen: list[int] = []

    def _check(self, what: str) -> None:
        if self.events is not None:
            self.events.append(what)
        if self.fails == (what, len(self.seen)):
            raise ValueError(f"{what} fails")

    def mask_into(self, row: npt.NDArray[np.int32]) -> None:
        self._check("mask")
        for token in self.sets[min(len(self.seen), len(self.sets) - 1)]:
            row[token // 32] |= np.int32(np.uint32(1 << token % 32).view(np.int32))

    def accept(self, token: int) -> int:
        self._check("accept")
        self.seen.append(self.replaces.get(len(self.seen), token))
        return self.seen[-1]

    @property
    def is_complete(self) -> bool:
        return len(self.seen) >= self.length

    @property
    def was_cut(self) -> bool:
        return bool(self.replaces) and self.is_complete

    def fork(self) -> Self:
        raise AssertionError("a row without speculation forks nothing")


EVEN, HIGH = range(4, 256, 2), range(200, 256)


def _alone(model: Mixtral, request: Request) -> list[int]:
    context = WatchedScheduler(model).context
    return [token.token_id for token in decode_constrained(context, request, model.make_cache())]


def _request(model: Mixtral, prompt: list[int], max_tokens: int, constraint: Any, **params: Any) -> Request:
    sampler = Sampler(SamplingParams(**params), prompt, model.config.vocab_size)
    return Request(prompt, max_tokens, sampler, constraint=constraint)


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.9, "seed": 3}, {"repetition_penalty": 1.3}, {"logprobs": 2}], ids=str
)
def test_constrained_rows_equal_themselves_alone(small_model: Mixtral, params: dict[str, Any]) -> None:
    """Beside rows with another mask and without one; the top bit of a word, which is its sign, counts too."""
    prompts = [prompt_of(small_model, length) for length in (5, 9, 40)]
    sets = [[[31, 63, 95, 255], EVEN], [HIGH], None]
    wanted, watched = [], WatchedScheduler(small_model)
    tickets = []
    for prompt, own in zip(prompts, sets, strict=True):
        wanted.append(
            list(small_model.generate(prompt, max_tokens=12, sampling=SamplingParams(**params)).token_ids)
            if own is None
            else _alone(small_model, _request(small_model, prompt, 12, Allowed(own), **params))
        )
        tickets.append(watched.submit(prompt, 12, constraint=None if own is None else Allowed(own), **params))
    watched.run()
    assert [watched.tokens[ticket] for ticket in tickets] == wanted
    assert set(wanted[0][1:]) <= set(EVEN)
    assert wanted[0][0] in (31, 63, 95, 255)
    assert set(wanted[1]) <= set(HIGH)


def test_masks_are_made_while_the_forward_computes(small_model: Mixtral) -> None:
    """The forward of the next token is scheduled before the last one is read, and drawn from when the masks are there."""
    events: list[str] = []
    step = DecodeStep(small_model.module, compiled=False)

    def recorded(tokens: mx.array, cache: Any) -> mx.array:
        events.append("forward")
        return step(tokens, cache)

    watched = WatchedScheduler(small_model, step=recorded)
    watched.submit(prompt_of(small_model, 5), 4, constraint=Allowed([EVEN], events=events))
    watched.submit(prompt_of(small_model, 6), 4)
    watched.step()
    assert events == ["mask", "forward", "accept", "mask"]
    watched.step()
    assert events[4:] == ["forward", "accept", "mask"]
    watched.step()
    watched.step()
    assert events[7:] == ["forward", "accept", "mask", "accept"]
    assert watched.scheduler.is_idle


def test_rows_without_masks_lose_no_synchronisation(small_model: Mixtral, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their next token is drawn before the last one is read."""
    events: list[str] = []

    def drawn(rows: list[BatchRow], logits: mx.array) -> mx.array:
        events.append("draw")
        return draw(rows, logits)

    def read(sampled: Sampled) -> Token:
        events.append("read")
        return read_token(sampled)

    monkeypatch.setattr("mlx_mixtral.generation.running.draw", drawn)
    monkeypatch.setattr("mlx_mixtral.generation.rows.read_token", read)
    watched = WatchedScheduler(small_model)
    watched.submit(prompt_of(small_model, 5), 3)
    for _ in range(3):
        watched.step()
    assert events == ["draw", "draw", "read", "draw", "read", "read"]


def test_a_whole_text_ends_its_row_without_an_end_token(small_model: Mixtral) -> None:
    watched = WatchedScheduler(small_model)
    ending = watched.submit(prompt_of(small_model, 5), 50, constraint=Allowed([EVEN], length=3))
    other = watched.submit(prompt_of(small_model, 6), 6)
    for _ in range(3):
        found = watched.step()
    last = next(update for update in found if update.ticket == ending)
    assert last.is_last
    assert last.token is not None
    assert last.token.end == "stop"
    watched.step()
    assert watched.scheduler.running == 1
    watched.run()
    assert [len(watched.tokens[ticket]) for ticket in (ending, other)] == [3, 6]


@pytest.mark.parametrize("fails", [("mask", 0), ("mask", 2), ("accept", 0), ("accept", 2)], ids=str)
def test_a_constraint_that_errs_ends_only_its_row(small_model: Mixtral, fails: tuple[str, int]) -> None:
    prompts = [prompt_of(small_model, length) for length in (5, 8, 30)]
    sampling = SamplingParams(logprobs=0)
    small_model.engine.prompt_cache.clear()
    alone = [small_model.generate(prompt, max_tokens=8, sampling=sampling) for prompt in prompts]
    watched = WatchedScheduler(small_model)
    first = watched.submit(prompts[0], 8, logprobs=0)
    wrong = watched.submit(prompts[1], 8, constraint=Allowed([EVEN], fails=fails), logprobs=0)
    third = watched.submit(prompts[2], 8, logprobs=0)
    logprobs: dict[int, list[float | None]] = {}
    while not watched.scheduler.is_idle:
        for update in watched.step():
            if update.token is not None:
                logprobs.setdefault(update.ticket, []).append(update.token.logprob)
    assert str(watched.errors[wrong]) == f"{fails[0]} fails"
    assert list(watched.errors) == [wrong]
    assert len(watched.tokens[wrong]) == fails[1]
    for ticket, row in ((first, alone[0]), (third, alone[2])):
        assert tuple(watched.tokens[ticket]) == row.token_ids
        assert tuple(logprobs[ticket]) == row.logprobs


@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.8, "seed": 4, "repetition_penalty": 1.2, "logprobs": 1}], ids=str
)
def test_a_token_that_takes_the_place_of_another_is_what_the_row_goes_on_with(
    small_model: Mixtral, place: int, params: dict[str, Any]
) -> None:
    """The oracle is the same constraint alone, where the forward that had begun is taken back."""
    prompts = [prompt_of(small_model, length) for length in (5, 250)]

    def constraint() -> Allowed:
        return Allowed([HIGH], replaces={place: 8, place + 1: 10})

    wanted = [_alone(small_model, _request(small_model, prompt, 8, constraint(), **params)) for prompt in prompts]
    plain = small_model.generate(prompts[0], max_tokens=8, sampling=SamplingParams(**params), stop_token_ids=[])
    watched = WatchedScheduler(small_model)
    tickets = [watched.submit(prompt, 8, constraint=constraint(), **params) for prompt in prompts]
    beside = watched.submit(prompts[0], 8, **params)
    watched.run()
    assert [watched.tokens[ticket] for ticket in tickets] == wanted
    assert [row[place : place + 2] for row in wanted] == [[8, 10]] * 2
    assert tuple(watched.tokens[beside]) == plain.token_ids


def test_what_a_processor_raises_ends_only_its_row(small_model: Mixtral) -> None:
    def broken(ids: mx.array, logits: mx.array) -> mx.array:
        if ids.size == 8:
            raise KeyError("broken")
        return logits

    alone = small_model.generate(prompt_of(small_model, 9), max_tokens=6, stop_token_ids=[])
    watched = WatchedScheduler(small_model)
    wrong = watched.submit(prompt_of(small_model, 6), 6, processors=[broken])
    other = watched.submit(prompt_of(small_model, 9), 6)
    watched.run()
    assert isinstance(watched.errors[wrong], KeyError)
    assert len(watched.tokens[wrong]) == 2
    assert tuple(watched.tokens[other]) == alone.token_ids


def test_masks_and_processors_go_together(small_model: Mixtral) -> None:
    def raises_low(ids: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.size) < 100, logits + 100, logits)

    watched = WatchedScheduler(small_model)
    ticket = watched.submit(prompt_of(small_model, 6), 6, processors=[raises_low], constraint=Allowed([HIGH], length=4))
    watched.run()
    assert set(watched.tokens[ticket]) <= set(HIGH)
    assert len(watched.tokens[ticket]) == 4
