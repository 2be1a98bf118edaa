"""Models on several machines against the same on one: real processes, MLX's ring on 127.0.0.1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mixtral import load
from mlx_mixtral_convert import Recipe, convert
from tests.adapters.made import lora
from tests.conftest import MlxLmFolder, read_npz
from tests.distributed.launching import ended, ranks
from tests.distributed.worker import CALLS, Job

EVERYTHING = [
    "logits", "greedy", "drawn", "seeded", "stopped", "batch", "again", "lookup", "saved", "constrained", "chat",
    "cut",
]  # fmt: skip


def run(jobs: list[Job], machines: int, out: Path) -> list[dict[str, Any]]:
    """What the first machine found, job by job."""
    with ranks(machines, "-m", "tests.distributed.worker", json.dumps(jobs), out) as found:
        statuses = ended(found)
        assert statuses == [0] * machines, [each.said for each in found]
    read = read_npz(out)
    results: list[dict[str, Any]] = [{} for _ in jobs]
    for name, value in read.items():
        index, call = name.split()
        results[int(index)][call] = json.loads(str(value)) if value.dtype.kind == "U" else value
    return results


def alone(job: Job) -> dict[str, Any]:
    """The same on one machine."""
    options = {name: value for name, value in job["load"].items() if name not in ("split", "shares", "memory")}
    with load(job["folder"], **options) as model:
        found = {name: CALLS[name](model) for name in job["calls"]}
    return {
        name: value if isinstance(value, np.ndarray) else json.loads(json.dumps(value)) for name, value in found.items()
    }


def check(found: dict[str, Any], expected: dict[str, Any], *, is_exact: bool) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not isinstance(value, np.ndarray):
            assert found[name] == value, name
        elif is_exact:
            assert np.array_equal(found[name], value), name
        else:
            assert np.abs(found[name] - value).max() < 5e-5, name


@pytest.mark.parametrize("split", ["experts", "layers"])
def test_two_machines_give_what_one_gives(short: Path, tmp_path: Path, split: str) -> None:
    adapters = [str(lora(tmp_path / name, short, seed=seed)) for seed, name in enumerate(("one", "two"))]
    jobs: list[Job] = [
        {"folder": str(short), "load": {"split": split}, "calls": EVERYTHING},
        {
            "folder": str(short),
            "load": {"split": split, "adapter": adapters},
            "calls": ["adapted", "logits", "adapted_logits", "saved", "adapted"],
        },
    ]
    for job, found in zip(jobs, run(jobs, 2, tmp_path / "out.npz"), strict=True):
        check(found, alone(job), is_exact=split == "layers")


def test_three_machines_with_uneven_shares(short: Path, tmp_path: Path) -> None:
    job: Job = {"folder": str(short), "load": {"split": "experts", "shares": [3, 2, 1]}, "calls": ["logits", "batch"]}
    (found,) = run([job], 3, tmp_path / "out.npz")
    check(found, alone(job), is_exact=False)


def test_streamed_experts_and_other_caches(tiny: Path, tmp_path: Path) -> None:
    streamed = {"memory": "19MB", "context": 256}
    jobs: list[Job] = [
        {"folder": str(tiny), "load": {"split": "layers"} | streamed, "calls": ["logits", "batch", "again", "saved"]},
        {"folder": str(tiny), "load": {"split": "experts"} | streamed, "calls": ["logits", "batch"]},
        {"folder": str(tiny), "load": {"split": "layers", "kv_bits": 4}, "calls": ["logits", "again", "saved"]},
        {"folder": str(tiny), "load": {"split": "experts", "kv_size": 32}, "calls": ["greedy", "stopped"]},
        # A few bits round a difference of the last bit to another code, here and there: the text is what stays.
        {"folder": str(tiny), "load": {"split": "experts", "kv_bits": 4}, "calls": ["stopped", "saved"]},
    ]
    found = run(jobs, 2, tmp_path / "out.npz")
    for job, each in zip(jobs, found, strict=True):
        check(each, alone(job), is_exact=job["load"]["split"] == "layers")


FORMATS = {f"{bits}-bit": Recipe(bits=bits) for bits in (2, 3, 4, 5, 6, 8)} | {"mxfp4": Recipe(mode="mxfp4")}


def test_every_format(short: Path, tmp_path: Path, mlx_lm_folder: MlxLmFolder) -> None:
    folders = [short, mlx_lm_folder(q_bits=4, q_group_size=64)]
    for name, recipe in FORMATS.items():
        folders.append(tmp_path / name)
        convert(short, folders[-1], recipe=recipe)
    jobs: list[Job] = [
        {"folder": str(folder), "load": {"split": split, "dtype": "float32"}, "calls": ["logits", "greedy"]}
        for folder in folders
        for split in ("experts", "layers")
    ]
    found = run(jobs, 2, tmp_path / "out.npz")
    for job, each in zip(jobs, found, strict=True):
        check(each, alone(job), is_exact=job["load"]["split"] == "layers")


def test_one_process_is_no_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mlx_mixtral import join_group
    from mlx_mixtral.errors import GroupError

    monkeypatch.delenv("MLX_RANK", raising=False)
    assert join_group() is None
    hosts = tmp_path / "hosts.json"
    for text in ("", "[]", '[["127.0.0.1:5000"]]'):
        hosts.write_text(text)
        monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
        assert join_group() is None
    hosts.write_text('[["127.0.0.1:5000"], ["127.0.0.1:5001"]]')
    with pytest.raises(GroupError, match="MLX_RANK is ''"):
        join_group()
    hosts.write_text("{")
    with pytest.raises(GroupError, match="cannot be read"):
        join_group()
    assert mx.default_device().type == mx.DeviceType.cpu
