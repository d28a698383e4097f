"""Limits of this process that an engine meets: threads, descriptors, memory, processors."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress

from datadist.base.cgroups import cpus
from datadist.base.memory_room import Room, least_room, overhead
from datadist.base.shortage import explain, thread_limits
from datadist.base.threads import start
from datadist.diagnosis.finding import Finding, Level, on

THREADS = 24
"""What an engine starts, and a few for transfers by layers."""
DESCRIPTORS = 24
"""What an engine opens, and a link with one peer."""
MIB = 1 << 20


def examine(pool: int = 0) -> Iterator[Finding]:
    """Every finding about the limits; ``pool`` is the size in bytes of a pool that is wanted."""
    yield threads()
    yield descriptors_left()
    yield room(least_room(), pool)
    yield processors(cpus(), len(os.sched_getaffinity(0)))


def threads(wanted: int = THREADS) -> Finding:
    """Whether as many threads as an engine needs can be started: it is tried."""
    end, started = threading.Event(), 0
    try:
        for _ in range(wanted):
            start(threading.Thread(target=end.wait, daemon=True))
            started += 1
    except (RuntimeError, MemoryError) as error:
        return Finding(
            "limit of threads", Level.PROBLEM, f"{started} more can be started: {explain(error)}",
            f"raise `ulimit -u`, or the limit of processes of the container: an engine needs {wanted}",
        )  # fmt: skip
    finally:
        end.set()
    return Finding("limit of threads", Level.OK, "; ".join(thread_limits()) or "no limit")


def descriptors_left(wanted: int = DESCRIPTORS) -> Finding:
    """Whether as many descriptors as an engine needs can be had: it is tried."""
    taken: list[int] = []
    try:
        with suppress(OSError):
            taken.extend(os.dup(0) for _ in range(wanted))
    finally:
        for fd in taken:
            os.close(fd)
    if len(taken) < wanted:
        return Finding(
            "free descriptors", Level.PROBLEM, f"{len(taken)}",
            f"raise `ulimit -n`: an engine and its first link need {wanted}",
        )  # fmt: skip
    return Finding("free descriptors", Level.OK, f"{wanted} or more")


def room(found: Room | None, pool: int) -> Finding:
    """Whether a pool fits beside what is used, and what other engines will still take."""
    name = "room for pools"
    if found is None:
        return Finding(name, Level.NOTE, "the kernel does not tell how much memory can be had",
                       "mount /proc", on("shm"))  # fmt: skip
    if pool and pool + overhead(pool) > found.size:
        return Finding(
            name, Level.PROBLEM, f"{found}, too little for a pool of {pool} bytes",
            "make the pool smaller or raise the limit; DATADIST_SHM_OVERCOMMIT=1 makes the refusal of "
            "init a warning", on("shm"),
        )  # fmt: skip
    return Finding(name, Level.OK, str(found), "", on("shm"))


def processors(used: int, allowed: int) -> Finding:
    """How many processors the numbers of threads follow."""
    if used < allowed:
        return Finding(
            "processors", Level.NOTE, f"{used} of {allowed}, by the quota of a cgroup",
            "large transfers use no more threads than that; raise cpu.max (cpu.cfs_quota_us)",
        )  # fmt: skip
    return Finding("processors", Level.OK, f"{used} may be used")
