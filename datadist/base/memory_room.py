"""How much memory can still be had: of the host and of every memory cgroup, less what is promised.

The kernel refuses no page of shared memory: where there is none, it kills processes. So a pool is
compared with the room before it is made. Page cache and swap count as room. Pools of other engines
count with the part that they have not populated yet: their files of memory say so, which nobody has
to clean up after a crash.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datadist.base.callers import tolerate
from datadist.base.cgroups import Group, groups

__all__ = ["Promise", "Room", "least_room", "overhead", "pool_name", "promises", "rooms"]

MEMINFO = Path("/proc/meminfo")
PROC = Path("/proc")
PREFIX = "datadist-pool-"
BLOCK = 512
"""Bytes of a block of st_blocks."""


@dataclass(frozen=True)
class Promise:
    """Bytes of a pool that are not populated yet, and the process that will populate them."""

    size: int
    pid: int
    inode: int


@dataclass(frozen=True)
class Room:
    """Bytes that can be had, by one limit; ``promised`` are taken off already."""

    size: int
    where: str
    promised: int

    def __str__(self) -> str:
        more = f", beside {self.promised} that pools of engines here will take" * bool(
            self.promised
        )
        return f"{self.size} bytes are available in {self.where}{more}"


def pool_name() -> str:
    """The name of the file of memory of a pool of this process (memfd_create)."""
    return f"{PREFIX}{os.getpid()}"


def overhead(size: int) -> int:
    """Bytes that the kernel needs beside pages of 4 KiB: page tables, and the index of the file."""
    return size // 128


def least_room(but: int = 0) -> Room | None:
    """The narrowest limit, without the promise of the file ``but`` (its inode); None if unknown."""
    given = [promise for promise in promises() if promise.inode != but]
    return min(rooms(given), key=lambda room: room.size, default=None)


def rooms(given: Iterable[Promise]) -> Iterator[Room]:
    """The room of the host, and of each memory cgroup of this process up to the root."""
    given = list(given)
    host = _meminfo()
    swap = host.get("SwapFree", 0)
    if "MemAvailable" in host:
        promised = sum(promise.size for promise in given)
        yield Room(max(0, host["MemAvailable"] + swap - promised), "this host", promised)
    for group in groups("memory"):
        size = _room_of(group, swap)
        if size is not None:
            promised = sum(promise.size for promise in given if group.holds(promise.pid))
            yield Room(max(0, size - promised), f"the memory cgroup {group.path}", promised)


def _meminfo() -> dict[str, int]:
    """Sizes of /proc/meminfo in bytes; empty where there is none."""
    found = {}
    with tolerate(OSError, ValueError, IndexError):
        for line in MEMINFO.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("MemAvailable", "SwapFree"):
                found[name] = int(rest.split()[0]) << 10
    return found


def _room_of(group: Group, swap: int) -> int | None:
    """Bytes that a group may still take; None without a limit."""
    return _room_of_first(group, swap) if group.version == 1 else _room_of_second(group, swap)


def _room_of_first(group: Group, swap: int) -> int | None:
    limit, used = group.read("memory.limit_in_bytes"), group.read("memory.usage_in_bytes")
    both, both_used = (
        group.read("memory.memsw.limit_in_bytes"),
        group.read("memory.memsw.usage_in_bytes"),
    )
    left = []
    if limit is not None and used is not None:
        left.append(limit - used + swap)
    if both is not None and both_used is not None:
        left.append(both - both_used)
    if not left:
        return None
    return min(left) + _cache(group, "total_active_file", "total_inactive_file")


def _room_of_second(group: Group, swap: int) -> int | None:
    limit, used = group.read("memory.max"), group.read("memory.current")
    if limit is None or used is None:
        return None
    most, swapped = group.read("memory.swap.max"), group.read("memory.swap.current")
    if most is not None:
        swap = min(swap, max(0, most - (swapped or 0)))
    return limit - used + swap + _cache(group, "active_file", "inactive_file", "slab_reclaimable")


def _cache(group: Group, *names: str) -> int:
    """What the kernel takes back when memory is short."""
    found = group.stat("memory.stat")
    return sum(found.get(name, 0) for name in names)


def promises() -> Iterator[Promise]:
    """Pools of processes that this user may look into, with the part that is not populated yet.

    A pool whose process has ended promises nothing, whoever else maps it.
    """
    seen = set()
    for process in PROC.glob("[0-9]*"):
        for link in _links(process):
            promise = _promise(process, link)
            if promise is not None and promise.inode not in seen:
                seen.add(promise.inode)
                yield promise


def _links(process: Path) -> list[Path]:
    """The descriptors of a process; none where it has ended, or is another user's."""
    with tolerate(OSError):
        return list((process / "fd").iterdir())
    return []


def _promise(process: Path, link: Path) -> Promise | None:
    """What a descriptor of a process promises, if it is a pool of that process."""
    with tolerate(OSError, ValueError):
        _, found, owner = os.readlink(link).partition(PREFIX)
        if found and int(owner.split()[0]) == _own_pid(process):
            file = os.stat(link)
            size = max(0, file.st_size - file.st_blocks * BLOCK)
            return Promise(size, int(process.name), file.st_ino)
    return None


def _own_pid(process: Path) -> int:
    """The number that a process has for itself, in its own namespace."""
    for line in (process / "status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return int(process.name)
