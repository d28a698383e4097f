"""The control groups of this process: limits of a group of either version, and of those above it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from datadist.base.callers import tolerate

__all__ = ["Group", "cpus", "groups", "number"]

OWN = Path("/proc/self/cgroup")
MOUNTS = Path("/proc/self/mountinfo")
UNLIMITED = 1 << 60
"""Version 1 writes "no limit" of memory as nearly 2**63."""


@dataclass(frozen=True)
class Group:
    """One group that limits this process; ``version`` is 1 or 2."""

    path: Path
    version: int
    place: str | None = None
    """Where it is in its hierarchy; None where only the processes that are seen here can be in it."""
    controller: str = ""

    def holds(self, pid: int) -> bool:
        """Whether a process is in this group, or in one below."""
        if self.place is None:
            return True
        with tolerate(OSError, ValueError):
            for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
                _, controllers, place = line.split(":", 2)
                if self._is_ours(controllers):
                    return _is_within(place, self.place)
        return False

    def _is_ours(self, controllers: str) -> bool:
        return self.controller in controllers.split(",") if self.version == 1 else not controllers

    def read(self, name: str) -> int | None:
        """The number in a file of the group; None where there is none, or no limit."""
        return number(self.path / name)

    def stat(self, name: str) -> dict[str, int]:
        """The fields of a file such as ``memory.stat``; empty where there is none."""
        found = {}
        with tolerate(OSError, ValueError):
            for line in (self.path / name).read_text().splitlines():
                key, _, value = line.partition(" ")
                found[key] = int(value)
        return found


def number(path: Path) -> int | None:
    """What a file says, if it is a number and a limit."""
    with tolerate(OSError, ValueError):
        value = int(path.read_text())
        return value if value < UNLIMITED else None
    return None


def groups(controller: str, own: Path = OWN, mounts: Path = MOUNTS) -> Iterator[Group]:
    """This process's groups for a controller (``memory``, ``pids``, ``cpu``), the innermost first.

    All that are visible: what a container sees of the hierarchy is what is mounted there.
    """
    with tolerate(OSError, ValueError):
        listed = [_Mount(line.split()) for line in mounts.read_text().splitlines()]
        for line in own.read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            version = 1 if controllers else 2
            if version == 2 or controller in controllers.split(","):
                yield from _upwards(listed, controller, version, place)


class _Mount:
    """A line of mountinfo (proc_pid_mountinfo(5))."""

    def __init__(self, fields: list[str]) -> None:
        rest = fields[fields.index("-") + 1 :]
        self.root, self.point = _plain(fields[3]), Path(_plain(fields[4]))
        self.version = {"cgroup": 1, "cgroup2": 2}.get(rest[0], 0)
        self.controllers = rest[-1].split(",")


def _plain(text: str) -> str:
    """A path of mountinfo, in which blanks are written as octal numbers."""
    return text.encode().decode("unicode_escape") if "\\" in text else text


def _upwards(listed: list[_Mount], controller: str, version: int, place: str) -> Iterator[Group]:
    for mount in listed:
        if mount.version != version or (version == 1 and controller not in mount.controllers):
            continue
        inner, known = mount.point / _below(place, mount.root), True
        if not inner.is_dir():  # the mount is the container's group itself
            inner, known = mount.point, False
        for path in (inner, *inner.parents):
            where = str(PurePosixPath(mount.root, path.relative_to(mount.point)))
            yield Group(path, version, where if known else None, controller)
            if path == mount.point:
                return
        return


def _below(place: str, root: str) -> str:
    """The path of a group within a mount whose root is another group."""
    if ".." in place.split("/"):  # it lies above the root of our cgroup namespace
        return ""
    return os.path.relpath(place, root) if _is_within(place, root) else place.lstrip("/")


def _is_within(place: str, root: str) -> bool:
    return place == root or place.startswith(root.rstrip("/") + "/")


def cpus(own: Path = OWN, mounts: Path = MOUNTS) -> int:
    """Processors that this process may use at a time: of its affinity, and of its groups' quota."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except OSError:  # a filter of system calls refuses it
        allowed = os.cpu_count() or 1
    quotas = [_quota(group) for group in groups("cpu", own, mounts)]
    return max(1, min([allowed, *(math.ceil(quota) for quota in quotas if quota is not None)]))


def _quota(group: Group) -> float | None:
    """Processors of one group; None where it has no limit."""
    with tolerate(OSError, ValueError, ZeroDivisionError):
        if group.version == 2:
            quota, period = (group.path / "cpu.max").read_text().split()
        else:
            quota = (group.path / "cpu.cfs_quota_us").read_text()
            period = (group.path / "cpu.cfs_period_us").read_text()
        used = int(quota) / int(period)  # "max" is no number, -1 no limit
        return used if used > 0 else None
    return None
