"""What a machine can give, from texts as systems print them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlx_mixtral.machine import memory as machine
from mlx_mixtral.machine.device import Device
from mlx_mixtral.machine.memory import (
    SystemMemory,
    _cgroup_room,
    _parse_cgroup,
    _parse_meminfo,
    _parse_vm_stat,
    read_system_memory,
    usable_bytes,
)

GB = 10**9

MEMINFO = """\
MemTotal:       32791384 kB
MemFree:         1234564 kB
MemAvailable:   21456788 kB
Buffers:          523412 kB
Active(anon):    6612340 kB
HugePages_Total:       0
Hugepagesize:       2048 kB
"""

# A MacBook Pro with 32 GiB.
VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                              123456.
Pages active:                            789012.
Pages inactive:                          345678.
Pages speculative:                        12345.
Pages throttled:                              0.
Pages wired down:                        234567.
Pages purgeable:                          56789.
"Translation faults":                  98765432.
Pages copy-on-write:                     345678.
Pages reactivated:                       234567.
File-backed pages:                       456789.
Anonymous pages:                         678901.
Pages stored in compressor:              123456.
Pages occupied by compressor:             45678.
Swapouts:                                    45.
"""

STAT_2 = "anon 2000000000\nfile 3500000000\nactive_file 500000000\ninactive_file 3000000000\n"
STAT_1 = "cache 3500000000\ninactive_file 1\nhierarchical_memory_limit 8589934592\ntotal_inactive_file 3000000000\n"


def test_meminfo() -> None:
    assert _parse_meminfo(MEMINFO) == (32791384 * 1024, 21456788 * 1024)


def test_vm_stat_counts_what_can_be_had_without_pressure() -> None:
    assert _parse_vm_stat(VM_STAT) == 16384 * (123456 + 456789 + 56789)


@pytest.mark.parametrize("text", ["", MEMINFO.replace("MemAvailable", "MemElsewhere"), VM_STAT.split("Pages purg")[0]])
def test_other_texts_are_no_answer(text: str) -> None:
    for parse in (_parse_meminfo, _parse_vm_stat):
        with pytest.raises(ValueError, match=r"meminfo lacks|something else"):
            parse(text)


@pytest.mark.parametrize(
    ("limit", "usage", "stat", "room"),
    [
        ("max\n", "6000000000\n", STAT_2, None),
        ("9223372036854771712\n", "6000000000\n", STAT_1, None),
        ("8000000000\n", "6000000000\n", STAT_2, 5 * GB),
        ("8000000000\n", "6000000000\n", "", 2 * GB),
        ("8000000000\n", "9000000000\n", "", 0),
    ],
)
def test_control_groups(limit: str, usage: str, stat: str, room: int | None) -> None:
    assert _parse_cgroup(limit, usage, stat) == room


def test_version_1_counts_the_cached_files_of_the_groups_inside_too() -> None:
    stat = STAT_1.replace("inactive_file 1\n", "", 1)
    assert _parse_cgroup("8000000000", "6000000000", stat) == 5 * GB


def group(folder: Path, limit: str, usage: int, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, text in zip((*names, "memory.stat"), (limit, str(usage), ""), strict=True):
        (folder / name).write_text(text)


def test_the_tightest_of_the_groups_around_counts(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/system.slice/app.service\n")
    groups = tmp_path / "sys/fs/cgroup"
    group(groups / "system.slice/app.service", "max", 1 * GB)
    group(groups / "system.slice", str(6 * GB), 4 * GB)
    assert _cgroup_room(tmp_path) == 2 * GB
    group(groups / "system.slice/app.service", str(2 * GB), 1 * GB)
    assert _cgroup_room(tmp_path) == 1 * GB


def test_groups_named_as_the_host_sees_them_are_found_at_the_mount(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("12:cpu,cpuacct:/docker/1f\n5:memory:/docker/1f\n0::/docker/1f\n")
    group(tmp_path / "sys/fs/cgroup/memory", str(4 * GB), 1 * GB, version=1)
    assert _cgroup_room(tmp_path) == 3 * GB


def test_no_groups_no_limit(tmp_path: Path) -> None:
    assert _cgroup_room(tmp_path) is None


METAL = Device("metal", "Apple M2 Max", "applegpu_g14s", 32 * GB, 21 * GB)


@pytest.mark.parametrize(
    ("device", "system", "usable"),
    [
        (METAL, SystemMemory(32 * GB, 24 * GB), 21 * GB),
        (METAL, SystemMemory(32 * GB, 10 * GB), 13_200_000_000),
        (METAL, None, 21 * GB),
        (Device("metal", "", ""), None, None),
        (Device("cuda", "", "", 80 * GB), SystemMemory(64 * GB, 10 * GB), 72 * GB),
        (Device("cuda", "", ""), None, None),
        (Device("cpu", "", ""), SystemMemory(64 * GB, 40 * GB), 36 * GB),
        (Device("cpu", "", ""), SystemMemory(64 * GB, 40 * GB, 10 * GB), 9 * GB),
        (Device("cpu", "", ""), SystemMemory(64 * GB, 40 * GB, 50 * GB), 36 * GB),
        (Device("cpu", "", ""), None, None),
    ],
)
def test_usable_bytes(device: Device, system: SystemMemory | None, usable: int | None) -> None:
    assert usable_bytes(device, system) == usable


def test_a_mac_is_asked_by_its_own_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = {"/usr/sbin/sysctl": "34359738368\n", "/usr/bin/vm_stat": VM_STAT}

    def run(command: tuple[str, ...], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, printed[command[0]], "")

    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine.subprocess, "run", run)
    assert read_system_memory() == SystemMemory(34359738368, 10_437_165_056)
    printed["/usr/bin/vm_stat"] = "?"
    assert read_system_memory() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_this_machine_answers() -> None:
    found = read_system_memory()
    assert found is not None
    assert 0 < found.available_bytes <= found.total_bytes


def test_planning_does_not_import_mlx() -> None:
    modules = "mlx_mixtral.budget.slots, mlx_mixtral.experts.trace, mlx_mixtral.machine.memory"
    code = f"import sys, {modules}; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
