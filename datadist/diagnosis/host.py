"""The host itself: kernel, memory, limits, permissions."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

from datadist.base.file_size import LEAST
from datadist.base.process_access import YAMA
from datadist.diagnosis.finding import Finding, Level, on

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
MIB = 1 << 20
FEW_DESCRIPTORS = 1024
OLDEST = (5, 1)
"""First kernel with F_SEAL_FUTURE_WRITE."""


def examine() -> Iterator[Finding]:
    """Every finding about the host."""
    yield kernel(platform.release())
    yield from memory(MEMINFO, cgroup_files(CGROUP, OWN_CGROUP))
    yield ptrace(YAMA)
    yield memlock(*resource.getrlimit(resource.RLIMIT_MEMLOCK))
    yield descriptors(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield file_size(resource.getrlimit(resource.RLIMIT_FSIZE)[0])
    yield address_space(resource.getrlimit(resource.RLIMIT_AS)[0])


def kernel(release: str) -> Finding:
    """Whether the kernel is new enough."""
    version = tuple(
        int(part) for part in release.partition("-")[0].split(".")[:2] if part.isdigit()
    )
    if version < OLDEST:
        return Finding(
            "kernel", Level.PROBLEM, f"Linux {release} has no F_SEAL_FUTURE_WRITE",
            "use Linux 5.1 or later", on("shm"),
        )  # fmt: skip
    return Finding("kernel", Level.OK, f"Linux {release}")


def memory(meminfo: Path, cgroups: Sequence[Path]) -> Iterator[Finding]:
    """Memory that is available for pools, huge pages, and the limit of the memory cgroup."""
    values = _meminfo(meminfo)
    if not values:
        yield Finding("memory", Level.NOTE, f"{meminfo} cannot be read", "mount all of /proc")
        return
    available = values.get("MemAvailable", 0)
    yield Finding(
        "memory", Level.OK,
        f"{available // MIB} MiB available for pools, {values.get('Shmem', 0) // MIB} MiB shared now",
    )  # fmt: skip
    free, size = values.get("HugePages_Free", 0), values.get("Hugepagesize", 0)
    yield Finding(
        "huge pages", Level.OK, f"{free} free of {size // MIB} MiB reserved; pools do not need them"
    )
    limit = _cgroup_limit(cgroups)
    if limit is None:
        yield Finding("memory cgroup", Level.OK, "no limit")
        return
    yield Finding(
        "memory cgroup", Level.NOTE if limit < available else Level.OK, f"limit of {limit // MIB} MiB",
        "keep pools below it: populating a pool beyond it ends the process (SIGKILL), "
        "without an error" if limit < available else "",
        on("shm"),
    )  # fmt: skip


def _meminfo(path: Path) -> dict[str, int]:
    """Values of /proc/meminfo; sizes in bytes."""
    values = {}
    for line in _lines(path):
        name, _, rest = line.partition(":")
        number, *unit = rest.split()
        values[name] = int(number) * (1024 if unit else 1)
    return values


def _lines(path: Path) -> list[str]:
    """No lines where the file is not there, as without /proc."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def cgroup_files(root: Path, own: Path) -> list[Path]:
    """Files with the memory limits of this process's cgroup and those above it, both versions."""
    files = []
    for line in _lines(own):
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        top = root / controllers
        inner = top / place.lstrip("/")
        files += [p / name for p in (inner, *inner.parents) if p == top or top in p.parents]
    return files


def _cgroup_limit(paths: Sequence[Path]) -> int | None:
    """The lowest limit, or None."""
    limits = []
    for path in paths:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdecimal() and int(text) < 1 << 60:  # version 1 writes "no limit" as 2**63
            limits.append(int(text))
    return min(limits, default=None)


def ptrace(path: Path) -> Finding:
    """Whether processes of one user may reach each other's registered memory."""
    try:
        scope = int(path.read_text())
    except (OSError, ValueError):
        scope = 0
    pools = "memory of pools is not concerned"
    if scope >= 2:
        return Finding(
            "ptrace scope", Level.NOTE, f"kernel.yama.ptrace_scope is {scope}: register_cache fails",
            f"sysctl kernel.yama.ptrace_scope=1, or use pools ({pools})", on("shm"),
        )  # fmt: skip
    if scope == 1:
        return Finding(
            "ptrace scope", Level.OK, "kernel.yama.ptrace_scope is 1: processes with registered "
            "memory permit access to all processes of their user (see SECURITY.md)", "", on("shm"),
        )  # fmt: skip
    return Finding("ptrace scope", Level.OK, "not restricted", "", on("shm"))


def memlock(soft: int, hard: int) -> Finding:
    """The limit of memory that RDMA may pin."""
    if soft == resource.RLIM_INFINITY:
        return Finding("memlock limit", Level.OK, "unlimited", "", on("rdma", "hccl"))
    if os.geteuid() == 0:
        return Finding("memlock limit", Level.OK, f"{soft // MIB} MiB, which does not bind root", "",
                       on("rdma", "hccl"))  # fmt: skip
    return Finding(
        "memlock limit", Level.NOTE, f"{soft // MIB} MiB (hard {_size(hard)}): registering more fails",
        "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit", on("rdma", "hccl"),
    )  # fmt: skip


def descriptors(soft: int, hard: int) -> Finding:
    """Whether the descriptor limit allows many peers; each needs about four descriptors."""
    if soft < FEW_DESCRIPTORS:
        return Finding(
            "descriptors", Level.NOTE, f"limit of {soft} (hard {hard})",
            f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}: each peer costs about four",
        )  # fmt: skip
    return Finding("descriptors", Level.OK, f"limit of {soft}")


def address_space(soft: int) -> Finding:
    """Whether mapping the pools of peers is limited."""
    if soft == resource.RLIM_INFINITY:
        return Finding("address space", Level.OK, "unlimited")
    return Finding(
        "address space", Level.NOTE, f"limit of {soft // MIB} MiB; pools of every peer are mapped",
        "ulimit -v unlimited", on("shm"),
    )  # fmt: skip


def file_size(limit: int) -> Finding:
    """Whether `ulimit -f` permits the files of engines and pools."""
    if limit == resource.RLIM_INFINITY:
        return Finding("file sizes", Level.OK, "unlimited")
    if limit < LEAST:
        return Finding(
            "file sizes", Level.PROBLEM, f"limit of {limit} bytes", "ulimit -f unlimited"
        )
    return Finding(
        "file sizes", Level.NOTE, f"limit of {limit} bytes: `init` refuses larger pools, which are files",
        "ulimit -f unlimited", on("shm"),
    )  # fmt: skip


def _size(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit // MIB} MiB"
