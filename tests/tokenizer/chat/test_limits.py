"""The bounds of one rendering themselves, at their full size; what templates do with a part of them is in test_sandbox."""

from __future__ import annotations

import pytest
from jinja2.utils import Namespace

from mlx_mixtral.tokenizer.chat import limits
from mlx_mixtral.tokenizer.chat.limits import Budget, Counted, TemplateLimitError

# A conversation of a thousand characters may build values of so many, and use so many in all: a template that goes to the
# bounds holds some tens of megabytes.
LARGEST, ALL = 2_004_000, 20_064_000


def test_no_value_may_be_larger_than_two_million_and_four_times_the_conversation() -> None:
    Budget(1000).allow(LARGEST)
    with pytest.raises(TemplateLimitError, match=f"builds a value of {LARGEST + 1} characters"):
        Budget(1000).allow(LARGEST + 1)


def test_all_steps_and_characters_together_are_bounded() -> None:
    budget = Budget(1000)
    for _ in range(10):
        budget.allow(LARGEST - 1)
    budget.charge(ALL - 10 * LARGEST)
    with pytest.raises(TemplateLimitError, match="loops too often or produces too much"):
        budget.charge(1)


@pytest.mark.parametrize("wrap", [lambda x: [x, x], lambda x: (x, x), lambda x: {"a": x, "b": x}.values()])
def test_shared_parts_weigh_each_time_they_appear(wrap: object) -> None:
    value: object = "x" * 999
    for _ in range(10):
        value = wrap(value)  # type: ignore[operator]
    weight = Budget(1000).weigh(value)
    assert 1024 * 1000 <= weight <= 1024 * 1000 + 8 * 2 * 1024
    with pytest.raises(TemplateLimitError, match=f"more than {LARGEST}"):
        Budget(1000).weigh(wrap(wrap(value)))  # type: ignore[operator]


def test_what_is_weighed_is_charged() -> None:
    budget = Budget(0)
    for _ in range(19):
        budget.weigh("x" * 999_999)
    with pytest.raises(TemplateLimitError, match="produces too much"):
        budget.weigh(["x" * 999_999])
    steps = Budget(0)
    for _ in range(100):
        steps.weigh("x" * 999_999, charge_text=False)


def test_a_namespace_weighs_what_it_holds() -> None:
    with pytest.raises(TemplateLimitError, match="more than"):
        Budget(0).weigh(Namespace(a="x" * 1_500_000, b="x" * 1_500_000))


def test_each_element_of_a_loop_is_charged() -> None:
    budget = Budget(0)
    assert len(Counted(range(5), budget, 10)) == 5
    with pytest.raises(TemplateLimitError):
        for _ in Counted(range(10), budget, 3_000_000):
            pass


def test_time_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    budget = Budget(0)
    now[0] += limits.MAX_SECONDS
    budget.charge(1)
    now[0] += 0.1
    with pytest.raises(TemplateLimitError, match="longer than 10 s"):
        budget.charge(1)
