"""Commands in a group of machines: which are refused, and what bench says of the group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke
from tests.distributed.launching import ended, ranks

REFUSED = [
    ["demo"],
    ["convert", "SOURCE", "DEST"],
    ["calibrate", "SOURCE", "FILE"],
    ["routing", "MODEL", "--text", "TEXT"],
    ["report", "MODEL", "--output", "DEST"],
    ["upload", "FOLDER", "owner/name"],
    ["bench", "MODEL", "--compare", "mlx-lm"],
    ["serve", "MODEL", "--idle-unload", "5"],
    ["evaluate", "MODEL", "--text", "TEXT", "--reference", "OTHER"],
]


@pytest.mark.parametrize("arguments", REFUSED, ids=lambda each: each[0])
def test_what_several_machines_cannot_do_is_refused_before_they_connect(
    arguments: list[str], invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["127.0.0.1:1"], ["127.0.0.1:2"]]')
    monkeypatch.chdir(tmp_path)
    for rank in ("0", "1"):
        found = invoke(*arguments, env={"MLX_RANK": rank, "MLX_HOSTFILE": str(hosts)})
        assert found.exit_code == 2
        assert "is not possible on several machines; " in found.stderr
        assert found.stderr.count("\n") == 1


def test_bench_counts_the_sums_of_a_token(tiny: Path) -> None:
    """One for the token, and one for each of 6 layers, or of 2 machines."""
    sizes = ["--prompt", "none", "--batch", "none", "--depth", "8", "--tokens", "4", "--repeats", "1", "--json"]
    for split, count in (("experts", 1 + 6), ("layers", 1 + 2)):
        with ranks(2, "-m", "mlx_mixtral", "bench", tiny, "--device", "cpu", "--split", split, *sizes) as machines:
            assert ended(machines) == [0, 0], [each.said for each in machines]
            found = json.loads("".join(machines[0].out))
            assert not machines[1].out
        group = found["group"]
        assert (group["machines"], group["split"], group["sums_per_token"]) == (2, split, count)
        assert found["decode"][0]["share_of_sums"] > 0
