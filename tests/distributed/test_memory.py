"""What a machine of a group takes of memory: its share, no more while it loads, and its budget while all generate."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mlx_mixtral import load
from mlx_mixtral.distributed.link import Link
from mlx_mixtral.distributed.shares import Share
from mlx_mixtral.runtime.prompt_cache import DEFAULT_KEPT_BYTES, PromptCache
from mlx_mixtral_convert import Recipe, convert
from tests.benchmarks.several_machines_memory import reports
from tests.shared import SharedFolders

BUDGET = 16_000_000
OPTIONS = {"device": "cpu", "context": 256, "shares": [2, 1], "dtype": "float32"}


@pytest.fixture
def packed(tiny: Path, shared: SharedFolders) -> Path:
    return shared("several packed", lambda place: convert(tiny, place, recipe=Recipe(bits=4)))


@pytest.mark.parametrize("split", ["experts", "layers"])
def test_a_machine_holds_its_share_and_never_more_while_it_loads(packed: Path, split: str) -> None:
    with load(packed, device="cpu", dtype="float32") as whole:
        total, config = whole.nbytes, whole.config
    found = reports(packed, 2, OPTIONS | {"split": split, "memory": None})
    trunk = [each["weights"] - each["expert_bytes"] for each in found]
    experts = sum(each["expert_bytes"] for each in found)
    if split == "layers":
        assert sum(each["held"] for each in found) == total
    else:
        assert trunk[0] + experts == total
    parts = config.num_hidden_layers if split == "layers" else config.intermediate_size / 64
    for each, share in zip(found, (2 / 3, 1 / 3), strict=True):
        assert each["expert_bytes"] / experts == pytest.approx(share, abs=1 / parts)
        assert each["held"] == each["resident"] == each["weights"]
        assert each["active"] == pytest.approx(each["weights"], rel=0.02)
        assert each["filling"] <= 1.05 * each["weights"]
        if each["read"]:
            # The columns of down are read in whole rows: a third of the experts' bytes on every machine.
            part = share + 1 / parts
            read = part if split == "layers" else 1 / 3 + 2 / 3 * part
            assert each["read"] <= read * experts + each["weights"] - each["expert_bytes"] + 2e6


@pytest.mark.parametrize("split", ["experts", "layers"])
def test_every_machine_keeps_to_its_budget(tiny: Path, split: str) -> None:
    """Prompts that are kept included: every generation but the first goes on from the one before."""
    found = reports(tiny, 2, OPTIONS | {"split": split, "memory": BUDGET})
    assert found[0]["held"] < found[0]["weights"]
    for each in found:
        assert each["budget"] == BUDGET
        assert each["generating"] <= BUDGET


def plan(**fields: Any) -> Any:
    return SimpleNamespace(is_bound=False, kv_bytes=0, **fields)


def test_no_machine_keeps_more_of_prompts_than_what_was_given() -> None:
    """The leader bounds what is kept by its own part, and another one may have three times as many layers."""
    shares = [Share(0, 2, "layers", range(2), None), Share(1, 2, "layers", range(2, 8), None)]
    for rank, share in ((0, 1 / 3), (1, 1.0)):
        link = Link(cast(Any, SimpleNamespace(rank=rank)), shares)
        assert PromptCache(plan(), 300, str, link=link).kept.limit_bytes == 300 * share
        assert PromptCache(plan(), None, str, link=link).kept.limit_bytes == int(DEFAULT_KEPT_BYTES * share)
