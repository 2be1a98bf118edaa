"""Checks of a group of machines: what a sum over them costs, and whether it is the same on each."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mixtral.distributed.group import Group
from mlx_mixtral.doctor.checks import CheckFailedError
from mlx_mixtral.runtime.joining import sum_seconds

__all__ = ["SLOW_SUM_S", "GroupDiagnosis", "diagnose_group"]

SLOW_SUM_S = 2e-3
"""A sum of a token's states that takes longer is one over Wi-Fi, as a rule."""
SMALL, LARGE = 4096, 4 * 2**20


@dataclass(frozen=True)
class GroupDiagnosis:
    """Of the leader: times are medians."""

    machines: int
    sum_s: float
    """Of 4,096 float32 numbers, the states of a token of 8x7B."""
    bytes_per_s: float
    """Of a sum of 16 MiB: its size by its time."""

    @property
    def is_slow(self) -> bool:
        return self.sum_s > SLOW_SUM_S

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def diagnose_group(group: Group) -> GroupDiagnosis:
    """Measure; every machine must come here.

    Raises:
        CheckFailedError: a sum is wrong, or differs between machines.
        GroupError: a machine was lost.
    """
    with group.deadline.armed("the other machines"):
        small, large = sum_seconds(group, SMALL), sum_seconds(group, LARGE)
        own = np.random.default_rng(group.rank).standard_normal(SMALL).astype(np.float32)
        total = group.sum(mx.array(own))
        mx.eval(total)
    found = np.asarray(total)
    expected = sum(np.random.default_rng(rank).standard_normal(SMALL) for rank in range(group.size))
    error = float(np.abs(found - expected).max())
    hashes = group.texts(json.dumps([hashlib.sha256(found.tobytes()).hexdigest(), error]))
    if error > 1e-5:
        raise CheckFailedError(f"a sum over {group.size} machines is wrong by {error:.2g}")
    if len({json.loads(text)[0] for text in hashes}) > 1:
        raise CheckFailedError(f"a sum over {group.size} machines has other bits on some of them")
    return GroupDiagnosis(group.size, small, 4 * LARGE / large)
