"""The room of a host and of memory cgroups, from files as the kernel writes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from datadist.base import cgroups, memory_room
from datadist.base.cgroups import Group
from datadist.base.memory_room import Promise, rooms

HOST, SWAP = 1 << 40, 1 << 30


def _write(folder: Path, files: Mapping[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


@pytest.fixture(autouse=True)
def meminfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with much memory."""
    path = tmp_path / "meminfo"
    path.write_text(f"MemAvailable: {HOST >> 10} kB\nSwapFree: {SWAP >> 10} kB\n")
    monkeypatch.setattr(memory_room, "MEMINFO", path)


def _least(monkeypatch: pytest.MonkeyPatch, *found: Group, given: int = 0) -> int:
    monkeypatch.setattr(memory_room, "groups", lambda _: iter(found))
    return min(room.size for room in rooms([Promise(given, os.getpid(), 1)]))


@pytest.mark.parametrize(
    ("version", "files", "room"),
    [
        (2, {"memory.max": "max", "memory.current": 5}, HOST + SWAP),
        (2, {"memory.max": 100, "memory.current": 30, "memory.swap.max": 0}, 70),
        (2, {"memory.max": 100, "memory.current": 30,
             "memory.swap.max": 9, "memory.swap.current": 4}, 75),
        (2, {"memory.max": 100, "memory.current": 30, "memory.swap.max": "max"}, 70 + SWAP),
        (2, {"memory.max": 100, "memory.current": 30, "memory.swap.max": 0,
             "memory.stat": "anon 1\nactive_file 5\ninactive_file 6\nslab_reclaimable 1"}, 82),
        (2, {"memory.max": 10, "memory.current": 30, "memory.swap.max": 0}, 0),
        (1, {"memory.limit_in_bytes": 2**63 - 4096, "memory.usage_in_bytes": 5}, HOST + SWAP),
        (1, {"memory.limit_in_bytes": 100, "memory.usage_in_bytes": 30}, 70 + SWAP),
        (1, {"memory.limit_in_bytes": 100, "memory.usage_in_bytes": 30,
             "memory.memsw.limit_in_bytes": 110, "memory.memsw.usage_in_bytes": 35}, 75),
        (1, {"memory.limit_in_bytes": 100, "memory.usage_in_bytes": 30,
             "memory.memsw.limit_in_bytes": 100, "memory.memsw.usage_in_bytes": 30,
             "memory.stat": "total_inactive_file 7\ntotal_active_file 2"}, 79),
        (2, {}, HOST + SWAP),
    ],
)  # fmt: skip
def test_the_room_of_a_cgroup(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    files: dict[str, object],
    room: int,
) -> None:
    _write(tmp_path / "g", files)
    assert _least(monkeypatch, Group(tmp_path / "g", version)) == room


def test_the_narrowest_level_counts_with_what_is_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, limit in (("a", 100), ("b", 50), ("c", 80)):
        _write(tmp_path / name, {"memory.max": limit, "memory.current": 0, "memory.swap.max": 0})
    found = [Group(tmp_path / name, 2) for name in "abc"]
    assert _least(monkeypatch, *found, given=20) == 30
    assert _least(monkeypatch, *found, given=60) == 0


def test_a_pool_promises_what_is_not_populated_while_its_process_lives() -> None:
    fd = os.memfd_create(memory_room.pool_name())
    os.ftruncate(fd, 1 << 20)
    inode = os.fstat(fd).st_ino
    assert _promised(inode) == 1 << 20
    os.pwrite(fd, b"x" * (1 << 19), 0)
    assert _promised(inode) == 1 << 19
    os.close(fd)
    assert _promised(inode) is None
    foreign = os.memfd_create(f"{memory_room.PREFIX}1")  # we hold it, and another one made it
    os.ftruncate(foreign, 1 << 20)
    assert _promised(os.fstat(foreign).st_ino) is None
    os.close(foreign)


def _promised(inode: int) -> int | None:
    return next((p.size for p in memory_room.promises() if p.inode == inode), None)


@pytest.mark.parametrize(
    ("mount", "place", "found"),
    [
        ("/ {top}", "/a/b", ["a/b", "a", "."]),
        ("/docker/x {top}", "/docker/x/a", ["a", "."]),
        ("/docker/x {top}", "/docker/x", ["."]),
        ("/ {top}", "/elsewhere", ["."]),
        ("/ {top}", "/../../a", ["."]),
    ],
)
def test_groups_are_found_where_they_are_mounted(
    tmp_path: Path, mount: str, place: str, found: list[str]
) -> None:
    top = tmp_path / "with space"
    (top / "a" / "b").mkdir(parents=True)
    shown = mount.format(top=str(top).replace(" ", "\\040"))
    _write(tmp_path, {
        "own": f"5:cpu,memory:{place}\n1:name=systemd:/\n0::/",
        "mounts": f"30 29 0:26 {shown} rw,relatime shared:9 - cgroup cgroup rw,cpu,memory",
    })  # fmt: skip
    levels = list(cgroups.groups("memory", tmp_path / "own", tmp_path / "mounts"))
    assert [level.path for level in levels] == [top / each for each in found]


@pytest.mark.parametrize(
    ("version", "files", "cpus"),
    [
        (2, {"cpu.max": "max 100000"}, None),
        (2, {"cpu.max": "50000 100000"}, 1),
        (2, {"cpu.max": "150000 100000"}, 2),
        (1, {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, None),
        (1, {"cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": "100000"}, 1),
        (2, {}, None),
    ],
)
def test_processors_by_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, files: dict[str, str], cpus: int
) -> None:
    allowed = set(range(8))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    _write(tmp_path / "g", files)
    monkeypatch.setattr(cgroups, "groups", lambda *_: iter([Group(tmp_path / "g", version)]))
    assert cgroups.cpus() == (cpus or 8)
